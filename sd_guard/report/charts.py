"""Score histograms as plain numbers, which the template draws as SVG that follows the page's colours and width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sd_guard.screening.records import Row

BINS: Final = 48
MAX_FAMILIES: Final = 12


@dataclass(frozen=True, slots=True)
class Bar:
    """A bin of a histogram; all numbers in percent of the chart's width or height."""

    left: float
    width: float
    passed: float
    flagged: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Scores of one family; `peak` is the count of its highest bin, which fills the height."""

    family: str
    images: int
    flagged: int
    peak: int
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class ScoreChart:
    """Histograms over one score axis.

    Attributes:
        histograms: One a family, in order of appearance.
        ticks: Place on the axis in percent, and label.
        line: Place of the threshold on the axis in percent, or None if it is unknown.
        line_at: The threshold.
    """

    histograms: tuple[Histogram, ...]
    ticks: tuple[tuple[float, str], ...]
    line: float | None
    line_at: float | None


def score_chart(families: Mapping[str, Sequence[Row]], threshold: float | None) -> ScoreChart | None:
    """Bins the finite scores by family; None if there are none.

    A bin begins at the threshold, so that no bar straddles it. Beyond 12 families, the smallest share a histogram.
    """
    scored = {
        family: [(row["score"], row["flagged"]) for row in rows if row["score"] is not None and _finite(row["score"])]
        for family, rows in _largest(families).items()
    }
    line = threshold if _finite(threshold) else None
    values = [score for members in scored.values() for score, _ in members]
    if not values:
        return None
    low, high, ticks = _axis([*values, *([] if line is None else [line])])
    return ScoreChart(
        histograms=tuple(_histogram(family, members, low, high, line) for family, members in scored.items() if members),
        ticks=tuple((100 * (tick - low) / (high - low), f"{tick:g}") for tick in ticks),
        line=None if line is None else 100 * (line - low) / (high - low),
        line_at=line,
    )


def _finite(score: float | None) -> bool:
    return score is not None and math.isfinite(score)


def _largest(families: Mapping[str, Sequence[Row]]) -> dict[str, Sequence[Row]]:
    if len(families) <= MAX_FAMILIES:
        return dict(families)
    ranked = sorted(families, key=lambda family: -len(families[family]))
    kept = set(ranked[: MAX_FAMILIES - 1])
    others = [row for family in ranked[MAX_FAMILIES - 1 :] for row in families[family]]
    shown = {family: rows for family, rows in families.items() if family in kept}
    return {**shown, f"{len(families) - len(kept)} other families": others}


def _axis(scores: Sequence[float]) -> tuple[float, float, list[float]]:
    """Limits at round numbers, and four to eight ticks from one to the other."""
    low, high = min(scores), max(scores)
    # No narrower than a float64 can be cut into bins.
    span = max(high - low or abs(high) or 1.0, 1e-9 * max(abs(low), abs(high)), 1e-9)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 6)
    first, last = math.floor(low / step), math.floor(high / step) + 1
    return first * step, last * step, [round(step * i, 12) for i in range(first, last + 1)]


def _histogram(
    family: str, members: Sequence[tuple[float, bool]], low: float, high: float, line: float | None
) -> Histogram:
    width = (high - low) / BINS
    start = low if line is None else line - math.ceil((line - low) / width) * width
    counts = [[0, 0] for _ in range(BINS + 1)]
    for score, flagged in members:
        counts[max(0, min(int((score - start) / width), BINS))][flagged] += 1
    peak = max(sum(pair) for pair in counts)
    bars: list[Bar] = []
    for place, (passed, flagged) in enumerate(counts):
        left, right = max(low, start + place * width), min(high, start + (place + 1) * width)
        if passed or flagged:
            share = 100 / (high - low)
            bars.append(
                Bar(
                    left=(left - low) * share,
                    width=(right - left) * share,
                    passed=100 * passed / peak,
                    flagged=100 * flagged / peak,
                )
            )
    return Histogram(
        family=family, images=len(members), flagged=sum(flag for _, flag in members), peak=peak, bars=tuple(bars)
    )
