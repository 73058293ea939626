"""The GPU script: its parts are asked for as the command line wants it, and a limit of time costs no result."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from tiny import the_error

from benchmarks import gpu, memory
from sd_guard.bench.settings import BenchSettings
from sd_guard.cli import main


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    return int(ended.value.code or 0)


def instead(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Each part runs this."""
    monkeypatch.setattr(gpu, "command", lambda *_, **__: [sys.executable, "-c", code])


@pytest.mark.parametrize("part", gpu.OPTIONS)
def test_what_a_part_asks_for_is_refused_on_the_cpu_for_its_size_alone(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = gpu.command(part, tmp_path, str(tmp_path), smoke=False)[3:]
    monkeypatch.setattr(sys, "argv", ["sd-guard", *options, "--device", "cpu"])
    if part == "error":  # of the bundled model: it would run
        assert "reference" in options
    else:
        assert main() == 2
        assert "--arch sd15 is for a CUDA device" in the_error(capsys)


@pytest.mark.parametrize("part", gpu.OPTIONS)
def test_a_smoke_run_is_of_the_reference_on_the_cpu(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[BenchSettings] = []
    monkeypatch.setattr("sd_guard.bench.run.plan_device", lambda settings: asked.append(settings))
    monkeypatch.setattr("sd_guard.bench.run.run_bench", lambda settings, device: [])
    monkeypatch.setattr(sys, "argv", ["sd-guard", *gpu.command(part, tmp_path, str(tmp_path), smoke=True)[3:]])
    assert main() == 0
    assert (asked[0].arch, asked[0].device, asked[0].steps) == ("reference", "cpu", 4)
    assert (asked[0].profile is not None) == (part == "waits")


@pytest.mark.parametrize("smoke", [False, True])
def test_what_gradients_take_is_a_line_beside_the_others(
    smoke: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[str, str]] = []
    monkeypatch.setattr(memory, "build_pipeline", lambda arch, device, dtype: built.append((arch, dtype)))
    monkeypatch.setattr(memory, "measure", lambda pipe, batch, device: {"batch": batch})
    monkeypatch.setattr(sys, "argv", ["memory", *gpu.command("memory", tmp_path, str(tmp_path), smoke=smoke)[3:]])
    (tmp_path / "gpu.jsonl").write_text('{"suite": "overhead"}\n')
    memory.main()
    assert built == [("reference", "float32") if smoke else ("sd15", "bfloat16")]
    line = json.loads((tmp_path / "gpu.jsonl").read_text().splitlines()[1])
    assert line["suite"] == "memory"
    assert line["provenance"]["git"]
    assert [found["batch"] for found in line["batches"]] == ([1] if smoke else [1, 4])


def test_a_part_that_meets_the_limit_keeps_its_results_and_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = json.dumps({"provenance": {"git": "unknown"}})
    (tmp_path / "gpu.jsonl").write_text(f'{line}\n{{"suite": "over')  # as a part leaves it that is killed
    instead(monkeypatch, "import time; time.sleep(60)")
    options = ["--out", str(tmp_path), "--only", "eager, screen", "--minutes", "0.03", "--revision", "abc"]
    assert run(monkeypatch, *options) == 1
    lines = [json.loads(text) for text in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["provenance"]["git"] for line in lines] == ["abc"]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("eager: ended after 2 s")
    assert said[1].startswith("screen: no time left")


def test_what_a_part_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = tmp_path / "late"
    child = f"import time; time.sleep(4); open({str(late)!r}, 'w')"
    instead(monkeypatch, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    assert gpu.run_part("peers", tmp_path, 2, smoke=True) == "ended after 2 s"
    time.sleep(4)
    assert not late.exists()


def test_a_package_that_is_missing_is_told_before_the_first_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sd_guard.cli", None)
    assert run(monkeypatch, "--out", str(tmp_path / "new")) == 2
    assert "sd_guard cannot be imported" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_part_that_fails_says_where_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instead(monkeypatch, "print('why'); raise SystemExit(3)")
    assert gpu.run_part("peers", tmp_path, 60, smoke=True) == f"failed, 3: {tmp_path / 'log.txt'}"
    assert gpu.run_part("screen", tmp_path, 60, smoke=True).startswith("failed, 3")
    assert (tmp_path / "log.txt").read_text() == "== peers\nwhy\n== screen\nwhy\n"


def test_a_part_finds_what_its_caller_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/tmp/site")  # where wheels were unpacked, say
    instead(monkeypatch, "import sys; print(sys.path)")
    assert gpu.run_part("peers", tmp_path, 60, smoke=True) == "done"
    assert str([str(gpu.ROOT), "/tmp/site"])[1:-1] in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("only", ["overhead", "", "peers,"])
def test_an_unknown_part_is_refused(
    only: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--out", str(tmp_path / "new"), "--only", only) == 2
    assert "use some of peers,screen" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
