"""Result files: every figure with the machine, the versions and the revision that it was measured on."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"


def provenance() -> dict[str, Any]:
    """Where a result was measured."""
    packages = ("torch", "diffusers", "transformers", "numpy")
    return {
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "git": revision(),
    }


def revision() -> str:
    """Of the code, with `-dirty` if anything but result files differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:  # no git
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if changed else "")


def processor() -> str:
    """Model name of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_result(name: str, content: Mapping[str, Any], *, dtype: str = "float32") -> Path:
    """Writes `benchmarks/results/NAME.json`."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps({"provenance": provenance() | {"dtype": dtype}, **content}, indent=1) + "\n")
    return path


def append_result(path: Path, content: Mapping[str, Any], *, dtype: str) -> Path:
    """Adds a line of JSON to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"provenance": provenance() | {"dtype": dtype}, **content}) + "\n")
    return path
