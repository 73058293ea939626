"""Charts as plain numbers, which the templates draw as SVG that follows the page's colours, width and screen readers.

No chart library: what is drawn are a few dozen bars and lines of numbers that are binned here. altair's own scripts are
0.9 MB a page and need `unsafe-eval` or an interpreter; its SVG (vl-convert, 100 MB installed) has a fixed width and
colours of its own, and matplotlib's has style attributes, which a strict policy refuses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS: Final = 48
MAX_FAMILIES: Final = 12


@dataclass(frozen=True, slots=True)
class Axis:
    """A horizontal axis with ticks at round numbers."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Where a value is, in percent of the width."""
        return 100 * (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class Bar:
    """A bin of a histogram, from `low` to `high`; `left` and `width` in percent, `plain` and `marked` are counts."""

    left: float
    width: float
    low: float
    high: float
    plain: int
    marked: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """Values of one group; `peak` is the count of its highest bin, which fills the height."""

    name: str
    values: int
    marked: int
    peak: int
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class HistogramChart:
    """Histograms over one axis.

    Attributes:
        axis: Of them all.
        histograms: One a group.
        line: A value to draw a line at, or None.
    """

    axis: Axis
    histograms: tuple[Histogram, ...]
    line: float | None


def histogram_chart(
    groups: Mapping[str, tuple[ArrayLike, ArrayLike]], line: float | None = None
) -> HistogramChart | None:
    """Bins the finite values of each group; None if there are none.

    A bin begins at the line, so that no bar straddles it.

    Args:
        groups: Name to values, and which of them are marked (bool), both of shape (N).
        line: Such as the threshold; one that is not finite is none.
    """
    finite = {name: _finite(*members) for name, members in groups.items()}
    finite = {name: members for name, members in finite.items() if len(members[0])}
    if not finite:
        return None
    line = line if line is not None and math.isfinite(line) else None
    ends = [end for values, _ in finite.values() for end in (float(values.min()), float(values.max()))]
    axis = axis_of(ends if line is None else [*ends, line])
    histograms = tuple(_histogram(name, *members, axis, line) for name, members in finite.items())
    return HistogramChart(axis=axis, histograms=histograms, line=line)


def axis_of(values: Sequence[float]) -> Axis:
    """An axis that holds finite values, with three to eight ticks from one end to the other."""
    low, high = min(values), max(values)
    # No narrower than a float64 can be cut into bins.
    span = max(high - low or abs(high) or 1.0, 1e-9 * max(abs(low), abs(high)), 1e-9)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 6)
    first, last = math.floor(low / step), math.floor(high / step) + 1
    ticks = tuple(round(step * i, 12) for i in range(first, last + 1))
    return Axis(low=min(first * step, low), high=last * step, ticks=ticks)  # a value may be too little to be divided


def _finite(values: ArrayLike, marked: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    numbers = np.asarray(values, dtype=np.float64)
    kept = np.isfinite(numbers)
    return numbers[kept], np.asarray(marked, dtype=bool)[kept]


def _histogram(
    name: str, values: NDArray[np.float64], marked: NDArray[np.bool_], axis: Axis, line: float | None
) -> Histogram:
    width = (axis.high - axis.low) / BINS
    start = axis.low if line is None else line - math.ceil((line - axis.low) / width) * width
    bins = np.clip(((values - start) / width).astype(np.int64), 0, BINS)
    plain, hit = (np.bincount(bins[chosen], minlength=BINS + 1) for chosen in (~marked, marked))
    bars: list[Bar] = []
    for place in np.flatnonzero(plain + hit).tolist():
        low, high = max(axis.low, start + place * width), min(axis.high, start + (place + 1) * width)
        bars.append(
            Bar(
                left=axis.place(low),
                width=axis.place(high) - axis.place(low),
                low=low,
                high=high,
                plain=int(plain[place]),
                marked=int(hit[place]),
            )
        )
    return Histogram(
        name=name, values=len(values), marked=int(marked.sum()), peak=int((plain + hit).max()), bars=tuple(bars)
    )


@dataclass(frozen=True, slots=True)
class StepLine:
    """One statistic of one image by step, against the band of ordinary images.

    Attributes:
        name: Of the statistic.
        values: Step (from 0) and value, in the order of steps; at least two.
        points: Of the line, "x,y" in percent of width and height.
        band: Of the ordinary images' 10th to 90th percentile, as a closed outline; empty if there are none.
        ordinary: That band at the last step, or None.
    """

    name: str
    values: tuple[tuple[int, float], ...]
    points: str
    band: str
    ordinary: tuple[float, float] | None


Band = Mapping[int, tuple[float, float]]  # step to 10th and 90th percentile


def step_line(name: str, values: Mapping[int, float], band: Band, limits: tuple[float, float]) -> StepLine | None:
    """Places an image's finite values, and the band at the same steps; None for fewer than two.

    Args:
        name: Of the statistic.
        values: Step to value.
        band: Of ordinary images.
        limits: Lowest and highest value of the chart, the same for all images.
    """
    steps = sorted(step for step, value in values.items() if math.isfinite(value))
    if len(steps) < 2:
        return None
    low, span = limits[0], (limits[1] - limits[0]) or 1.0

    def point(step: int, value: float) -> str:
        height = min(max((value - low) / span, 0.0), 1.0)
        return f"{100 * (step - steps[0]) / (steps[-1] - steps[0]):.1f},{100 - 100 * height:.1f}"

    known = [step for step in steps if step in band]
    outline = [*(point(step, band[step][1]) for step in known), *(point(step, band[step][0]) for step in known[::-1])]
    return StepLine(
        name=name,
        values=tuple((step, values[step]) for step in steps),
        points=" ".join(point(step, values[step]) for step in steps),
        band=" ".join(outline) if len(known) > 1 else "",
        ordinary=band.get(steps[-1]),
    )
