"""The command: bad input is one line before anything is built; the smoke run on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import the_error

from sd_guard.bench import run
from sd_guard.bench.results import revision
from sd_guard.bench.settings import BATCHES
from sd_guard.cli import main
from sd_guard.screening import loading

OVERHEAD = ["bench", "--suite", "overhead"]
BAD = [
    (["bench"], "Missing option '--suite'"),
    (["bench", "--suite", "speed"], "Invalid value for '--suite'"),
    ([*OVERHEAD, "--arch", "sdxl"], "Invalid value for '--arch'"),
    ([*OVERHEAD, "--arch", "sd15", "--device", "cpu"], "--arch sd15 is for a CUDA device"),
    ([*OVERHEAD, "--dtype", "int8"], "--dtype is 'int8'"),
    ([*OVERHEAD, "--batch", "4,0"], "--batch is '4,0'"),
    ([*OVERHEAD, "--steps", "1"], "--steps is 1"),
    ([*OVERHEAD, "--repeats", "0"], "--repeats is 0"),
    ([*OVERHEAD, "--warmup", "-1"], "--warmup is -1"),
    ([*OVERHEAD, "--device", "tpu"], "--device is 'tpu'"),
    ([*OVERHEAD, "--out", "none/x.jsonl"], "--out none/x.jsonl: is a folder, or in none that is there"),
    ([*OVERHEAD, "--profile", "none"], "--profile none: no such folder"),
    (["bench", "--suite", "trace", "--kernel", "sdpa"], "--kernel: the suite trace has its own"),
    ([*OVERHEAD, "--kernel", "sdpa,flash"], "--kernel is 'flash'; use one or more of matmul, sdpa"),
    (["bench", "--suite", "trace", "--guard", "once"], "--guard: the suite trace has its own"),
    ([*OVERHEAD, "--guard", "none,twice"], "--guard is 'twice'; use one or more of none, once, all"),
    ([*OVERHEAD, "--seconds", "0"], "--seconds is 0.0; use a number above 0"),
    ([*OVERHEAD, "--seconds", "nan"], "--seconds is nan; use a number above 0"),
    ([*OVERHEAD, "--kernel", "compiled"], "--kernel compiled: needs --compile"),
    (["bench", "--suite", "trace", "--compile"], "--compile: the suite trace differentiates"),
    (["bench", "--suite", "peers", "--batch", "2"], "--batch: the suite peers looks at one prompt"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_arguments_are_one_line_and_exit_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "build_pipeline", lambda *_: pytest.fail("a model was built"))
    assert main(arguments) == 2
    assert message in the_error(capsys)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loading.shutil, "which", lambda _: None)
    for arguments, message in (
        (["--arch", "sd21"], "--arch sd21 is for a CUDA device"),
        (["--compile"], "--compile needs a C++ compiler"),
    ):
        assert main([*OVERHEAD, *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_device_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*OVERHEAD, "--device", "cuda"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --device cuda cannot be used (")
    assert err.count("\n") == 1


def test_the_smoke_run_on_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.jsonl"
    out.write_text('{"earlier": 1}\n')
    options = ["--batch", "1", "--steps", "2", "--repeats", "2", "--warmup", "0", "--device", "cpu"]
    assert main([*OVERHEAD, "--arch", "reference", *options, "--out", str(out)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert ['{"earlier": 1}', *shown] == out.read_text().splitlines()
    lines = [json.loads(line) for line in shown]
    assert [line["case"].split(",")[0] for line in lines] == ["matmul"] * 4 + ["sdpa"] * 4 + ["absent"] * 4
    for line in lines:
        lower, upper = line["seconds_quartiles"]
        assert 0 < lower <= line["seconds"] <= upper
        assert (line["arch"], line["dtype"], line["batch"], line["repeats"]) == ("reference", "float32", 1, 2)
        assert line["ceiling_share"] == pytest.approx(line["flops"] / line["seconds"] / line["ceiling_flops"])
        assert line["peak_mib"] is None
        assert line["provenance"]["versions"]["torch"] == torch.__version__
        assert line["provenance"]["git"] == revision()


def test_a_case_that_could_not_be_measured_is_an_error_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"case": "a", "failed": None}, {"case": "b", "failed": "RuntimeError: no"}]
    monkeypatch.setattr(run, "run_bench", lambda *_: iter(lines))
    assert main([*OVERHEAD, "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == lines
    assert err.startswith("error: 1 of 2 cases could not be measured")


def test_every_suite_has_batch_sizes_of_its_own() -> None:
    assert set(run.SUITES) == set(BATCHES)


def test_a_package_outside_of_a_checkout_has_no_revision(tmp_path: Path) -> None:
    (tmp_path / "sd_guard").mkdir()
    assert revision(tmp_path / "sd_guard") == "unknown"
