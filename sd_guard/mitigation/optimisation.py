"""What a mitigation may follow the gradient of, and the text embedding that is moved along it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from sd_guard.mitigation.base import BACKWARD_LANES, Change, Subject, check_gradients, gradient_cost, sparing
from sd_guard.noise import NoiseLevel, Prediction
from sd_guard.statistics.guidance import cfg_norm
from sd_guard.statistics.lid import flipd, probe_products, trajectory_lid
from sd_guard.statistics.sharpness import added_detail
from sd_guard.trace import FiniteDifference, draw_row_probes, perturb


class Look(NamedTuple):
    """What a statistic is read off: one image at the first step of its trajectory.

    Attributes:
        with_prompt: at the point of the statistic, (1, C, H, W).
        without: at the noisy latent, likewise.
        trace: of the Jacobian of `with_prompt`'s noise, by probes, (1,); 0 where the statistic asks none.
        level: of the step.
        guidance_scale: of the call; 1 without guidance.
    """

    with_prompt: Prediction
    without: Prediction
    trace: Tensor
    level: NoiseLevel
    guidance_scale: float


class Objective(NamedTuple):
    """A differentiable statistic.

    Attributes:
        value: of one look, (1,).
        rises: whether it is high for a memory.
        probed: where its Jacobian is probed: at the `noisy` latent, or at the `tweedie` point ``a x0_hat``; None: not.
    """

    value: Callable[[Look], Tensor]
    rises: bool
    probed: Literal["noisy", "tweedie"] | None = None

    def lanes(self, probes: int) -> int:
        """Lanes of one evaluation, its gradient apart."""
        return 1 + (self.probed == "tweedie") + (probes if self.probed else 0)

    def cost(self, probes: int) -> float:
        """Lanes of one evaluation and its gradient."""
        return gradient_cost(self.lanes(probes))


def _cfg_norm(look: Look) -> Tensor:
    """Wen et al. (2024, arXiv 2407.21720)."""
    return cfg_norm(look.with_prompt.e_hat, look.without.e_hat)


def _score_norm(look: Look) -> Tensor:
    """Length of the guided score, ``|e_hat| / s``: what Ross et al. (2024, arXiv 2411.00113) hold FLIPD against."""
    without, scale = look.without.e_hat, look.guidance_scale
    return (without + scale * (look.with_prompt.e_hat - without)).flatten(1).norm(dim=1) / look.level.s


def _trajectory_lid(look: Look) -> Tensor:
    """Of the prompt's own lane: Ross et al. take the trace of the guided prediction, which is no dimension."""
    return trajectory_lid(look.with_prompt.e_hat[0].numel(), look.level.s, look.trace)


def _flipd(look: Look) -> Tensor:
    """At the Tweedie point. Ross et al. take it at the noisy latent, where its two terms cancel in expectation."""
    return flipd(look.with_prompt.e_hat[0].numel(), look.level.s, look.trace, look.with_prompt.e_hat)


def _added_detail(look: Look) -> Tensor:
    """The free half of the default detector."""
    return added_detail(look.with_prompt.x0_hat, look.without.x0_hat)


OBJECTIVES: Final[Mapping[str, Objective]] = {
    "cfg_norm": Objective(_cfg_norm, rises=True),
    "score_norm": Objective(_score_norm, rises=True),
    "trajectory_lid": Objective(_trajectory_lid, rises=False, probed="noisy"),
    "flipd": Objective(_flipd, rises=False, probed="tweedie"),
    "added_detail": Objective(_added_detail, rises=True),
}


