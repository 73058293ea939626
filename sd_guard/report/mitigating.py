"""What each mitigation cost, and what it brought."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sd_guard.report.charts import Axis, axis_of
from sd_guard.report.rows import RunRows
from sd_guard.report.texts import PromptText, Texts
from sd_guard.screening.records import Row

MAX_ARROWS: Final = 24
_FIELDS: Final = ("mitigation", "passed", "score", "resemblance")  # of an attempt


@dataclass(frozen=True, slots=True)
class Mitigated:
    """All attempts with one mitigation.

    Attributes:
        name: Of the mitigation.
        attempts: How many.
        passed: How many of them passed.
        before: Median score of the images before any mitigation.
        after: Median score after an attempt.
        resemblance: Median resemblance of an attempt to the flagged picture, [-1, 1].
        lanes: Mean extra lanes, of all attempts together, of the images that this mitigation rescued; NaN if none.
    """

    name: str
    attempts: int
    passed: int
    before: float
    after: float
    resemblance: float
    lanes: float


@dataclass(frozen=True, slots=True)
class Arrow:
    """One image from its score before to those of its attempts; `between` is all of these but the last."""

    row: Row
    prompt: PromptText
    before: float
    between: tuple[float, ...]
    after: float
    resemblance: float


@dataclass(frozen=True, slots=True)
class ArrowChart:
    """Arrows over one axis, with a line at the threshold."""

    axis: Axis
    arrows: tuple[Arrow, ...]
    line: float | None


def mitigations(rows: RunRows) -> list[Mitigated]:
    """A line a mitigation, in the order of first use; medians leave out what is not finite."""
    flagged = np.flatnonzero(rows.flagged)
    each: list[dict[str, Any]] = []
    start = 0
    for batch in rows.batches(flagged, ["attempts"]):
        places = flagged[start : start + batch.num_rows]
        start += batch.num_rows
        parents = batch.column("attempts").value_parent_indices().to_numpy()
        fields = batch.column("attempts").flatten()
        each.append({"place": places[parents]} | {n: fields.field(n).to_numpy(zero_copy_only=False) for n in _FIELDS})
    if not each:
        return []
    places, names, passed, after, resemblance = (
        np.concatenate([part[name] for part in each]) for name in ("place", *_FIELDS)
    )
    before, lanes, passed = rows.scores[places], rows.lanes[places], passed.astype(bool)
    found: list[Mitigated] = []
    for name in dict.fromkeys(names.tolist()):
        own = names == name
        found.append(
            Mitigated(
                name=name,
                attempts=int(own.sum()),
                passed=int((own & passed).sum()),
                before=_median(before[own]),
                after=_median(after[own]),
                resemblance=_median(resemblance[own]),
                lanes=float(lanes[own & passed].mean()) if (own & passed).any() else math.nan,
            )
        )
    return found


def arrow_chart(rows: Sequence[Row], threshold: float | None, texts: Texts) -> ArrowChart | None:
    """The first of the rows that have scored attempts; None if there are none.

    Args:
        rows: Most suspicious first.
        threshold: Scores above it are flagged.
        texts: Of the page.
    """
    arrows: list[Arrow] = []
    for row in rows:
        scores = [attempt["score"] for attempt in row["attempts"] if _is_finite(attempt["score"])]
        before = row["score"]
        if scores and before is not None and math.isfinite(before) and len(arrows) < MAX_ARROWS:
            last = row["attempts"][-1]
            arrows.append(
                Arrow(row, texts.get(row["prompt"]), before, tuple(scores[:-1]), scores[-1], last["resemblance"])
            )
    if not arrows:
        return None
    line = threshold if _is_finite(threshold) else None
    values = [value for arrow in arrows for value in (arrow.before, *arrow.between, arrow.after)]
    return ArrowChart(axis_of(values if line is None else [*values, line]), tuple(arrows), line)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _median(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan
