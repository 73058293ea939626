"""Two runs are joined by prompt and seed; what changed is counted, and shown as text."""

import re
from pathlib import Path

import pytest
from report.runs import HOSTILE, flagged_row, make_run, row, save_image

from sd_guard.report import compare
from sd_guard.report.compare import compare_runs, join, summary, write_comparison
from sd_guard.report.rows import rows_of
from sd_guard.screening.records import Row

A: list[Row] = [
    row(0, prompt="stays", score=0.0),
    row(1, prompt="rises", score=0.25),
    flagged_row(2, prompt="falls", score=1.0),
    flagged_row(3, prompt="is lost", score=2.0),
    row(4, prompt="two seeds", seed=0),
    row(5, prompt="two seeds", seed=1),
    row(6, prompt="only here"),
]
B: list[Row] = [
    row(0, prompt="is lost", outcome="unscored", score=None),
    row(1, prompt="falls", score=-1.0),
    flagged_row(2, prompt="rises", score=0.75),
    row(3, prompt="stays", score=0.0),
    row(4, prompt="two seeds", seed=1, score=0.5),
    row(5, prompt="stays", score=7.0),
    row(6, prompt="only there", score=3.0),
]


def test_what_changed_is_counted() -> None:
    found = join(rows_of(A), rows_of(B), names=("a", "b"))
    joined = [(A[a]["prompt"], A[a]["seed"], b) for a, b in zip(found.in_a, found.in_b, strict=True)]
    assert joined == [("stays", 0, 3), ("rises", 0, 2), ("falls", 0, 1), ("is lost", 0, 0), ("two seeds", 1, 4)]
    assert found.newly_flagged.tolist() == [False, True, False, False, False]
    assert found.no_longer_flagged.tolist() == [False, False, True, False, False]
    assert found.no_longer_scored.tolist() == [False, False, False, True, False]
    assert found.shift.tolist()[:3] == [0.0, 0.5, -2.0]
    assert found.only_a.tolist() == [4, 6] and found.only_b.tolist() == [6]


def test_the_table_says_so() -> None:
    text = summary(join(rows_of(A), rows_of(B), names=("a", "b")))
    counts = dict(re.findall(r"^([a-z ]+?)  +(\d+)$", text, flags=re.MULTILINE))
    assert counts == {
        "images in both": "5",
        "newly flagged": "1",
        "no longer flagged": "1",
        "no longer scored": "1",
        "only in the first": "2",
        "only in the second": "1",
    }
    assert "score shift: median 0.247" in text


def test_the_page_shows_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "MAX_SHOWN", 1)
    a, b = tmp_path / "a", tmp_path / "b"
    pictures = [save_image(a, "x.png"), save_image(b, "y.png")]
    make_run(a, [each | {"image": pictures[0]} for each in A])  # type: ignore[misc]
    make_run(b, [each | {"image": pictures[1]} for each in B], threshold=0.75, configuration={"steps": 20})  # type: ignore[misc]
    html = Path(write_comparison(compare_runs(a, b), a, b, tmp_path / "c.html")).read_text(encoding="utf-8")
    assert "1 newly flagged, 1 no longer flagged" in html
    assert "0.500 in the first run, 0.750 in the second" in html
    assert '<tr><th scope="row">steps</th><td>50</td><td>20</td></tr>' in html
    headings = re.findall(r"<h2 [^>]*>(.*?)</h2>", html)
    assert headings == [
        "Where scores went",
        "Newly flagged",
        "No longer flagged",
        "No longer scored",
        "Largest shifts",
        "Only in the first run",
        "Only in the second run",
        "What the runs were not made alike in",
    ]
    assert html.count("<img") == 8
    assert "The first 1 of 4." in html and "2 images; the 1 most suspicious" in html


def test_hostile_prompts_are_text(tmp_path: Path) -> None:
    rows = [flagged_row(i, prompt=text, family=text[:50]) for i, text in enumerate(HOSTILE)]
    other = [row(i, prompt=text) for i, text in enumerate(HOSTILE)]
    a, b = make_run(tmp_path / "a", rows), make_run(tmp_path / "b", other)
    html = Path(write_comparison(compare_runs(a, b), a, b, tmp_path / "c.html")).read_text(encoding="utf-8")
    assert html.count("<script") == html.count("<style") == 1
    assert "&lt;script&gt;alert(1)" in html and "onerror" in html and "<img" not in html
    assert not re.search(r"[\x00\x07\x1b]", html)


def test_runs_that_share_nothing_are_refused(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", [A[0]]), make_run(tmp_path / "b", [row(0, prompt="stays", seed=1)])
    with pytest.raises(ValueError, match="share no prompt with the same seed; compare two runs of one prompt list"):
        compare_runs(a, b)
    with pytest.raises(ValueError, match="the same run twice"):
        compare_runs(a, tmp_path / "b" / ".." / "a")
    with pytest.raises(ValueError, match=r"has no run\.json"):
        compare_runs(a, tmp_path)
