"""Lint, format, types and the direction of imports, as part of the one test command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a tool of this environment on the repository, its output kept."""
    if not (BIN / tool).exists():
        pytest.fail(f"{tool} is not installed beside {sys.executable}: pip install -c constraints.txt -e '.[dev]'")
    environment = os.environ | {"NO_COLOR": "1", "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    return subprocess.run(
        [BIN / tool, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )


def assert_clean(done: subprocess.CompletedProcess[str]) -> None:
    """Fails with what the tool said."""
    if done.returncode:
        pytest.fail(f"{done.stdout}\n{done.stderr}".strip(), pytrace=False)


def test_ruff_check():
    assert_clean(run("ruff", "check", "."))


def test_ruff_format():
    assert_clean(run("ruff", "format", "--check", "."))


def test_imports_run_one_way():
    done = run("lint-imports", "--no-cache")
    assert_clean(done)
    assert "0 broken" in done.stdout


def test_pyright():
    version = run("pyright", "--version")
    if version.returncode:  # it needs a node, and may be unable to get one
        pytest.skip(f"pyright does not run here: {(version.stderr or version.stdout).strip().splitlines()[-1:]}")
    done = run("pyright", "--pythonpath", sys.executable)
    assert_clean(done)
    assert "0 errors" in done.stdout
