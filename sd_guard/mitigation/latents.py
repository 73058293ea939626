"""Mitigations that change where a trajectory starts.

Their changes go on in the host's loop. All of them keep the prompt, so that they rescue an image whose memory hangs on
its noise as well; `design.md` says what stronger memories take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from sd_guard.mitigation.base import BACKWARD_LANES, Change, Subject, check_gradients, gradient_cost, sparing
from sd_guard.mitigation.optimisation import measure, objective_of, slope
from sd_guard.transfers import send

SHARPNESS: Final = "sharpness"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSeed:
    """Other noise to start from, and nothing else. Strength: how many seeds were tried. Costs nothing to propose.

    Attributes:
        seeds: tried.
    """

    seeds: int = 2

    def __post_init__(self) -> None:
        """Refuses settings that no run could use."""
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds} tries nothing; give at least 1")

    def propose(self, subject: Subject) -> Iterator[Change]:
        """One change a seed."""
        for number in range(1, self.seeds + 1):
            latents = other_noise(subject, number)
            yield Change("new_seed", float(number), subject.prompt_embeds, latents=latents, other_noise=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Renoise:
    """Back to an earlier noise level: what the deciding step predicts *without* the prompt, with new noise.

    The clean latent is that of the control, since the prompt's own is the picture that must not come back. A multistep
    scheduler goes on with what it remembers of the steps before. Strength: the share of the steps that is kept. Costs
    nothing to propose, and the steps from that level on.

    Attributes:
        to: shares of the steps in [0, 1), tried in order; the nearest observed step that is not later is taken. Beyond
            the last of `Guard.observe_at`, which decides, a pipeline refuses it.
    """

    to: tuple[float, ...] = (0.04, 0.02)

    def __post_init__(self) -> None:
        """Refuses settings that no run could use."""
        if not self.to or not all(0 <= share < 1 for share in self.to):
            raise ValueError(f"to={self.to} must hold shares of the steps in [0, 1), at least one")

    @property
    def resumes_at(self) -> tuple[float, ...]:
        """Shares of the steps."""
        return self.to

    def propose(self, subject: Subject) -> Iterator[Change]:
        """One change a level."""
        wanted = [round(share * subject.steps) for share in self.to]
        levels = [max(step for step in subject.resumable if step <= asked) for asked in wanted]
        for step in dict.fromkeys(levels):
            latents = subject.renoise(subject.control.float(), _noise(subject, step), step)
            share = step / subject.steps
            yield Change("renoise", share, subject.prompt_embeds, latents=latents, resume_from=step)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseOptimisation:
    """Moves the first latent by Adam until the log-density there is no longer that of a memory.

    After SAIL (Jeon et al. 2025, ICML, arXiv 2412.04140), by the published code: ``|d(z + d / |d|)| + pull |z|`` for
    the difference ``d = e_c - e_u`` of the two noise predictions, a finite difference of the sharpness along it, and
    a pull that keeps z likely; Adam with rate 0.05, at most 10 steps. There, many draws are moved together until one of
    them meets a target that was found for Stable Diffusion (8.2); here the image's own latent is moved, and the guard
    says what has met its target. Other statistics than SAIL's may be followed. The optimised tensor is float32 whatever
    the model is, and the attention kernels stay as they are.

    Strength: Adam steps. A step costs four lanes (`sharpness`), or one more than `EmbeddingOptimisation`, a backward
    pass through them, and each of them again, for that pass to hold one.

    Attributes:
        statistic: `sharpness`, or one of `OBJECTIVES`.
        target: of the statistic without the pull, at which to stop; None leaves that to the guard's own looks.
        steps: after so many a change is proposed, ascending; the last is the bound.
        rate: of Adam, in standard deviations of the first latent.
        pull: weight of ``|z|``.
        probes: Rademacher vectors a step for the statistics that need the Jacobian.
    """

    statistic: str = SHARPNESS
    target: float | None = None
    steps: tuple[int, ...] = (5, 10)
    rate: float = 0.05
    pull: float = 0.05
    probes: int = 1

    def __post_init__(self) -> None:
        """Refuses settings that no run could use."""
        if self.statistic != SHARPNESS:
            objective_of(self.statistic)
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 1:
            raise ValueError(f"steps={self.steps} must hold numbers of Adam steps of at least 1, ascending")
        if not self.rate > 0:
            raise ValueError(f"rate={self.rate} moves nothing; give a share of the latent's deviation above 0")
        if not self.pull >= 0:
            raise ValueError(f"pull={self.pull} pushes the latent away from what is likely; give 0 or more")
        if self.probes < 1:
            raise ValueError(f"probes={self.probes} measure no Jacobian; give at least 1")

    def check(self, pipe: Any) -> None:
        """Refuses a pipeline that no gradient goes through.

        Raises:
            ValueError: likewise.
        """
        check_gradients(pipe, "noise_optimisation")

    def propose(self, subject: Subject) -> Iterator[Change]:
        """One change a number of steps, and one where the target is met; ends where the next step is too dear."""
        unit = _unit(subject)
        z = (subject.latents.float() / unit).detach().clone().requires_grad_()
        adam = torch.optim.Adam([z], lr=self.rate)
        for step in range(self.steps[-1] + 1):
            if step in self.steps:
                yield self._change(subject, step, unit * z.detach())
            if step == self.steps[-1] or subject.lanes_left() < gradient_cost(self._lanes):
                return
            value, gradient = self._follow(subject, z, unit, step)
            if not math.isfinite(value):
                return
            if self._met(value):
                if step and step not in self.steps:
                    yield self._change(subject, step, unit * z.detach())
                return
            z.grad = gradient + self.pull * z.detach() / z.detach().norm()
            adam.step()

    @staticmethod
    def _change(subject: Subject, step: int, latents: Tensor) -> Change:
        return Change("noise_optimisation", float(step), subject.prompt_embeds, latents=latents)

    @property
    def _lanes(self) -> int:
        """Lanes of one evaluation, its gradient apart."""
        return 4 if self.statistic == SHARPNESS else 1 + objective_of(self.statistic).lanes(self.probes)

    def _met(self, value: float) -> bool:
        rises = self.statistic == SHARPNESS or objective_of(self.statistic).rises
        return self.target is not None and (value <= self.target if rises else value >= self.target)

    def _follow(self, subject: Subject, z: Tensor, unit: Tensor, step: int) -> tuple[float, Tensor]:
        """The statistic at z, and its gradient towards more of a memory."""
        subject = sparing(subject, self._lanes)
        if self.statistic == SHARPNESS:
            with torch.enable_grad():
                value = sharpness(subject, z, unit)
            (gradient,) = torch.autograd.grad(value, z)
            subject.bill(4 * BACKWARD_LANES)
            return value.item(), gradient
        objective = objective_of(self.statistic)
        with torch.enable_grad():
            latents = (unit * z)[None]
            without = subject.denoise(subject.empty_embeds[None], latents)
            text = subject.prompt_embeds[None]
            value = measure(objective, subject, text, latents, without, probes=self.probes, draw=step)
        gradient = slope(objective, subject, value, z, probes=self.probes)
        subject.bill(BACKWARD_LANES)  # through `without`
        return value.item(), gradient


def sharpness(subject: Subject, z: Tensor, unit: Tensor) -> Tensor:
    """``|d(z + d / |d|)|`` at the first step, with ``d = e_c - e_u``; spends four lanes.

    Args:
        subject: whose lanes are spent.
        z: (C, H, W) first latent, of unit deviation.
        unit: (C, H, W) what the sampler's latents have in its place.
    """

    def difference(z: Tensor) -> Tensor:
        latents = (unit * z)[None]  # a lane at a time: the backward pass holds one
        without, with_prompt = (
            subject.denoise(text[None], latents).e_hat[0] for text in (subject.empty_embeds, subject.prompt_embeds)
        )
        return with_prompt - without

    d = difference(z)
    return difference(z + d / d.norm()).norm()


def other_noise(subject: Subject, number: int = 1) -> Tensor:
    """(C, H, W) float32 latents to start from: other noise than the image's own, of its seed and a number."""
    return _unit(subject) * _noise(subject, number)


def _unit(subject: Subject) -> Tensor:
    """(C, H, W) what noise of unit deviation is in the sampler's latents at the first step: a constant."""
    nothing = torch.zeros_like(subject.latents, dtype=torch.float32)
    return subject.renoise(nothing, nothing + 1, 0) / subject.level(0).s


def _noise(subject: Subject, number: int) -> Tensor:
    """(C, H, W) float32, of the subject's seed and a number; images with seeds in a row share none of it."""
    generator = torch.Generator().manual_seed((subject.seed + 0x9E3779B97F4A7C15 * number) % 2**63)
    return send(torch.randn(subject.latents.shape, generator=generator, device="cpu"), subject.latents.device)
