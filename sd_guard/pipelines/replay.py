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
from sd_guard.observation import Observation, StepCall, observe
from sd_guard.pipelines.inputs import CallInputs, prediction_type
from sd_guard.snapshots import fork_generators, select_images


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
class Watch:
    """Where a trajectory is observed: steps, those of them that are probed, vectors a probed step, and probe seeds."""

    steps: Sequence[int]
    probed: frozenset[int]
    probes: int
    seeds: Sequence[int]

    def select(self, rows: Sequence[int]) -> Watch:
        """The same for some images."""
        return Watch(self.steps, self.probed, self.probes, [self.seeds[row] for row in rows])

    def probes_at(self, step: int) -> int:
        """Vectors to spend at a step."""
        return self.probes if step in self.probed else 0


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where the resumed images stand after the last observed step: (F, C, H, W) latents and their scheduler."""

    latents: Tensor
    scheduler: Any
    observations: list[Observation]


@torch.no_grad()
def resume(
    pipe: Any,
    inputs: CallInputs,
    start: Start,
    watch: Watch,
    rows: list[int],
    lanes: Conditioning,
    changes: Sequence[Change],
    empty_embeds: Tensor,
) -> Resumed:
    """Samples F images again, from the first step to the last observed one, as the host's loop would.

    Args:
        pipe: the pipeline.
        inputs: of the call.
        start: of all B images.
        watch: of all B images.
        rows: the F images.
        lanes: the host's conditioning, 2B lanes with guidance (negative prompt first) or B without.
        changes: one an image.
        empty_embeds: (tokens, width) embedding of no prompt.
    """
    images, index = start.latents.shape[0], torch.tensor(rows, device=start.latents.device)
    watch = watch.select(rows)
    scheduler, latents = select_images(start.scheduler, index, start.latents), start.latents[index]
    generator = fork_generators(inputs.generator, start.states, rows, inputs.seed)
    step_arguments = pipe.prepare_extra_step_kwargs(generator, inputs.eta)
    own = lanes.select(torch.cat([index, index + images]) if inputs.guided else index)
    seen: list[Observation] = []
    for step in range(watch.steps[-1] + 1):
        timestep = scheduler.timesteps[step]
        changed = _changed_embeds(changes, step / len(scheduler.timesteps), empty_embeds).to(own.prompt_embeds)
        now = own.with_prompt(torch.cat([own.prompt_embeds[: -len(rows)], changed]))
        x = scheduler.scale_model_input(torch.cat([latents] * 2) if inputs.guided else latents, timestep)
        level = read_level(scheduler, timestep) if step in watch.steps else None
        output = evaluate_lanes(pipe.unet, x, timestep, now)
        negative, conditional = output.chunk(2) if inputs.guided else (None, output)
        if level is not None:
            control = negative if inputs.control_is_empty else None
            call = StepCall(
                step, timestep, level, x[: len(rows)], conditional, control, control_lanes(inputs, now, len(rows), empty_embeds)
            )
            probes = watch.probes_at(step)
            seen.append(observe(call, pipe.unet, prediction_type(pipe), probes=probes, seeds=watch.seeds))
        noise = guide(conditional, negative, inputs)
        latents = scheduler.step(noise, timestep, latents, **step_arguments, return_dict=False)[0]
    return Resumed(latents, scheduler, seen)


def guide(conditional: Tensor, negative: Tensor | None, inputs: CallInputs) -> Tensor:
    """Classifier-free guidance as the host computes it; without guidance, the conditional output."""
    if negative is None:
        return conditional
    noise = negative + inputs.guidance_scale * (conditional - negative)
    if inputs.guidance_rescale > 0:
        noise = rescale_noise_cfg(noise, conditional, guidance_rescale=inputs.guidance_rescale)
    return noise


def control_lanes(inputs: CallInputs, lanes: Conditioning, images: int, empty_embeds: Tensor | None) -> Conditioning:
    """Lanes that a step is observed with: 2B rows, without a prompt first. `lanes` are the host's."""
    if inputs.guided and inputs.control_is_empty:
        return lanes
    if empty_embeds is None:
        raise ValueError("the control of an unguided call, or one with a negative prompt, needs the empty embedding")
    if not inputs.guided:
        lanes = lanes.select(torch.arange(images, device=lanes.prompt_embeds.device).repeat(2))
    empty = empty_embeds.to(lanes.prompt_embeds)[None].expand(images, -1, -1)
    return lanes.with_prompt(torch.cat([empty, lanes.prompt_embeds[-images:]]))


def replay_cost(steps: int, guided: bool, observation_lanes: int) -> int:
    """Lanes that one image's resumed trajectory of `steps` steps costs."""
    return steps * (2 if guided else 1) + observation_lanes


def is_delayed(change: Change, share: float) -> bool:
    """Whether the image is still sampled without its prompt when `share` of the steps have been walked."""
    return share < change.guidance_from and not math.isclose(share, change.guidance_from)


def _changed_embeds(changes: Sequence[Change], share: float, empty_embeds: Tensor) -> Tensor:
    """(F, tokens, width) of one step."""
    return torch.stack([empty_embeds if is_delayed(c, share) else c.prompt_embeds for c in changes])
