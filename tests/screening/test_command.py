"""`sd-guard screen` with a screener that only pretends: where it reads, where it writes, and what it says."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from screening.fakes import Pretender
from tiny import the_error

from benchmarks.null_runs import NullScreener, null_settings
from sd_guard.cli import main
from sd_guard.screening import loading, prompts, settings
from sd_guard.screening.records import read_run
from sd_guard.screening.storage import Store


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    null_settings(tmp_path, ["Café", "b", "CAFE\u0301", "a rather long prompt"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_screener", lambda asked: NullScreener())
    return tmp_path


def command(*more: str, prompts: str = "prompts.csv", out: str = "run") -> list[str]:
    return ["screen", prompts, "--out", out, "--model", "model", *more]


def test_a_run_ends_with_a_table_a_report_and_no_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command()) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-2].split() == ["total", "4", "0", "0", "0", "0", "1.0"]
    assert out.splitlines()[-1] == "report: run/report.html"
    assert err.splitlines() == [line for line in err.splitlines() if line.startswith("screening: 4 of 4 images")]


def test_whoever_reads_the_table_may_end_first(folder: Path) -> None:
    """As `sd-guard screen ... | head -1` does: the run is whole, and its page there."""
    script = (
        "import sys; from sd_guard.screening import loading; from benchmarks.null_runs import NullScreener; "
        "loading.load_screener = lambda asked: NullScreener(); "
        "from sd_guard.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    search = os.pathsep.join(map(str, (Path(__file__).parents[2], Path(__file__).parents[1])))
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", script, *command()],
        env=os.environ | {"PYTHONPATH": search},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.returncode == 1
    assert not any(word in done.stderr for word in ("error", "Traceback", "Exception"))
    assert {"records.parquet", "report.html"} <= set(Store.at("run").names())


def test_a_second_run_in_the_same_folder_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the first moment on, before there is more than a list of jobs."""
    begin = "from sd_guard.screening.storage import Store; lock = Store.at('run').lock(); print(flush=True); input()"
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    search = {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", begin], env=os.environ | search, **options) as other:
        assert other.stdout.readline() == "\n"
        assert main(command()) == 2
        assert "error: run: another run is at work there; wait for its end" in capsys.readouterr().err
        assert Store.at("run").names() == []
        other.communicate("\n")
    assert main(command()) == 0


def test_an_address_is_written_to_resumed_and_never_half_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"memory://{folder.name}/run"
    assert main(command("--fold-duplicates", out=address)) == 0
    assert f"report: {address}/report.html" in capsys.readouterr().out
    store = Store.at(address)
    assert store.names() == ["duplicates.parquet", "jobs.parquet", "records.parquet", "report.html", "run.json"]
    assert [row["prompt"] for row in read_run(store)] == ["Café", "b", "a rather long prompt"]
    with fsspec.open(f"{address}/records.parquet") as file:
        assert pq.read_table(file).num_rows == 3
    assert main(command("--fold-duplicates", out=address)) == 2
    assert "is not empty; add --resume" in capsys.readouterr().err
    assert main(command("--fold-duplicates", "--resume", out=address)) == 0
    assert main(command("--resume", out=address)) == 2
    assert "fold_duplicates was True, now False" in capsys.readouterr().err


def test_images_go_to_an_address_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_screener", Pretender().screener)
    assert main(command(out=f"memory://{folder.name}/images-run")) == 0
    store = Store.at(f"memory://{folder.name}/images-run")
    for row in read_run(store):
        assert row["image"] is not None
        assert store.read(row["image"]).startswith(b"\x89PNG")
    assert store.read("report.html").count(b'src="data:image/png') == len(read_run(store))


def test_pages_are_made_of_addresses_and_written_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (f"memory://{folder.name}/{name}" for name in ("first", "second"))
    assert main(command(out=a)) == main(command(out=b)) == 0
    Store.at(a).remove("report.html")
    assert main(["report", a]) == 0
    assert Store.at(a).read("report.html").startswith(b"<!doctype html>")
    assert main(["compare", a, b]) == 0
    assert f"page: {b}/compare.html" in capsys.readouterr().out
    assert Store.at(b).exists("compare.html")
    assert main(["compare", a, f"{a}/"]) == 1
    assert "is the same run twice" in capsys.readouterr().err
    assert main(["report", f"memory://{folder.name}/none"]) == 1
    assert "has no run.json" in capsys.readouterr().err


def test_duplicates_are_screened_once_and_say_which_row_stands_for_them(folder: Path) -> None:
    assert main(command("--fold-duplicates", "--seeds", "2")) == 0
    rows = read_run(folder / "run")
    assert [(row["prompt"], row["seed"]) for row in rows][:2] == [("Café", 0), ("Café", 1)]
    assert len(rows) == 6
    (twin,) = pq.read_table(folder / "run" / "duplicates.parquet").to_pylist()
    assert (twin["prompt"], twin["index"]) == ("CAFE\u0301", 0)


def test_standard_input_is_a_list(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(b'{"prompt": "one"}\n{"prompt": "two"}\n')

    prompts._spool.cache_clear()
    monkeypatch.setattr(prompts.sys, "stdin", Stdin)
    assert main(command("--format", "jsonl", prompts="-")) == 0
    prompts._spool.cache_clear()
    assert [row["prompt"] for row in read_run(folder / "run")] == ["one", "two"]
    assert json.loads((folder / "run" / "run.json").read_text())["prompts"] == "standard input"


def test_metrics_are_there_at_the_end(folder: Path) -> None:
    assert main(command("--metrics-file", "metrics.prom")) == 0
    assert "sd_guard_images_done 4.0" in (folder / "metrics.prom").read_text()


def test_skipped_rows_are_told_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "prompts.csv").write_text("prompt\na\n \nb\n")
    assert main(command()) == 2
    assert "prompts.csv, line 3: the prompt is empty" in capsys.readouterr().err
    assert main(command("--skip-bad")) == 0
    assert "warning: rows of the list that were left out: 1; see run/skipped.txt" in capsys.readouterr().err


def test_a_run_without_a_score_fails(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "prompts.csv").write_text("prompt\nbroken\n")
    monkeypatch.setattr(loading, "load_screener", Pretender().screener)
    assert main(command()) == 1
    assert "warning: 1 images are unscored (RuntimeError x 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "options", "message"),
    [
        ("ray", ["--engine", "ray"], "ray is not installed; pip install 'sd-guard[ray]'"),
        ("prometheus_client", ["--metrics-file", "x"], "is not installed; pip install 'sd-guard[metrics]'"),
    ],
)
def test_a_missing_extra_is_named(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    options: list[str],
    message: str,
) -> None:
    real: Any = settings.find_spec
    monkeypatch.setattr(settings, "find_spec", lambda name: None if name == package else real(name))
    assert main(command(*options)) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "run").exists()


def test_compiling_is_for_quick_depth_and_needs_a_compiler(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("--compile")) == 2
    assert "--compile: at --depth full calls have many shapes; use --depth quick" in the_error(capsys)
    monkeypatch.setattr(loading.shutil, "which", lambda _: None)
    assert main(command("--compile", "--depth", "quick", "--device", "cpu")) == 2
    assert "--compile needs a C++ compiler" in the_error(capsys)
    assert not (folder / "run").exists()
    monkeypatch.setattr(loading.shutil, "which", lambda _: "/usr/bin/g++")
    assert main(command("--compile", "--depth", "quick", "--device", "cpu")) == 0
    assert main(command("--depth", "quick", "--device", "cpu", "--resume")) == 0  # it decides no record
