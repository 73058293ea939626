"""A run's rows as a report needs them: a few columns of all rows, and all columns of the few that are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sd_guard.screening.records import SCHEMA, Row, scan_run
from sd_guard.screening.storage import Store

NO_FAMILY: Final = "-"
_FEW: Final = ("prompt", "family", "seed", "score", "flagged", "outcome", "extra_lanes")
Places: TypeAlias = NDArray[np.int64]  # of rows in a run, from 0 in the order of their index
Scan: TypeAlias = Callable[[Sequence[str] | None], Iterable[Any]]  # columns (None: all) to record batches, in order


@dataclass(frozen=True, slots=True)
class RunRows:
    """Rows in the order of their index.

    Attributes:
        prompts: One a row.
        families: Likewise; "-" where the list had none.
        seeds: (N).
        scores: (N), NaN where there is none.
        flagged: (N) bool.
        outcomes: (N) strings.
        lanes: (N) extra lanes.
        scan: Reads columns of all rows again, a batch at a time.
    """

    prompts: list[str]
    families: list[str]
    seeds: NDArray[np.int64]
    scores: NDArray[np.float64]
    flagged: NDArray[np.bool_]
    outcomes: NDArray[np.str_]
    lanes: NDArray[np.int64]
    scan: Scan

    def __len__(self) -> int:
        """How many."""
        return len(self.prompts)

    def ranked(self) -> Places:
        """All places, most suspicious first: flagged, then without a score, then the rest; each by falling score."""
        group = np.where(self.flagged, 0, np.where(self.outcomes == "unscored", 1, 2))
        return np.lexsort((-np.nan_to_num(self.scores, nan=-np.inf, neginf=-np.inf, posinf=np.inf), group))

    def full(self, places: Places) -> dict[int, Row]:
        """All columns of some rows, by place."""
        rows = (row for batch in self.batches(places) for row in cast("list[Row]", batch.to_pylist()))
        return dict(zip(np.unique(places).tolist(), rows, strict=True))

    def batches(self, places: Places, columns: Sequence[str] | None = None) -> Iterable[Any]:
        """Some columns (None: all) of some rows, as record batches in the order of places, each place once."""
        wanted = np.unique(places)
        start = 0
        for batch in self.scan(columns):
            inside = wanted[(wanted >= start) & (wanted < start + batch.num_rows)]
            if len(inside):
                yield batch.take(pa.array(inside - start))
            start += batch.num_rows

    def by_family(self) -> dict[str, Places]:
        """The places of each family, in order of appearance."""
        if not len(self):
            return {}
        order = {family: code for code, family in enumerate(dict.fromkeys(self.families))}
        codes = np.fromiter((order[family] for family in self.families), dtype=np.int64, count=len(self))
        ends = np.cumsum(np.bincount(codes, minlength=len(order)))
        return dict(zip(order, np.split(np.argsort(codes, kind="stable"), ends[:-1]), strict=True))


def open_rows(run: Path | str | Store) -> RunRows:
    """Opens a run folder, finished or not.

    Raises:
        ValueError: If the folder holds no records, or a file of it is damaged.
    """
    return _rows(partial(scan_run, Store.at(run)))


def rows_of(rows: Sequence[Mapping[str, Any]]) -> RunRows:
    """The same of rows in memory; columns that `SCHEMA` does not know are kept."""
    others = [name for name in (rows[0] if rows else ()) if name not in SCHEMA.names]
    known = [pa.array([row[field.name] for row in rows], field.type) for field in SCHEMA]
    unknown = [pa.array([row.get(name) for row in rows]) for name in others]
    table = pa.table([*known, *unknown], names=[*SCHEMA.names, *others])
    return _rows(lambda columns: table.select(list(columns or table.column_names)).to_batches())


def _rows(scan: Scan) -> RunRows:
    batches = list(scan(_FEW))
    few = pa.schema([SCHEMA.field(name) for name in _FEW])
    table = pa.Table.from_batches(batches) if batches else few.empty_table()
    column = {name: table.column(name) for name in _FEW}
    return RunRows(
        prompts=column["prompt"].to_pylist(),
        families=[family or NO_FAMILY for family in column["family"].to_pylist()],
        seeds=column["seed"].to_numpy(),
        scores=column["score"].to_numpy().astype(np.float64),
        flagged=column["flagged"].to_numpy().astype(bool),
        outcomes=np.array(column["outcome"].to_pylist(), dtype=np.str_),
        lanes=column["extra_lanes"].to_numpy().astype(np.int64),
        scan=scan,
    )
