"""Charts count every value, and stay inside."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sd_guard.report.charts import axis_of, histogram_chart, step_line


@given(
    values=st.lists(st.tuples(st.floats(-1e6, 1e6), st.booleans()), min_size=1, max_size=30),
    line=st.none() | st.floats(-1e6, 1e6),
)
def test_histograms_stay_inside_and_count_every_value(values: list[tuple[float, bool]], line: float | None) -> None:
    chart = histogram_chart({"f": ([v for v, _ in values], [m for _, m in values])}, line)
    assert chart is not None
    (histogram,) = chart.histograms
    assert sum(bar.marked for bar in histogram.bars) == sum(marked for _, marked in values) == histogram.marked
    assert sum(bar.plain + bar.marked for bar in histogram.bars) == len(values)
    assert histogram.peak == max(bar.plain + bar.marked for bar in histogram.bars)
    for bar in histogram.bars:
        assert -1e-6 <= bar.left <= bar.left + bar.width <= 100 + 1e-6
    if line is not None:
        assert -1e-6 <= chart.axis.place(line) <= 100 + 1e-6


def test_values_on_either_side_of_the_line_share_no_bar() -> None:
    chart = histogram_chart({"f": ([0.2499, 0.2501, 1.0], [False, True, True])}, 0.25)
    assert chart is not None
    assert all(not (bar.plain and bar.marked) for bar in chart.histograms[0].bars)


def test_what_is_not_finite_is_not_drawn() -> None:
    assert histogram_chart({"f": ([math.nan, math.inf], [False, True]), "g": ([], [])}) is None
    chart = histogram_chart({"f": ([math.nan], [False]), "g": ([1.0, math.nan], [True, True])}, math.nan)
    assert chart is not None
    assert [(each.name, each.values, each.marked) for each in chart.histograms] == [("g", 1, 1)]
    assert chart.line is None


@given(values=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=5))
@example(values=[7.0, -5e-324])
def test_an_axis_holds_its_values_between_few_ticks(values: list[float]) -> None:
    axis = axis_of(values)
    assert axis.low <= min(values) <= max(values) < axis.high
    assert 2 <= len(axis.ticks) <= 9
    assert axis.ticks[0] == pytest.approx(axis.low) and axis.ticks[-1] == pytest.approx(axis.high)


def test_a_line_by_step_is_placed_on_its_band() -> None:
    band = {1: (0.0, 0.5), 3: (0.25, 0.5)}
    line = step_line("d", {3: 1.0, 1: 0.0, 2: math.nan}, band, (0.0, 1.0))
    assert line is not None
    assert line.values == ((1, 0.0), (3, 1.0))
    assert line.points == "0.0,100.0 100.0,0.0"
    assert line.band == "0.0,50.0 100.0,50.0 100.0,75.0 0.0,100.0"
    assert line.ordinary == (0.25, 0.5)
    assert step_line("d", {1: 0.0, 2: math.nan}, band, (0.0, 1.0)) is None