def objective_of(statistic: str) -> Objective:
    """The objective of that name.

    Raises:
        ValueError: there is none.
    """
    if statistic not in OBJECTIVES:
        raise ValueError(f"statistic={statistic!r} has no gradient; use one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[statistic]


def measure(
    objective: Objective,
    subject: Subject,
    text: Tensor,
    latents: Tensor,
    without: Prediction,
    *,
    probes: int = 1,
    draw: int = 0,
) -> Tensor:
    """A statistic at the first step, differentiable in text and latents where gradients are enabled.

    Attention kernels stay as they are: the Jacobian is probed by finite differences, so that the gradient of that is an
    ordinary backward pass.

    Args:
        objective: one of `OBJECTIVES`.
        subject: whose lanes are spent; `sparing` for a gradient.
        text: (1, tokens, width).
        latents: (1, C, H, W), as the sampler has them before `scale_model_input`.
        without: the prediction without a prompt at `latents`.
        probes: Rademacher vectors, where the objective is probed.
        draw: number of the draw: each has vectors of its own.

    Returns:
        (1,) float32 or better.
    """
    level, point, there = subject.level(0), latents, subject.denoise(text, latents)
    nothing = torch.zeros_like(latents[0], dtype=torch.float32)
    if objective.probed == "tweedie":
        point = subject.renoise(there.x0_hat[0], nothing, 0)[None].to(latents.dtype)
        there = subject.denoise(text, point)
    trace = there.e_hat.new_zeros(1)
    for k in range(probes if objective.probed else 0):
        v = draw_row_probes([subject.seed], point.shape[1:], 0, point.device, draw * probes + k)
        unit = subject.renoise(nothing, nothing + 1, 0) / level.s  # of the UNet's input, in the sampler's latents
        x = (point.detach() / unit).to(point.dtype)
        moved = perturb(x, v, FiniteDifference().step_for(x))
        # Added to the point, not put in its place: the point may have a gradient of its own.
        ahead = subject.denoise(text, (point.float() + unit * (moved.point.float() - x.float())).to(point.dtype))
        trace = trace + probe_products(v, ahead.e_hat, there.e_hat, moved.step).total / probes
    guidance_scale = 1.0 if subject.guidance_scale is None else subject.guidance_scale
    return objective.value(Look(there, without, trace, level, guidance_scale))


def slope(objective: Objective, subject: Subject, value: Tensor, by: Tensor, *, probes: int = 1) -> Tensor:
    """Gradient of a measured value, shaped like `by`, towards more of a memory; spends its lanes.

    Args:
        objective: that was measured.
        subject: whose lanes are spent.
        value: (1,) as of `measure`; its graph is freed.
        by: the leaf that it was measured with.
        probes: likewise.
    """
    (gradient,) = torch.autograd.grad(value, by)
    subject.bill(BACKWARD_LANES * objective.lanes(probes))
    return gradient if objective.rises else -gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOptimisation:
    """Moves the prompt embedding by Adam until a statistic of the first step is no longer that of a memory.

    After Wen et al. (2024, arXiv 2407.21720: `cfg_norm`) and Ross et al. (2024, arXiv 2411.00113: `score_norm` and
    `flipd`), by their published code: the embedding of the first token stays, 10 to 20 steps of 0.05, no penalty on the
    way. Theirs is AdamW, whose decay is too small to matter, at the first step; `flipd` is taken there at step 40 of
    50, which leaves this guard nothing to resume. The optimised tensor is float32 whatever the model is.

    Strength: Adam steps. A step costs an evaluation of the statistic and a backward pass through it, and of more lanes
    than one (`trajectory_lid`, `flipd`) another evaluation, for that pass to hold one of them.

    Attributes:
        statistic: one of `OBJECTIVES`.
        target: of the statistic, in its own unit, at which to stop; None leaves that to the guard's own looks.
        steps: after so many a change is proposed, ascending; the last is the bound.
        rate: of Adam, in standard deviations of the embedding (CLIP's is about 1).
        probes: Rademacher vectors a step for the statistics that need the Jacobian; new ones each step.
    """

    statistic: str = "cfg_norm"
    target: float | None = None
    steps: tuple[int, ...] = (5, 10, 20)
    rate: float = 0.05
    probes: int = 1

    def __post_init__(self) -> None:
        """Refuses settings that no run could use."""
        objective_of(self.statistic)
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 1:
            raise ValueError(f"steps={self.steps} must hold numbers of Adam steps of at least 1, ascending")
        if not self.rate > 0:
            raise ValueError(f"rate={self.rate} moves nothing; give a share of the embedding's deviation above 0")
        if self.probes < 1:
            raise ValueError(f"probes={self.probes} measure no Jacobian; give at least 1")

    def check(self, pipe: Any) -> None:
        """Refuses a pipeline that no gradient goes through.

        Raises:
            ValueError: likewise.
        """
        check_gradients(pipe, "embedding_optimisation")

    def propose(self, subject: Subject) -> Iterator[Change]:
        """One change a number of steps, and one where the target is met."""
        objective = objective_of(self.statistic)
        cost, spared = objective.cost(self.probes), sparing(subject, objective.lanes(self.probes))
        if subject.lanes_left() < cost + 1:
            return
        latents, dtype = subject.latents[None], subject.prompt_embeds.dtype
        with torch.no_grad():
            without = subject.denoise(subject.empty_embeds[None], latents)
        text = subject.prompt_embeds.detach().float().clone()[None].requires_grad_()
        change = partial(Change, "embedding_optimisation")
        adam = torch.optim.Adam([text], lr=self.rate * float(text.detach().std()))
        for step in range(self.steps[-1] + 1):
            if step in self.steps:
                yield change(float(step), text.detach()[0].to(dtype, copy=True))
            if step == self.steps[-1] or subject.lanes_left() < cost:
                return
            with torch.enable_grad():
                value = measure(objective, spared, text, latents, without, probes=self.probes, draw=step)
            if not bool(value.isfinite()):
                return
            if self._met(objective, value.item()):
                del value  # holds the activations
                if step and step not in self.steps:
                    yield change(float(step), text.detach()[0].to(dtype, copy=True))
                return
            text.grad = slope(objective, subject, value, text, probes=self.probes)
            text.grad[:, 0] = 0
            adam.step()

    def _met(self, objective: Objective, value: float) -> bool:
        return self.target is not None and (value <= self.target if objective.rises else value >= self.target)
