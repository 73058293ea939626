"""README and --help against what is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.figures import ALL, README, figures, headline, write_between

TEXT = README.read_text(encoding="utf-8")


def test_the_figures_are_those_of_the_result_files() -> None:
    remedy = "run python -m benchmarks.figures"
    assert write_between(TEXT, headline()) == TEXT, remedy
    rest = ALL.read_text(encoding="utf-8")
    assert write_between(rest, figures()) == rest, remedy


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "image.png").exists()


def test_every_command_is_in_the_readme() -> None:
    shown = subprocess.run([sys.executable, "-m", "sd_guard.cli", "--help"], capture_output=True, text=True, check=True)
    commands = re.findall(r"^  (\w+) ", shown.stdout.split("Commands")[1], flags=re.MULTILINE)
    assert {"screen", "generate", "report"} <= set(commands)
    missing = [command for command in commands if f"sd-guard {command}" not in TEXT]
    assert not missing
