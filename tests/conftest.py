"""What all tests share: threads, no network, markers that skip with a reason, hypothesis without a deadline."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Small models gain little from a second thread, and stall where a neighbour wants the core: of two screening processes,
# or of whatever else the machine runs. Processes that tests start have it from here.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def _without_gpu() -> str | None:
    return None if torch.cuda.is_available() else "needs a CUDA device"


def _without_weights() -> str | None:
    folder = os.environ.get("SD_GUARD_WEIGHTS")
    if not folder:
        return "needs SD_GUARD_WEIGHTS to name a folder of checkpoints"
    return None if Path(folder).is_dir() else f"SD_GUARD_WEIGHTS names no folder: {folder}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run, and says why."""
    for marker, reason in {"gpu": _without_gpu(), "weights": _without_weights()}.items():
        if reason:
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=reason))
