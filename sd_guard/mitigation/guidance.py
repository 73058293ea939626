"""Mitigations that change the guidance: how much of it, from when on, and which way.

All but `DelayedGuidance` give the image a guidance scale of its own, so that it is sampled to the end in a loop of its
own: two lanes for each step from where it is resumed. None costs lanes to propose, and none has anything to change in
a call without guidance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sd_guard.mitigation.base import Change, Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class DelayedGuidance:
    """No prompt until a transition point, the prompt with full guidance from there on.

    After Jain et al. (2024, arXiv 2411.16738). Until the transition the image's conditional lane gets the empty prompt,
    so that guidance has nothing to add.

    Attributes:
        until: shares of the steps, tried in order.
    """

    until: tuple[float, ...] = (0.1, 0.2)

    def __post_init__(self) -> None:
        """Refuses what is no share of the steps."""
        _check_until(self.until)

    def propose(self, subject: Subject) -> Iterator[Change]:
        """One change a transition point; costs no lanes to propose."""
        for share in self.until:
            yield Change("delayed_guidance", share, subject.prompt_embeds, guidance_from=share)


@dataclass(frozen=True, slots=True)
class Constant:
    """The same scale at every step."""

    value: float

    def scale(self, share: float, cfg_norms: Sequence[float]) -> float:
        """As of `Guidance`."""
        return self.value


@dataclass(frozen=True, slots=True)
class Transition:
    """One scale before a share of the steps, another from there on."""

    before: float
    after: float
    at: float

    def scale(self, share: float, cfg_norms: Sequence[float]) -> float:
        """As of `Guidance`."""
        return self.before if share < self.at - 1e-9 else self.after  # 3 of 10 steps are 0.3 whatever that rounds to


@dataclass(frozen=True, slots=True)
class FirstMinimum:
    """One scale until the CFG norm has passed its first local minimum, another from there on."""

    before: float
    after: float

    def scale(self, share: float, cfg_norms: Sequence[float]) -> float:
        """As of `Guidance`."""
        triples = zip(cfg_norms, cfg_norms[1:], cfg_norms[2:], strict=False)
        return self.after if any(a > b < c for a, b, c in triples) else self.before


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerGuidance:
    """A lower guidance scale at every step. Strength: the scale.

    Attributes:
        scales: tried in order, where they are below the call's; 1 is the prompt without guidance.
    """

    scales: tuple[float, ...] = (3.0, 1.0)

    def __post_init__(self) -> None:
        """Refuses scales that no sampler takes."""
        if not self.scales or not all(math.isfinite(scale) for scale in self.scales):
            raise ValueError(f"scales={self.scales} must hold guidance scales, at least one")

    def propose(self, subject: Subject) -> Iterator[Change]:
        """One change a scale that is lower than the call's."""
        for scale in self.scales:
            if subject.guidance_scale is not None and scale < subject.guidance_scale:
                yield Change("lower_guidance", scale, subject.prompt_embeds, guidance=Constant(scale))


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicTransition:
    """Hardly any guidance until the trajectory has left the memory's basin of attraction, the call's from there on.

    After Jain et al. (2024, arXiv 2411.16738): the transition point is the first local minimum of the CFG norm
    ``|e_c - e_u|`` along the trajectory, which is seen one step later. As in their code, a trajectory without a minimum
    is never guided. There the scale before it is 1 in the dynamic method and 0, no prompt at all, in the static one;
    with a negative scale this is opposite guidance with a dynamic transition point. Strength: the scale before.

    Attributes:
        before: guidance scale until then.
    """

    before: float = 1.0

    def propose(self, subject: Subject) -> Iterator[Change]:
        """One change."""
        after = subject.guidance_scale
        if after is not None:
            guidance = FirstMinimum(self.before, after)
            yield Change("dynamic_transition", self.before, subject.prompt_embeds, guidance=guidance)


@dataclass(frozen=True, slots=True, kw_only=True)
class OppositeGuidance:
    """Guidance away from the prompt until a transition point, the call's from there on.

    After Jain et al. (2024, arXiv 2411.16738): it leaves the basin of attraction sooner. Scale -2 until timestep 650 of
    1000 is what their README shows with a static transition point; their script for a dynamic one changes the sign of
    the scale at each step, which the text does not say, and was not followed: that is `DynamicTransition` with a
    negative scale. Strength: the share of the steps.

    Attributes:
        before: guidance scale until then, below 0.
        until: shares of the steps, tried in order.
    """

    before: float = -2.0
    until: tuple[float, ...] = (0.2, 0.35)

    def __post_init__(self) -> None:
        """Refuses a scale that does not lead away."""
        if not self.before < 0:
            raise ValueError(f"before={self.before} is not below 0; use DynamicTransition or DelayedGuidance for that")
        _check_until(self.until)

    def propose(self, subject: Subject) -> Iterator[Change]:
        """One change a transition point."""
        after = subject.guidance_scale
        for share in self.until if after is not None else ():
            assert after is not None
            guidance = Transition(self.before, after, share)
            yield Change("opposite_guidance", share, subject.prompt_embeds, guidance=guidance)


def _check_until(until: tuple[float, ...]) -> None:
    if not until or not all(0 < share <= 1 for share in until):
        raise ValueError(f"until={until} must hold shares of the steps in (0, 1], at least one")
