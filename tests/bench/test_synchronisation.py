"""How often the guard makes the host wait for a result, in the sampling loop with nothing flagged and no doubt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import build, components, seeded
from torch.overrides import TorchFunctionMode

from sd_guard.bench.base import NOBODY
from sd_guard.guard import Guard
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline

STEPS = 10
# What brings a tensor's content to Python: on a GPU, the host waits for it.
READING = "tolist item cpu numpy __int__ __float__ __bool__ __index__ __complex__ nonzero unique equal allclose".split()


class CountReads(TorchFunctionMode):
    """Counts reads of tensors between a call's first and last UNet call.

    The tables of noise levels stay on the CPU whatever the device, so that reading them waits for nothing.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.pipe, self.calls, self.count = pipe, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = 0 < self.calls < STEPS
        if inside and func.__name__ in READING and isinstance(args[0], torch.Tensor) and not self._is_table(args[0]):
            self.count += 1
        return func(*args, **(kwargs or {}))

    def _is_table(self, tensor: torch.Tensor) -> bool:
        scheduler = self.pipe.scheduler
        tables = (getattr(scheduler, name, None) for name in ("sigmas", "alphas_cumprod"))
        own = tensor.untyped_storage().data_ptr()
        return own in [table.untyped_storage().data_ptr() for table in tables if isinstance(table, torch.Tensor)]


def reads(pipe: Any) -> int:
    with CountReads(pipe) as counter:

        def count(*_: Any) -> None:
            counter.calls += 1

        hook = pipe.unet.register_forward_pre_hook(count)
        pipe(["a dog", "x"], num_inference_steps=STEPS, generator=seeded(1, 2), output_type="latent")
        hook.remove()
    assert counter.calls == STEPS
    return counter.count


def test_the_counter_sees_a_read_in_the_loop() -> None:
    pipe = build(StableDiffusionPipeline, components(), "euler")
    before = reads(pipe)

    def peek(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return tensors if step else {"latents": tensors["latents"] * float(tensors["latents"].isfinite().all())}

    original = pipe.__class__.__call__
    pipe.__class__ = type("Peeking", (type(pipe),), {})
    type(pipe).__call__ = lambda self, *a, **k: original(self, *a, callback_on_step_end=peek, **k)
    assert reads(pipe) == before + 1


@pytest.mark.parametrize("scheduler", ["euler", "dpm_multistep", "ddim"])
def test_the_guard_waits_where_it_decides_and_looks_again(scheduler: str) -> None:
    parts = components()
    plain = reads(build(StableDiffusionPipeline, parts, scheduler))
    pipe = build(GuardedStableDiffusionPipeline, parts, scheduler)
    pipe.enable_guard(Guard(detector=NOBODY))
    later = [step for step in Guard().later_steps(STEPS) if step < STEPS - 1]  # what the last waits for, all do
    weights = 2 * 2  # of UNet and text encoder, for the fingerprint: taken once
    assert [reads(pipe) - plain for _ in range(2)] == [1 + len(later) + weights, 1 + len(later)]
