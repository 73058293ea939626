"""Records of a run: one row an image, in Arrow.

The first ten columns, in this order, are a contract with other readers.

| column | type | meaning |
|---|---|---|
| `prompt` | string | as it was read |
| `family` | string, nullable | the label of the prompt list |
| `seed` | int64 | of the image's own CPU generator, >= 0 |
| `score` | float64, nullable | the deciding statistic before any mitigation, no unit; higher = more memorized; |
|   |   | comparable across the run; null when the image could not be scored |
| `flagged` | bool | the verdict before mitigation; false when `outcome` is `unscored`, which is not a pass |
| `outcome` | string | `passed`, `rescued`, `blocked`, `unscored`, or `kept` (failed, and `--on-failure keep`) |
| `decided_at_step` | int32, nullable | sampling step of the verdict, from 0 |
| `extra_lanes` | int32 | UNet evaluations of one sample beyond those of the unguarded image; without `--keep-before` |
| `image` | string, nullable | path of the final PNG, relative to the run folder; null if blocked or not made |
| `image_before` | string, nullable | path of the unguarded PNG with `--keep-before`; equals `image` when not flagged |
| `index` | int64 | place in the run's list of images, from 0; unique |
| `reason` | string, nullable | why it was blocked or not scored, one line |
| `statistics` | list of struct | `step` (from 0), `name`, `point` and `lane` it was taken at, `value` (its own unit) |
| `attempts` | list of struct | in the order they were made: `mitigation`, `strength` (its own unit), |
|   |   | `resumed_from_step` (from 0), `score`, `resemblance` ([-1, 1]), `passed`, `prompt` (nullable) |
| `fingerprint` | string, nullable | model, scheduler, steps, guidance and dtype, from the guard |
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict, cast

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from sd_guard.guard import GuardRecord

RECORDS_FILE: Final = "records.parquet"
SHARDS_FOLDER: Final = "shards"

SCHEMA: Final = pa.schema(
    [
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("family", pa.string()),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("flagged", pa.bool_(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("decided_at_step", pa.int32()),
        pa.field("extra_lanes", pa.int32(), nullable=False),
        pa.field("image", pa.string()),
        pa.field("image_before", pa.string()),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field(
            "statistics",
            pa.list_(
                pa.struct(
                    {
                        "step": pa.int32(),
                        "name": pa.string(),
                        "point": pa.string(),
                        "lane": pa.string(),
                        "value": pa.float64(),
                    }
                )
            ),
        ),
        pa.field(
            "attempts",
            pa.list_(
                pa.struct(
                    {
                        "mitigation": pa.string(),
                        "strength": pa.float64(),
                        "resumed_from_step": pa.int32(),
                        "score": pa.float64(),
                        "resemblance": pa.float64(),
                        "passed": pa.bool_(),
                        "prompt": pa.string(),
                    }
                )
            ),
        ),
        pa.field("fingerprint", pa.string()),
    ]
)


class StatisticRow(TypedDict):
    """A statistic's value at one step."""

    step: int
    name: str
    point: str
    lane: str
    value: float


class AttemptRow(TypedDict):
    """One attempt to mitigate, and what it came to."""

    mitigation: str
    strength: float
    resumed_from_step: int
    score: float
    resemblance: float
    passed: bool
    prompt: str | None


class Row(TypedDict):
    """One image; the columns of `SCHEMA`."""

    prompt: str
    family: str | None
    seed: int
    score: float | None
    flagged: bool
    outcome: str
    decided_at_step: int | None
    extra_lanes: int
    image: str | None
    image_before: str | None
    index: int
    reason: str | None
    statistics: list[StatisticRow]
    attempts: list[AttemptRow]
    fingerprint: str | None


def unscored_row(*, prompt: str, family: str | None, seed: int, index: int, reason: str) -> Row:
    """The row of an image that could not be made or scored."""
    return {
        "prompt": prompt,
        "family": family,
        "seed": seed,
        "score": None,
        "flagged": False,
        "outcome": "unscored",
        "decided_at_step": None,
        "extra_lanes": 0,
        "image": None,
        "image_before": None,
        "index": index,
        "reason": reason,
        "statistics": [],
        "attempts": [],
        "fingerprint": None,
    }


def record_row(record: GuardRecord, *, prompt: str, family: str | None, seed: int, index: int) -> Row:
    """The row of a guard's record; the paths of its images are still to be filled in."""
    return {
        "prompt": prompt,
        "family": family,
        "seed": seed,
        "score": None if math.isnan(record.score) else record.score,
        "flagged": record.verdict == "flag",
        "outcome": record.outcome,
        "decided_at_step": record.decided_at_step,
        "extra_lanes": record.extra_lanes,
        "image": None,
        "image_before": None,
        "index": index,
        "reason": record.reason,
        "statistics": [
            {"step": s.step, "name": s.name, "point": s.point, "lane": s.lane, "value": s.value}
            for s in record.statistics
        ],
        "attempts": [
            {
                "mitigation": a.mitigation,
                "strength": a.strength,
                "resumed_from_step": a.resumed_from_step,
                "score": a.score,
                "resemblance": a.resemblance,
                "passed": a.passed,
                "prompt": a.prompt,
            }
            for a in record.attempts
        ],
        "fingerprint": record.fingerprint,
    }


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file that is either absent (or as it was) or complete, also after a kill or a loss of power."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_shard(run: Path, rows: list[Row]) -> Path:
    """Writes one batch under `shards/`, atomically, named by its first index."""
    path = run / SHARDS_FOLDER / f"{rows[0]['index']:08d}.parquet"
    _write_rows(path, rows)
    return path


def read_run(run: Path) -> list[Row]:
    """All rows of a run, finished or not, each index once, in order.

    Raises:
        ValueError: If the folder holds no records, or a file in it is damaged or no run's.
    """
    paths = [path for path in (run / RECORDS_FILE,) if path.exists()]
    paths += sorted((run / SHARDS_FOLDER).glob("*.parquet"))
    if not paths:
        raise ValueError(f"{run}: holds no records; name a folder that `sd-guard screen` has written")
    rows = {row["index"]: row for path in reversed(paths) for row in _read_rows(path)}
    return [rows[index] for index in sorted(rows)]


def merge_shards(run: Path) -> Path:
    """Gathers the run's rows into `records.parquet` (zstd), then removes the shards; safe to repeat after a kill."""
    path = run / RECORDS_FILE
    _write_rows(path, read_run(run))
    shards = run / SHARDS_FOLDER
    if shards.exists():
        for shard in shards.iterdir():
            shard.unlink()
        shards.rmdir()
    return path


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_pylist(cast("list[dict[str, Any]]", list(rows)), schema=SCHEMA), sink, compression="zstd"
    )
    write_atomic(path, sink.getvalue().to_pybytes())


def _read_rows(path: Path) -> list[Row]:
    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: lacks the columns {', '.join(missing)}; it was not written by this version")
    return cast("list[Row]", table.select(SCHEMA.names).to_pylist())
