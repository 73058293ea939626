"""Resumed trajectories: flagged images sampled again from a snapshot, with a change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from sd_guard.lanes import Conditioning, evaluate_lanes
from sd_guard.mitigation import Change
from sd_guard.noise import PredictionType, interpret, read_level
from sd_guard.observation import Observation, look_again, observe, predicted_image, with_control
from sd_guard.pipelines.inputs import CallInputs, prediction_type
from sd_guard.snapshots import fork_generators, select_images
from sd_guard.statistics.base import StepCall
from sd_guard.statistics.guidance import cfg_norm
from sd_guard.transfers import index_of


@dataclass(frozen=True, slots=True)
class Start:
    """A point of a trajectory to resume from.

    Attributes:
        step: the next to be made.
        scheduler: copy, before that step.
        latents: (B, C, H, W) before it.
        states: of the call's generators at that moment.
    """

    step: int
    scheduler: Any
    latents: Tensor
    states: list[Tensor]


@dataclass(frozen=True, slots=True)
class Walk:
    """How the host's loop went from the first step to the last one made.

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

    def scale(self, step: int) -> float | None:
        """Guidance scale of a step; beyond those made, that of the last one."""
        return self.scales[min(step, len(self.scales) - 1)]

    def cost(self, start: int, stop: int) -> int:
        """Lanes that making the steps from `start` to before `stop` costs an image."""
        return sum(1 if self.scale(step) is None else 2 for step in range(start, stop))


@dataclass(frozen=True, slots=True)
class Watch:
    """Where a trajectory is looked at.

    Attributes:
        timesteps: of all steps, on the host: one on the device would be waited for.
        clear: the first step whose prediction shows anything.
        steps: observed; the last decides.
        later_steps: that look again.
        seeds: of probes and other seeds, one an image.
    """

    timesteps: Sequence[float]
    clear: int
    steps: Sequence[int]
    later_steps: Sequence[int]
    seeds: Sequence[int]

    @property
    def last(self) -> int:
        """The last step that is looked at."""
        return [*self.steps, *self.later_steps][-1]

    def select(self, rows: Sequence[int]) -> Watch:
        """The same for some images."""
        return replace(self, seeds=[self.seeds[row] for row in rows])


