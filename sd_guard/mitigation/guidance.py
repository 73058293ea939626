"""Mitigations that change the guidance."""

from __future__ import annotations

from collections.abc import Iterator
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

    def propose(self, subject: Subject) -> Iterator[Change]:
        """One change a transition point; costs no lanes to propose."""
        for share in self.until:
            yield Change("delayed_guidance", share, subject.prompt_embeds, guidance_from=share)
