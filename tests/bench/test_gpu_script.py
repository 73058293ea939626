"""The GPU script: its parts are asked for as the command line wants it, and a limit of time costs no result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import gpu
from sd_guard.cli import app


@pytest.mark.parametrize("part", gpu.BENCH)
def test_what_a_part_asks_for_is_refused_on_the_cpu_for_its_size_alone(part: str, tmp_path: Path) -> None:
    options = gpu.command(part, tmp_path, smoke=False)[3:]
    result = CliRunner().invoke(app, [*options, "--device", "cpu"])
    assert result.exit_code == 2
    assert "--arch sd15 is for a CUDA device" in result.output


def test_smoke_asks_for_the_reference(tmp_path: Path) -> None:
    for part in gpu.BENCH:
        options = gpu.command(part, tmp_path, smoke=True)
        assert "--arch" not in options
        assert options.index("--suite") == options.index("bench") + 1
        assert ("--profile" in options) == ("--profile" in gpu.BENCH[part])


def test_a_part_that_meets_the_limit_keeps_its_results_and_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = json.dumps({"provenance": {"git": "unknown"}})
    slow = f"import time; open({str(tmp_path / 'gpu.jsonl')!r}, 'a').write({line + chr(10)!r}); time.sleep(60)"
    monkeypatch.setattr(gpu, "command", lambda part, out, smoke: [sys.executable, "-c", slow])
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--minutes", "0.05", "--revision", "abc"])
    gpu.main()
    lines = [json.loads(text) for text in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["provenance"]["git"] for line in lines] == ["abc"]


def test_a_part_that_fails_says_where_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu, "command", lambda part, out, smoke: [sys.executable, "-c", "print('why'); raise SystemExit(3)"]
    )
    how = gpu.run_part("peers", tmp_path, 30, smoke=True)
    assert how == f"failed, 3: {tmp_path / 'peers.txt'}"
    assert (tmp_path / "peers.txt").read_text() == "why\n"


def test_a_part_finds_what_its_caller_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/tmp/site")  # where wheels were unpacked, say
    monkeypatch.setattr(gpu, "command", lambda *_, **__: [sys.executable, "-c", "import sys; print(sys.path)"])
    assert gpu.run_part("peers", tmp_path, 30, smoke=True) == "done"
    assert str([str(gpu.ROOT), "/tmp/site"])[1:-1] in (tmp_path / "peers.txt").read_text()


def test_an_unknown_part_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "new"), "--only", "overheads"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--only names 'overheads'; use some of overhead,screen" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
