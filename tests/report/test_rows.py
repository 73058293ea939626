"""Rows are read in order, whatever the batches, and only those asked for."""

from pathlib import Path

import numpy as np
import pytest
from report.runs import flagged_row, make_run, row

from sd_guard.report.rows import open_rows, rows_of
from sd_guard.screening.records import Row

ROWS: list[Row] = [
    row(0, family=None),
    flagged_row(1, score=0.5),
    row(2, outcome="unscored", score=None, family="g"),
    flagged_row(3, score=2.0),
    row(4, score=9.0),
]


def test_a_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = open_rows(make_run(tmp_path, ROWS))
    assert len(rows) == 5
    assert rows.prompts == [each["prompt"] for each in ROWS]
    assert np.isnan(rows.scores[2]) and rows.scores[3] == 2.0
    assert rows.full(np.array([3, 1])) == {1: ROWS[1], 3: ROWS[3]}
    assert {family: places.tolist() for family, places in rows.by_family().items()} == {
        "-": [0],
        "f": [1, 3, 4],
        "g": [2],
    }
    with pytest.raises(ValueError, match="holds no records"):
        open_rows(tmp_path / "images")


def test_flagged_rows_rank_first_then_unscored_ones_each_by_falling_score() -> None:
    assert rows_of(ROWS).ranked().tolist() == [3, 1, 2, 4, 0]
    assert rows_of([]).ranked().tolist() == [] and rows_of([]).by_family() == {}


def test_batches_do_not_matter() -> None:
    rows = rows_of(ROWS)
    scan = rows.scan

    def in_pairs(columns: object) -> object:
        (batch,) = scan(columns)  # type: ignore[arg-type]
        return [batch.slice(start, 2) for start in range(0, 5, 2)]

    object.__setattr__(rows, "scan", in_pairs)
    places = np.array([4, 0, 3])
    assert rows.full(places) == {0: ROWS[0], 3: ROWS[3], 4: ROWS[4]}
    assert [batch.column("seed").to_pylist() for batch in rows.batches(places, ["seed"])] == [[0], [0], [0]]