@dataclass(slots=True)
class Resumed:
    """F images on their way again, each with a change, as the host's loop goes.

    The caller's step callback is not called again: what it did to the latents is not repeated. Beyond where the host's
    loop stands, its last guidance scale is repeated. An image whose change has a loop of its own walks alone.

    Attributes:
        pipe: the pipeline.
        inputs: of the call.
        watch: of these images.
        walk: of all B images, up to where the loop stands.
        changes: one an image.
        empty_embeds: (tokens, width) embedding of no prompt.
        lanes: their own conditioning, as the loop's.
        latents: (F, C, H, W), before step `step`.
        scheduler: their own.
        arguments: of its steps.
        step: the next to be made.
        observations: free statistics; before the step that was resumed, those of the host's trajectory.
        last: the UNet call of the last observed step.
        later: looks after the deciding one.
        cfg_norms: as of `Guidance.scale`.
    """

    pipe: Any
    inputs: CallInputs
    watch: Watch
    walk: Walk
    changes: Sequence[Change]
    empty_embeds: Tensor
    lanes: Conditioning
    latents: Tensor
    scheduler: Any
    arguments: dict[str, Any]
    step: int
    observations: list[Observation]
    last: StepCall | None = None
    later: list[Observation] = field(default_factory=list)
    cfg_norms: list[float] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Of a UNet call that looks at them: as many as their own steps have."""
        return self.lanes.prompt_embeds.shape[0]

    def select(self, index: int, walk: Walk) -> Resumed:
        """One of the images by itself, from where it stands.

        Args:
            index: of the image.
            walk: of all B images, up to where the loop stands now.
        """
        count, own = len(self.changes), index_of([index], self.latents.device)
        generator, others = self.arguments.get("generator"), dict(self.arguments)
        if isinstance(generator, list):
            others["generator"] = [generator[index]]
        return replace(
            self,
            watch=self.watch.select([index]),
            walk=walk,
            changes=[self.changes[index]],
            lanes=self.lanes.select(torch.arange(index, self.lanes.prompt_embeds.shape[0], count, device=own.device)),
            latents=self.latents[own],
            scheduler=select_images(self.scheduler, own, self.latents),
            arguments=others,
            observations=[seen.select([index]) for seen in self.observations],
            later=[seen.select([index]) for seen in self.later],
        )

    @torch.no_grad()
    def go_on(self, until: int) -> None:
        """Makes all steps before step `until`."""
        count, kind = len(self.changes), prediction_type(self.pipe)
        while self.step < until:
            scale, timestep = self.walk.scale(self.step), self.scheduler.timesteps[self.step]
            now = self._text(scale)
            x = self.scheduler.scale_model_input(
                self.latents if scale is None else torch.cat([self.latents] * 2), timestep
            )
            looked = self.step in (*self.watch.steps, *self.watch.later_steps)
            guidance = self.changes[0].guidance
            reads = looked or guidance is not None
            level = read_level(self.scheduler, self.watch.timesteps[self.step]) if reads else None
            output = evaluate_lanes(self.pipe.unet, x, timestep, now)
            negative, conditional = (None, output) if scale is None else output.chunk(2)
            if looked and level is not None:
                control = negative if self.inputs.control_is_empty and self.changes[0].anchor_embeds is None else None
                seen_with = now if control is not None else control_lanes(now, count, self.empty_embeds)
                self._look(StepCall(self.step, timestep, level, x[:count], conditional, control, seen_with), kind)
            noise = conditional
            if scale is not None and negative is not None:
                if guidance is not None and level is not None:
                    pair = (interpret(o, x[:count], level, kind).e_hat for o in (conditional, negative))
                    self.cfg_norms += cfg_norm(*pair).tolist()
                    scale = guidance.scale(self.step / len(self.scheduler.timesteps), self.cfg_norms)
                noise = guide(conditional, negative, scale, self.inputs.guidance_rescale)
            step = self.scheduler.step(noise, timestep, self.latents, **self.arguments, return_dict=False)
            self.latents = step[0]
            self.step += 1

    def _look(self, call: StepCall, kind: PredictionType) -> None:
        if call.step in self.watch.later_steps:
            self.later.append(look_again(call, kind, predicted_image(self.observations)))
        else:
            self.last = with_control(call, self.pipe.unet, self.rows)
            self.observations.append(observe(self.last, kind))

    def _text(self, scale: float | None) -> Conditioning:
        """The lanes of the next step: both, or without guidance those of the prompts."""
        count, prompts = len(self.changes), self.lanes.prompt_embeds
        share = self.step / len(self.scheduler.timesteps)
        changed = torch.stack([self.empty_embeds if is_delayed(c, share) else c.prompt_embeds for c in self.changes])
        anchor = self.changes[0].anchor_embeds
        other = prompts[:-count] if anchor is None else anchor.to(prompts)[None].expand_as(prompts[:-count])
        now = self.lanes.with_prompt(torch.cat([other, changed.to(prompts)]))
        return now if scale is not None else now.select(torch.arange(count, device=prompts.device) - count)


def resume(
    pipe: Any,
    inputs: CallInputs,
    start: Start,
    watch: Watch,
    rows: list[int],
    walk: Walk,
    changes: Sequence[Change],
    empty_embeds: Tensor,
    observations: Sequence[Observation],
) -> Resumed:
    """F of the B images at a snapshot.

    Args:
        pipe: the pipeline.
        inputs: of the call.
        start: of all B images.
        watch: of all B images.
        rows: the F images.
        walk: of all B images.
        changes: one an image.
        empty_embeds: (tokens, width) embedding of no prompt.
        observations: of all B images, on the host's trajectory.
    """
    images, index = start.latents.shape[0], index_of(rows, start.latents.device)
    generator = fork_generators(inputs.generator, start.states, rows, inputs.seed)
    own = [start.latents[row] if c.latents is None else c.latents for row, c in zip(rows, changes, strict=True)]
    lanes = walk.lanes.select(torch.cat([index + first for first in range(0, walk.count, images)]))
    return Resumed(
        pipe,
        inputs,
        watch.select(rows),
        walk,
        changes,
        empty_embeds,
        _masked(lanes, changes[0].attention_mask),
        torch.stack([latents.to(start.latents) for latents in own]),
        select_images(start.scheduler, index, start.latents),
        pipe.prepare_extra_step_kwargs(generator, inputs.eta),
        start.step,
        [seen.select(rows) for seen in observations if seen.step < start.step],
    )


def _masked(lanes: Conditioning, mask: Tensor | None) -> Conditioning:
    """The lanes of one image, of which the conditional one, the last, does not attend to what `mask` leaves out."""
    if mask is None:
        return lanes
    all_lanes = torch.ones(lanes.prompt_embeds.shape[:2], dtype=torch.bool, device=lanes.prompt_embeds.device)
    all_lanes[-1] = mask
    return replace(lanes, attention_mask=all_lanes)


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
        if lanes.attention_mask is not None:
            mask = lanes.attention_mask[images:]
            lanes = replace(lanes, attention_mask=torch.cat([torch.ones_like(mask), mask]))
    return lanes.with_prompt(torch.cat([empty_embeds.to(prompts)[None].expand(images, -1, -1), prompts]))


def is_delayed(change: Change, share: float) -> bool:
    """Whether the image is still sampled without its prompt when `share` of the steps have been walked."""
    return share < change.guidance_from and not math.isclose(share, change.guidance_from)
