"""What a gradient takes at most, beside one more batch: `benchmarks/memory.py` on the bundled checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.memory import PLANS, measure
from sd_guard.bench.architectures import build_pipeline

CPU = torch.device("cpu")
SEVERAL = "noise_optimisation, sharpness"


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Of one thread of tests."""
    return build_pipeline("reference", CPU, "float32")


def test_a_gradient_fits_where_one_more_image_would(pipe: Any) -> None:
    found = measure(pipe, 1, CPU)
    assert set(found["lines"]) == {"none", *PLANS}
    for name, line in found["lines"].items():
        assert line["attempts"] == (name != "none")
        assert line["of_one_more_batch"] <= 1


def test_and_would_not_if_all_lanes_were_held(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the measure can fail."""
    monkeypatch.setattr("sd_guard.mitigation.latents.sparing", lambda subject, lanes: subject)
    monkeypatch.setattr("benchmarks.memory.PLANS", {SEVERAL: PLANS[SEVERAL]})
    assert measure(pipe, 1, CPU)["lines"][SEVERAL]["of_one_more_batch"] > 1
