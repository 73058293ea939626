"""A mitigation that keeps the beginning of the trajectory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from sd_guard.mitigation.base import Change, Mitigation, Subject
from sd_guard.mitigation.prompt import WordAblation


@dataclass(frozen=True, slots=True, kw_only=True)
class Later:
    """The changes of another mitigation, from an observed step on instead of from the first one.

    Fewer steps are walked again, from a latent that the memory has had its hand in. A change that brings latents of its
    own starts where these belong.

    Attributes:
        mitigation: whose changes.
        at: share of the steps in [0, 1); the nearest observed step that is not later is resumed from. Beyond the last
            of `Guard.observe_at`, which decides, a pipeline refuses it.
    """

    mitigation: Mitigation = field(default_factory=WordAblation)
    at: float = 0.06

    def __post_init__(self) -> None:
        """Refuses settings that no run could use."""
        if not 0 <= self.at < 1:
            raise ValueError(f"at={self.at} is no share of the steps in [0, 1); 0 restarts")

    @property
    def resumes_at(self) -> tuple[float, ...]:
        """Shares of the steps."""
        return (self.at,)

    def check(self, pipe: Any) -> None:
        """Refuses what the other mitigation refuses.

        Raises:
            ValueError: likewise.
        """
        if check := getattr(self.mitigation, "check", None):
            check(pipe)

    def propose(self, subject: Subject) -> Iterator[Change]:
        """The other's changes, with another step to resume from."""
        step = round(self.at * subject.steps)
        for change in self.mitigation.propose(subject):
            yield change if change.latents is not None else replace(change, resume_from=step)
