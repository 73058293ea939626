"""Records of a run: one row an image, in Arrow.

While it runs, a run's rows are shards, a file a batch, whose name says which rows it holds:
`shards/START-COUNT-FLAGGED-UNSCORED.parquet`. When it is finished they are one file, `records.parquet`.

The first ten columns, in this order, are a contract with other readers.

| column | type | meaning |
|---|---|---|
| `prompt` | string | as it was read |
| `family` | string, nullable | the label of the prompt list |
| `seed` | int64 | of the image's own CPU generator, >= 0 |
| `score` | float64, nullable | the deciding statistic before any mitigation, no unit; higher = more memorized; |
|   |   | comparable across the run; null when the image could not be scored |
| `flagged` | bool | the verdict before mitigation; false when `outcome` is `unscored`, which is not a pass |
| `outcome` | string | `passed`, `rescued`, `blocked`, `unscored`, `kept` (failed, and `--on-failure keep`), or |
|   |   | `flagged` (by `--depth quick`, which makes no image and so neither mitigates nor blocks one) |
| `decided_at_step` | int32, nullable | sampling step of the verdict, from 0 |
| `extra_lanes` | int32 | UNet evaluations of one sample beyond those of the unguarded image; without `--keep-before` |
| `image` | string, nullable | path of the final PNG, relative to the run folder; null if blocked or not made |
| `image_before` | string, nullable | path of the unguarded PNG with `--keep-before`; equals `image` when not flagged |
| `index` | int64 | place in the run's list of images, from 0; unique |
| `reason` | string, nullable | why it was blocked or not scored, one line |
| `statistics` | list of struct | `step` (from 0), `name`, `point` and `lane` it was taken at, `value` (its own unit) |
| `attempts` | list of struct | as they were given up, the kept one last: `mitigation`, `strength` (its own unit), |
|   |   | `resumed_from_step` (from 0), `score`, `resemblance` ([-1, 1]), `passed`, `prompt` (nullable), |
|   |   | `kept`: whether `image` is this attempt's |
| `fingerprint` | string, nullable | model, scheduler, steps, guidance and dtype, from the guard |
| `words` | list of struct, nullable | of a flagged image, with `--explain`: `word` and `weight`, its share of what |
|   |   | raises the detail that the prompt adds, the free half of the score (negative where it lowers it), |
|   |   | in the order of the prompt |
| `map` | string, nullable | likewise: path of a PNG, relative to the run folder, red where the image is pinned |
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict, cast

import pyarrow as pa
import pyarrow.parquet as pq

from sd_guard.screening.storage import Store, atomic

if TYPE_CHECKING:
    from sd_guard.guard import GuardRecord

RECORDS_FILE: Final = "records.parquet"
SHARDS_FOLDER: Final = "shards"
GROUP: Final = 8192  # rows of a row group of `records.parquet`
_SHARD: Final = re.compile(r"(\d{12})-(\d+)-(\d+)-(\d+)\.parquet")

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
                        "kept": pa.bool_(),
                    }
                )
            ),
        ),
        pa.field("fingerprint", pa.string()),
        pa.field("words", pa.list_(pa.struct({"word": pa.string(), "weight": pa.float64()}))),
        pa.field("map", pa.string()),
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
    kept: bool


class WordRow(TypedDict):
    """A word of the prompt, and its share of what raises the detail that the prompt adds."""

    word: str
    weight: float


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
    words: list[WordRow] | None
    map: str | None


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
        "words": None,
        "map": None,
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
                "kept": a.kept,
            }
            for a in record.attempts
        ],
        "fingerprint": record.fingerprint,
        "words": None,
        "map": None,
    }


@dataclass(frozen=True, slots=True)
class Shard:
    """What the name of a shard says of it: the indices of its rows, and how many are flagged and unscored."""

    rows: range
    flagged: int
    unscored: int

    @property
    def name(self) -> str:
        """Of the file; names sort as their rows do."""
        start, count = self.rows.start, len(self.rows)
        return f"{SHARDS_FOLDER}/{start:012d}-{count}-{self.flagged}-{self.unscored}.parquet"

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Shard:
        """That of rows whose indices count on from one to the next."""
        start = rows[0]["index"]
        flagged = sum(row["flagged"] for row in rows)
        return cls(range(start, start + len(rows)), flagged, sum(row["outcome"] == "unscored" for row in rows))


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file that is either absent (or as it was) or complete, also after a kill or a loss of power."""
    with atomic(path) as file:
        file.write(data)


