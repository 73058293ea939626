"""What a guarded call has the host do beside its lanes stays bounded: on a GPU most operations are a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import build, components, seeded

from benchmarks.host import CountOperations
from sd_guard.bench.base import NOBODY
from sd_guard.fingerprint import take_fingerprint
from sd_guard.guard import Guard
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline


def operations(pipe: Any, count: int) -> int:
    with CountOperations() as counter:
        pipe(["a dog"] * count, num_inference_steps=50, generator=seeded(*range(count)), output_type="latent")
    return counter.count


@pytest.mark.parametrize("count", [1, 3])
def test_operations_of_a_call_with_nothing_in_doubt(count: int) -> None:
    parts = components()
    plain, guarded = build(StableDiffusionPipeline, parts), build(GuardedStableDiffusionPipeline, parts)
    guarded.enable_guard(Guard(detector=NOBODY))
    operations(guarded, count)  # reads the weights, once
    assert operations(guarded, count) - operations(plain, count) <= 104


def test_a_known_model_is_recognised_without_reading_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build(GuardedStableDiffusionPipeline, components())
    first = take_fingerprint(pipe, steps=50, guidance_scale=7.5)

    def walk(*_: Any, **__: Any) -> Any:
        raise AssertionError("takes milliseconds")

    for name in ("named_parameters", "named_modules", "parameters"):
        monkeypatch.setattr(torch.nn.Module, name, walk)
    with CountOperations() as counter:
        assert take_fingerprint(pipe, steps=50, guidance_scale=7.5) == first
    assert counter.count == 0
