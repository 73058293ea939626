"""A result as one line of JSON, with the machine, the versions and the revision that it was measured on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from sd_guard.bench.base import Bench
from sd_guard.bench.measuring import Measured, spread

_PACKAGES: Final = ("sd-guard", "torch", "diffusers", "transformers", "numpy", "xformers", "triton")
_MIB: Final = 2**20


def result_line(bench: Bench, measured: Measured, baseline: Measured, ceiling: float) -> dict[str, Any]:
    """One result.

    `seconds` is the median of the runs, `seconds_quartiles` its spread, `ratio` the median over turns of its time over
    the group's first case's, with its quartiles, `seconds_more` the median of the difference, `lanes` and `flops` those
    of one run, and `ceiling_share` the operations a second over `ceiling_flops`, those of a matrix product of the same
    dtype. In float32 that share may exceed 1: a GPU rounds the convolutions to ten bits unless torch is told otherwise,
    and the matrix product not. `peak_mib` holds the weights, and all else that was there before (`resident_mib`). What
    was not measured is null.

    Args:
        bench: what it was measured with.
        measured: the case.
        baseline: first case of its group.
        ceiling: operations a second of a matrix product.
    """
    seconds = [run.seconds for run in measured.runs]
    lower, middle, upper = spread(seconds) if seconds else (None, None, None)
    pairs = [(run.seconds, other.seconds) for run, other in zip(measured.runs, baseline.runs, strict=False)]
    least, ratio, most = spread([own / other for own, other in pairs]) if pairs else (None, None, None)
    count = measured.count
    return {
        "suite": bench.settings.suite,
        "case": measured.case.name,
        "arch": bench.settings.arch,
        "dtype": bench.dtype,
        "batch": bench.batch,
        "steps": bench.settings.steps,
        "compile": bench.settings.compile,
        "repeats": len(seconds),
        "seconds": middle,
        "seconds_quartiles": [lower, upper],
        "baseline": baseline.case.name,
        "ratio": ratio,
        "ratio_quartiles": [least, most],
        "seconds_more": spread([own - other for own, other in pairs])[1] if pairs else None,
        "lanes": count.lanes if count else None,
        "flops": count.flops if count else None,
        "ceiling_flops": ceiling,
        "ceiling_share": count.flops / middle / ceiling if count and count.flops is not None and middle else None,
        "resident_mib": _mib([run.resident for run in measured.runs]),
        "peak_mib": _mib([run.peak for run in measured.runs]),
        "host_waits": measured.waits,
        **measured.figures,
        "failed": measured.failed,
    }


def _mib(sizes: list[int | None]) -> float | None:
    known = [size for size in sizes if size is not None]
    return max(known) / _MIB if known else None


def provenance(device: torch.device) -> dict[str, Any]:
    """Where a result was measured."""
    return {
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "tf32_convolutions": device.type == "cuda" and torch.backends.cudnn.allow_tf32,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES} | {"torch": torch.__version__},  # with its build
        "git": revision(),
    }


def revision(folder: Path = Path(__file__).parents[1]) -> str:
    """Of the checkout that the package's `folder` belongs to, `-dirty` if it was changed; `unknown` outside of one."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        except OSError:  # no git
            return ""
        return done.stdout.strip()

    top = git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != folder.resolve().parent:  # installed into somebody else's repository
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
