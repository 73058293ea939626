"""Suites on a pipeline of random weights whose UNet calls take milliseconds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import build, components

from sd_guard.bench import jacobians, peers, run
from sd_guard.bench.settings import BenchSettings
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, dict[str, Any]]]:
    """Runs a suite with one timed run a case; lines by case, and by batch and dtype where there are several."""
    parts = components()

    def build_tiny(arch: str, device: torch.device, dtype: str) -> GuardedStableDiffusionPipeline:
        own = copy.deepcopy(parts)
        for name in ("unet", "vae", "text_encoder"):
            own[name] = own[name].to(getattr(torch, dtype)).requires_grad_(False)
        return build(GuardedStableDiffusionPipeline, own)

    for room in (run, jacobians, peers):
        monkeypatch.setattr(room, "build_pipeline", build_tiny)
    jacobians.reference_point.cache_clear()

    def lines(suite: Any, **options: Any) -> dict[str, dict[str, Any]]:
        settings = BenchSettings(suite=suite, device="cpu", repeats=1, warmup=0, **options)
        found = list(run.run_bench(settings, run.plan_device(settings)))
        several = {name for name in ("dtype", "batch") if len({line[name] for line in found}) > 1}
        by_case = {" ".join(str(line[key]) for key in ("case", *sorted(several))): line for line in found}
        assert len(by_case) == len(found)
        return by_case

    return lines
