"""What the tests of the published statistics share: two oracles behind one UNet, and rows of a call on their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from oracles import Oracle
from tiny import TRAINING, build, components
from torch import Tensor

from sd_guard.lanes import Conditioning
from sd_guard.pipelines.trajectory import denoiser_of, walk
from sd_guard.statistics.base import Denoiser, StepCall

ALPHAS = DDIMScheduler(**TRAINING).alphas_cumprod.double()
SHAPE = (4, 2, 2)
PROMPTS, SEEDS = ["a cat", "a red dog", "something else"], [3, 4, 5]


class TwoLanes:
    """Rows whose text is 0 are answered by the first oracle, those whose text is 1 by the second, one by one."""

    def __init__(self, control: Oracle, conditional: Oracle) -> None:
        self.lanes = [oracle.as_unet(ALPHAS, "epsilon") for oracle in (control, conditional)]
        self.rows = 0

    def __call__(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        self.rows += len(sample)
        which = encoder_hidden_states[:, 0, 0].long().tolist()
        rows = [self.lanes[lane](row[None], timestep, return_dict=False)[0] for lane, row in zip(which, sample)]  # noqa: B905
        return (torch.cat(rows),)


def oracle_case(control: Oracle, conditional: Oracle, timestep: int, x: Tensor) -> tuple[StepCall, Denoiser]:
    """The call that a sampler would have made with `x` (B, *SHAPE) in float64, and the model behind it."""
    unet = TwoLanes(control, conditional)
    level, t = unet.lanes[0].level(timestep), torch.tensor(timestep)
    text = torch.tensor([0.0] * len(x) + [1.0] * len(x)).reshape(-1, 1, 1)
    e_u, e_c = (oracle.predict_noise(x, level) for oracle in (control, conditional))
    call = StepCall(0, t, level, x, e_c, e_u, Conditioning(text))
    unet.rows = 0
    return call, Denoiser(unet, "epsilon", ALPHAS, list(range(len(x))))


def jacobian(oracle: Oracle, call: StepCall) -> Tensor:
    """(B, D, D) of an oracle's noise prediction at the call's input, by automatic differentiation."""

    def flat(row: Tensor) -> Tensor:
        return oracle.predict_noise(row.reshape(1, -1), call.level)[0]

    return torch.stack([torch.autograd.functional.jacobian(flat, row.flatten()) for row in call.x])


def noise(rows: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny_pipe() -> StableDiffusionPipeline:
    """The tiny pipeline in float64, where a row's arithmetic does not show what else is in the batch."""
    return build(StableDiffusionPipeline, components()).to(torch.float64)


def tiny_calls(pipe: StableDiffusionPipeline, steps: int = 3) -> list[StepCall]:
    return list(walk(pipe, PROMPTS, SEEDS, steps=steps))


def on_its_own(call: StepCall, pipe: StableDiffusionPipeline, row: int) -> tuple[StepCall, Denoiser]:
    """One image's part of a call of `PROMPTS`, and its model."""
    rows = slice(row, row + 1)
    fields = ("x", "conditional", "control", "latents", "next_latents")
    lanes = call.lanes.select(torch.tensor([row, row + len(PROMPTS)]))
    parts = {name: getattr(call, name)[rows] for name in fields}
    return dataclasses.replace(call, **parts, lanes=lanes), denoiser_of(pipe, SEEDS[rows])
