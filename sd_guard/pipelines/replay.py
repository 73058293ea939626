"""Resumed trajectories: flagged images sampled again from the first latent, with a change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from sd_guard.lanes import Conditioning, evaluate_lanes
from sd_guard.mitigation import Change
from sd_guard.noise import read_level
from sd_guard.observation import Observation, observe, with_control
from sd_guard.pipelines.inputs import CallInputs, prediction_type
from sd_guard.snapshots import fork_generators, select_images
from sd_guard.statistics.base import StepCall


@dataclass(frozen=True, slots=True)
class Start:
    """A trajectory's beginning, to resume from.

    Attributes:
        scheduler: copy, after `set_timesteps` and before the first step.
        latents: (B, C, H, W) initial latents.
        states: of the call's generators at that moment.
    """

    scheduler: Any
    latents: Tensor
    states: list[Tensor]


@dataclass(frozen=True, slots=True)
class Walk:
    """How the host's loop went from the first step to the deciding one.

    Attributes:
        lanes: its conditioning: 2B lanes, negative prompt first, if any step was guided; else B.
        scales: guidance scale of each step; None where a step was made without guidance.
    """

    lanes: Conditioning
    scales: Sequence[float | None]

    @property
    def count(self) -> int:
        """Of lanes."""
        return self.lanes.prompt_embeds.shape[0]

    def cost(self, observation_lanes: int) -> int:
        """Lanes that going the same way again costs an image."""
        return sum(1 if scale is None else 2 for scale in self.scales) + observation_lanes


@dataclass(frozen=True, slots=True)
class Watch:
    """Where a trajectory is observed, what an image in doubt may get at the last of the steps, and probe seeds."""

    steps: Sequence[int]
    probes: int
    seeds: Sequence[int]

    def select(self, rows: Sequence[int]) -> Watch:
        """The same for some images."""
        return Watch(self.steps, self.probes, [self.seeds[row] for row in rows])


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where the resumed images stand after the last observed step.

    Attributes:
        latents: (F, C, H, W).
        scheduler: their own.
        observations: free statistics.
        last: the UNet call of the last observed step.
    """

    latents: Tensor
    scheduler: Any
    observations: list[Observation]
    last: StepCall


@torch.no_grad()
def resume(
    pipe: Any,
    inputs: CallInputs,
    start: Start,
    watch: Watch,
    rows: list[int],
    walk: Walk,
    changes: Sequence[Change],
    empty_embeds: Tensor,
) -> Resumed:
    """Samples F images again, from the first step to the last observed one, as the host's loop did.

    The caller's step callback is not called again: what it did to the latents is not repeated.

    Args:
        pipe: the pipeline.
        inputs: of the call.
        start: of all B images.
        watch: of all B images.
        rows: the F images.
        walk: of all B images.
        changes: one an image.
        empty_embeds: (tokens, width) embedding of no prompt.
    """
    images, count, index = start.latents.shape[0], len(rows), torch.tensor(rows, device=start.latents.device)
    watch = watch.select(rows)
    scheduler, latents = select_images(start.scheduler, index, start.latents), start.latents[index]
    generator = fork_generators(inputs.generator, start.states, rows, inputs.seed)
    step_arguments = pipe.prepare_extra_step_kwargs(generator, inputs.eta)
    own = walk.lanes.select(torch.cat([index + first for first in range(0, walk.count, images)]))
    seen: list[Observation] = []
    call: StepCall | None = None
    for step, scale in enumerate(walk.scales):
        timestep = scheduler.timesteps[step]
        changed = _changed_embeds(changes, step / len(scheduler.timesteps), empty_embeds).to(own.prompt_embeds)
        now = own.with_prompt(torch.cat([own.prompt_embeds[:-count], changed]))
        if scale is None:
            now = now.select(torch.arange(count, device=index.device) - count)
        x = scheduler.scale_model_input(latents if scale is None else torch.cat([latents] * 2), timestep)
        level = read_level(scheduler, timestep) if step in watch.steps else None
        output = evaluate_lanes(pipe.unet, x, timestep, now)
        negative, conditional = (None, output) if scale is None else output.chunk(2)
        if level is not None:
            control = negative if inputs.control_is_empty else None
            seen_with = now if control is not None else control_lanes(now, count, empty_embeds)
            call = StepCall(step, timestep, level, x[:count], conditional, control, seen_with)
            call = with_control(call, pipe.unet)
            seen.append(observe(call, prediction_type(pipe)))
        if scale is None or negative is None:
            noise = conditional
        else:
            noise = guide(conditional, negative, scale, inputs.guidance_rescale)
        latents = scheduler.step(noise, timestep, latents, **step_arguments, return_dict=False)[0]
    assert call is not None
    return Resumed(latents, scheduler, seen, call)


def guide(conditional: Tensor, negative: Tensor, scale: float, rescale: float) -> Tensor:
    """Classifier-free guidance as the host computes it."""
    noise = negative + scale * (conditional - negative)
    if rescale > 0:
        noise = rescale_noise_cfg(noise, conditional, guidance_rescale=rescale)
    return noise


def control_lanes(lanes: Conditioning, images: int, empty_embeds: Tensor) -> Conditioning:
    """Lanes to observe a step with whose own have no control: 2B rows, those of the empty prompt first.

    Args:
        lanes: the host's, 2B rows whose other prompt is not empty, or B rows without guidance.
        images: B.
        empty_embeds: (tokens, width).
    """
    prompts = lanes.prompt_embeds[-images:]
    if lanes.prompt_embeds.shape[0] == images:
        lanes = lanes.select(torch.arange(images, device=prompts.device).repeat(2))
    return lanes.with_prompt(torch.cat([empty_embeds.to(prompts)[None].expand(images, -1, -1), prompts]))


def is_delayed(change: Change, share: float) -> bool:
    """Whether the image is still sampled without its prompt when `share` of the steps have been walked."""
    return share < change.guidance_from and not math.isclose(share, change.guidance_from)


def _changed_embeds(changes: Sequence[Change], share: float, empty_embeds: Tensor) -> Tensor:
    """(F, tokens, width) of one step."""
    return torch.stack([empty_embeds if is_delayed(c, share) else c.prompt_embeds for c in changes])
