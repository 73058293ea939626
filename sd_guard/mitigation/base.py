"""What a mitigation is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Subject:
    """One flagged image, as a mitigation sees it.

    Attributes:
        prompt: its text; None where the caller gave embeddings only.
        prompt_embeds: (tokens, width) conditional embedding that flagged.
        empty_embeds: (tokens, width) embedding of no prompt.
        seed: of any randomness of the mitigation.
        encode: prompts to (N, tokens, width).
        predict: (N, tokens, width) to (N, C, H, W) predicted clean latents at the first step of the image's own
            trajectory; spends N lanes.
        lanes_left: extra lanes this image may still spend before an attempt's own cost.
    """

    prompt: str | None
    prompt_embeds: Tensor
    empty_embeds: Tensor
    seed: int
    encode: Callable[[Sequence[str]], Tensor]
    predict: Callable[[Tensor], Tensor]
    lanes_left: Callable[[], int]


@dataclass(frozen=True, slots=True)
class Change:
    """What one attempt changes.

    Attributes:
        mitigation: name of the family.
        strength: in its own unit.
        prompt_embeds: (tokens, width) the new conditional embedding.
        prompt: the rewritten text; None where the words were kept.
        guidance_from: share of the steps, in [0, 1], before which the image is sampled without its prompt.
    """

    mitigation: str
    strength: float
    prompt_embeds: Tensor
    prompt: str | None = None
    guidance_from: float = 0.0


class Mitigation(Protocol):
    """Proposes changes for one image, the smallest first. Lazy: a later change may spend lanes to be found."""

    def propose(self, subject: Subject) -> Iterator[Change]:
        """Yields changes; ends where the family has nothing more to try or cannot afford it."""
        ...
