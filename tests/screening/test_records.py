"""Records: the contract of the first columns, round trips, and writes that are whole or not there."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sd_guard.screening import records
from sd_guard.screening.records import (
    SCHEMA,
    Row,
    Shard,
    find_shards,
    merge_shards,
    read_run,
    record_row,
    scan_run,
    unscored_row,
    write_shard,
)

CONTRACT = [
    ("prompt", pa.string()),
    ("family", pa.string()),
    ("seed", pa.int64()),
    ("score", pa.float64()),
    ("flagged", pa.bool_()),
    ("outcome", pa.string()),
    ("decided_at_step", pa.int32()),
    ("extra_lanes", pa.int32()),
    ("image", pa.string()),
    ("image_before", pa.string()),
]


def record(**changes: Any) -> Any:
    return SimpleNamespace(
        **{
            "verdict": "flag",
            "outcome": "rescued",
            "score": 0.75,
            "decided_at_step": 4,
            "statistics": (SimpleNamespace(step=4, name="detail", point="x_t", lane="cond", value=1.5),),
            "attempts": (
                SimpleNamespace(
                    mitigation="rewrite",
                    strength=1.0,
                    resumed_from_step=0,
                    score=0.1,
                    resemblance=0.2,
                    passed=True,
                    prompt="a cat",
                    kept=True,
                ),
            ),
            "extra_lanes": 12,
            "fingerprint": "abc",
            "reason": None,
            **changes,
        }
    )


def row(index: int, **changes: Any) -> Row:
    return record_row(record(**changes), prompt=f"prompt {index}", family=None, seed=index, index=index)


def test_first_columns_are_the_contract() -> None:
    assert [(field.name, field.type) for field in SCHEMA][: len(CONTRACT)] == CONTRACT


def test_every_column_is_documented() -> None:
    assert records.__doc__ is not None
    for name in SCHEMA.names:
        assert f"`{name}`" in records.__doc__


def test_rows_round_trip_through_shards_and_the_merged_file(tmp_path: Path) -> None:
    rows = [row(0), row(1, score=float("nan"), verdict="unscored", outcome="unscored"), row(2, verdict="pass")]
    rows.append(unscored_row(prompt="x", family="f", seed=1, index=3, reason="out of memory"))
    write_shard(tmp_path, rows[2:])
    write_shard(tmp_path, rows[:2])
    assert rows[1]["score"] is None
    assert [r["flagged"] for r in rows] == [True, False, False, False]
    assert find_shards(tmp_path) == [Shard(range(2), 1, 1), Shard(range(2, 4), 0, 1)]
    assert read_run(tmp_path) == rows
    for _ in range(2):
        merge_shards(tmp_path, 4)
        assert read_run(tmp_path) == rows
    assert pq.ParquetFile(tmp_path / "records.parquet").metadata.row_group(0).column(0).compression == "ZSTD"
    assert not (tmp_path / "shards").exists()


def test_a_kill_between_merge_and_clean_up_repeats_no_row(tmp_path: Path) -> None:
    write_shard(tmp_path, [row(0), row(1)])
    (path,) = (tmp_path / "shards").iterdir()
    data = path.read_bytes()
    merge_shards(tmp_path, 2)
    path.parent.mkdir()
    path.write_bytes(data)
    assert [r["index"] for r in read_run(tmp_path)] == [0, 1]


def test_rows_that_two_shards_hold_are_read_once(tmp_path: Path) -> None:
    for start, stop in ((0, 3), (2, 4), (3, 4), (3, 6)):
        write_shard(tmp_path, [row(index) for index in range(start, stop)])
    assert [r["index"] for r in read_run(tmp_path)] == list(range(6))


def test_a_run_with_a_row_missing_is_not_merged(tmp_path: Path) -> None:
    for index in (0, 2):
        write_shard(tmp_path, [row(index)])
    with pytest.raises(ValueError, match="has 2 rows of 3; add --resume"):
        merge_shards(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]


def test_a_run_is_read_a_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "GROUP", 4)
    for start in range(0, 30, 3):
        write_shard(tmp_path, [row(index) for index in range(start, start + 3)])
    merge_shards(tmp_path, 30)
    batches = list(scan_run(tmp_path, ("seed", "index")))
    assert max(batch.num_rows for batch in batches) <= 4
    assert [place for batch in batches for place in batch["index"].to_pylist()] == list(range(30))
    assert batches[0].schema.names == ["seed", "index"]
    groups = pq.ParquetFile(tmp_path / "records.parquet").metadata
    assert max(groups.row_group(i).num_rows for i in range(groups.num_row_groups)) <= 6


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    records.write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        records.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no records"):
        read_run(tmp_path)
    path = tmp_path / "records.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"records\.parquet: cannot be read"):
        read_run(tmp_path)
    pq.write_table(pa.table({"prompt": ["x"]}), path)
    with pytest.raises(ValueError, match="lacks the columns family"):
        read_run(tmp_path)
    older = SCHEMA.set(
        SCHEMA.get_field_index("attempts"), pa.field("attempts", pa.list_(pa.struct({"score": pa.float64()})))
    )
    pq.write_table(older.empty_table(), path)
    with pytest.raises(
        ValueError, match="lacks the columns attempts, or has others; it was not written by this version"
    ):
        read_run(tmp_path)