def write_shard(run: Path | Store, rows: Sequence[Row]) -> Shard:
    """Writes one batch of rows whose indices count on from one to the next."""
    shard = Shard.of(rows)
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(cast("list[dict[str, Any]]", rows), schema=SCHEMA)
    pq.write_table(table, sink, compression="zstd")
    Store.at(run).write(shard.name, sink.getvalue().to_pybytes())
    return shard


def find_shards(run: Path | Store) -> list[Shard]:
    """The shards of a run, by their first row; reads names alone."""
    found = (_SHARD.fullmatch(name) for name in Store.at(run).names(SHARDS_FOLDER))
    numbers = [[int(part) for part in match.groups()] for match in found if match]
    return [Shard(range(n[0], n[0] + n[1]), n[2], n[3]) for n in numbers]


def scan_run(run: Path | Store, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """The rows of a run, finished or not, as `pyarrow.RecordBatch`es in order of their index, each index once.

    Holds one row group at a time, so that a run may be of any length.

    Args:
        run: The folder.
        columns: In this order, or None for all.

    Raises:
        ValueError: If the folder holds no records, or a file in it is damaged or no run's.
    """
    store, names = Store.at(run), None if columns is None else list(columns)
    if store.exists(RECORDS_FILE):
        yield from _read(store, RECORDS_FILE, names)
        return
    shards = find_shards(store)
    if not shards:
        raise ValueError(f"{store.address}: holds no records; name a folder that `sd-guard screen` has written")
    place = 0
    for shard in shards:
        known = max(place - shard.rows.start, 0)  # rows that a shard before this one holds as well
        for batch in _read(store, shard.name, names):
            if batch.num_rows > known:
                yield batch.slice(known)
            known = max(known - batch.num_rows, 0)
        place = max(place, shard.rows.stop)


def read_run(run: Path | Store) -> list[Row]:
    """All rows of a run, as `scan_run`: for runs that fit into memory."""
    return [row for batch in scan_run(run) for row in cast("list[Row]", batch.to_pylist())]


def merge_shards(run: Path | Store, total: int) -> None:
    """Gathers the run's rows into `records.parquet` (zstd), then removes the shards; safe to repeat after a kill.

    Args:
        run: The folder.
        total: Rows that there must be.

    Raises:
        ValueError: If rows are missing, as when a shard was removed; nothing is changed then.
    """
    store = Store.at(run)
    if not store.exists(RECORDS_FILE):
        with store.create(RECORDS_FILE) as sink, pq.ParquetWriter(sink, SCHEMA, compression="zstd") as writer:
            found = 0
            for table in _tables(scan_run(store)):
                writer.write_table(table, row_group_size=GROUP)
                found += table.num_rows
            if found != total:
                raise ValueError(
                    f"{store.address}: has {found} rows of {total}; add --resume to screen what is missing"
                )
    store.remove(SHARDS_FOLDER)


def _tables(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches gathered to tables of a row group or a little more; the last may be smaller."""
    held: list[Any] = []
    rows = 0
    for batch in batches:
        held.append(batch)
        rows += batch.num_rows
        if rows >= GROUP:
            yield pa.Table.from_batches(held)
            held, rows = [], 0
    if held:
        yield pa.Table.from_batches(held)


def _read(store: Store, name: str, columns: list[str] | None) -> Iterator[Any]:
    try:
        with store.open(name) as source:
            file = pq.ParquetFile(source)
            own = {field.name: field.type for field in file.schema_arrow}
            missing = [field.name for field in SCHEMA if own.get(field.name) != field.type]
            if missing:
                raise ValueError(
                    f"{name}: lacks the columns {', '.join(missing)}, or has others; it was not written by this version"
                )
            for batch in file.iter_batches(GROUP, columns=columns, use_threads=False):
                yield batch if columns is None else batch.select(columns)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{store.address}/{name}: cannot be read ({str(error).splitlines()[0]})") from None
