"""`sd-guard compare` and `sd-guard report`: a short table, a page, and one line of what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from report.runs import flagged_row, make_run, row
from tiny import the_error

from sd_guard.cli import main


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_run(tmp_path / "a", [row(0), row(1)])
    make_run(tmp_path / "b", [row(0), flagged_row(1)])
    make_run(tmp_path / "other", [row(9)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_compare_prints_a_table_and_writes_a_page(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "a", "b"]) == 0
    out = capsys.readouterr().out
    assert "newly flagged              1\n" in out
    assert out.endswith("page: b/compare.html\n")
    assert "1 newly flagged, 0 no longer flagged" in (runs / "b" / "compare.html").read_text(encoding="utf-8")
    assert main(["compare", "a", "b", "--out", "x.html"]) == 0
    assert (runs / "x.html").exists()


@pytest.mark.parametrize("change", [{"threshold": "abc"}, {"versions": []}, {"prompts": 3}, {"configuration": None}])
@pytest.mark.parametrize("command", [["report", "b"], ["compare", "a", "b"]])
def test_a_damaged_manifest_is_one_line(
    runs: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], command: list[str]
) -> None:
    manifest = json.loads((runs / "b" / "run.json").read_text())
    (runs / "b" / "run.json").write_text(json.dumps(manifest | change))
    assert main(command) == 1
    assert "b/run.json: is not the run.json of a run; name another folder" in the_error(capsys)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a", "other"], 1, "a and other share no prompt with the same seed"),
        (["a", "a"], 1, "a: is the same run twice"),
        (["a", "none"], 1, "none: has no run.json"),
        (["a", "a/run.json"], 1, "a/run.json/run.json: cannot be read (Not a directory)"),
        (["a"], 2, "Missing argument 'run_b'"),
        (["a", "b", "--out", "x.txt"], 2, "x.txt: is no .html"),
        (["a", "b", "--out", "none/x.html"], 2, "none: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    runs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main(["compare", *arguments]) == code
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert not list(runs.rglob("*.html"))


def test_report_names_a_calibration_that_is_not_there(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "a/run.json"]) == 1
    assert "a/run.json/run.json: cannot be read (Not a directory)" in the_error(capsys)
    assert main(["report", "a", "--calibration", "none.json"]) == 1
    assert "none.json" in (err := capsys.readouterr().err) and err.count("\n") == 1
    assert main(["report", "a"]) == 0
    assert capsys.readouterr().out == "report: a/report.html\n"
