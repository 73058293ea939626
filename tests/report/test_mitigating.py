"""What mitigation cost and brought, by hand."""

import math
from pathlib import Path

import pytest
from report.runs import attempt, flagged_row, make_run, row

from sd_guard.report.mitigating import arrow_chart, mitigations
from sd_guard.report.page import write_report
from sd_guard.report.rows import rows_of
from sd_guard.report.texts import Texts

FAILED = attempt(mitigation="other", score=0.75, resemblance=0.9, passed=False)
ROWS = [
    row(0, score=-3.0),
    flagged_row(1, score=1.0, extra_lanes=20, attempts=[FAILED, attempt(score=-0.5, resemblance=0.2)]),
    flagged_row(2, score=2.0, extra_lanes=40, attempts=[attempt(score=0.1, resemblance=0.4)]),
    flagged_row(3, score=3.0, extra_lanes=90, outcome="blocked", attempts=[FAILED | {"score": math.nan}]),
    row(4, flagged=True, outcome="flagged", score=5.0),
]


def test_each_mitigation_has_its_figures() -> None:
    other, ablation = mitigations(rows_of(ROWS))
    assert (ablation.name, ablation.attempts, ablation.passed, ablation.lanes) == ("word_ablation", 2, 2, 30.0)
    assert (ablation.before, ablation.after) == pytest.approx((1.5, -0.2))
    assert ablation.resemblance == pytest.approx(0.3)
    assert (other.name, other.attempts, other.passed, other.before, other.after) == ("other", 2, 0, 2.0, 0.75)
    assert math.isnan(other.lanes)


def test_an_arrow_goes_from_before_to_the_last_attempt() -> None:
    chart = arrow_chart(ROWS, 0.25, Texts())
    assert chart is not None
    assert [(each.before, each.between, each.after) for each in chart.arrows] == [
        (1.0, (0.75,), -0.5),
        (2.0, (), 0.1),
    ]
    assert chart.line == 0.25
    assert chart.axis.low <= -0.5 and chart.axis.high >= 2.0


def test_an_image_that_is_kept_though_nothing_passed_says_which_attempt_it_is_of(tmp_path: Path) -> None:
    tried = [FAILED | {"kept": False}, FAILED | {"kept": True, "mitigation": "nearest"}]
    for outcome, told in (("kept", 1), ("blocked", 0)):
        run = make_run(tmp_path / outcome, [flagged_row(0, outcome=outcome, attempts=tried)])
        html = Path(write_report(run)).read_text(encoding="utf-8")
        assert (html.count("not passed, kept"), html.count("given up")) == (told, 2 - told)
        assert ("nothing rescued was kept all the same, with the attempt that came nearest where" in html) == (
            outcome == "kept"
        )


def test_an_attempt_that_passed_and_did_not_last_is_not_shown_as_passed(tmp_path: Path) -> None:
    """It stood the looks; of the finished image the last comparison says otherwise."""
    for outcome in ("rescued", "kept", "blocked"):
        html = Path(write_report(make_run(tmp_path / outcome, [flagged_row(0, outcome=outcome)]))).read_text("utf-8")
        assert ("relapsed at the end" in html) == (outcome != "rescued")
        assert ("-0.500 passed" in html) == (outcome == "rescued")


def test_a_run_without_attempts_has_no_such_section(tmp_path: Path) -> None:
    assert mitigations(rows_of([ROWS[0], ROWS[4]])) == [] == mitigations(rows_of([]))
    assert arrow_chart([ROWS[0], ROWS[4]], 0.25, Texts()) is None
    html = Path(write_report(make_run(tmp_path / "with", ROWS))).read_text(encoding="utf-8")
    assert "What mitigation cost and brought" in html and "resemblance 0.400: rescued" in html
    html = Path(write_report(make_run(tmp_path / "without", [ROWS[0]]))).read_text(encoding="utf-8")
    assert "What mitigation cost and brought" not in html
