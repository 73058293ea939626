"""How spread the attention over the prompt's tokens is (Ren et al. 2024, ECCV, arXiv 2403.11052)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd_guard.statistics.attention import conditional_attention
from sd_guard.statistics.base import Denoiser, StepCall


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionEntropy:
    """``-sum_tokens p log p`` in nats, p the attention averaged over heads and places: their one-step metric E.

    A novel prompt gives nearly all attention to the beginning token, a memorized one to others as well. As in the
    authors' code (renjie3/MemAttn): the entropy of the average, not the average entropy; the first step; the fourth
    cross-attention block in the order of evaluation (of 16 in Stable Diffusion: the second at 32 x 32 on the way down).

    Their other metric, D, is the entropy over all blocks in the last ten of 50 steps, plus by how much the part of it
    that lies on the end token and the padding grew since the first step. Its first part is ``layer=None`` at late
    steps; the second needs two steps at once and the length of the prompt, and is not here.

    Attributes:
        layer: of the block in the order of evaluation, from 0; None averages all blocks before the entropy is taken.
        at: the first step.

    Raises:
        ValueError: a negative layer.
    """

    name: str = field(default="attention_entropy", init=False)
    higher_is_memorized: bool = field(default=True, init=False)
    lanes: float = field(default=1.0, init=False)
    layer: int | None = 3
    at: tuple[float, ...] | None = (0.0,)

    def __post_init__(self) -> None:
        """Refuse what would count from the end."""
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"layer={self.layer} is no index of a block: give 0 or more, or None for all blocks")

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,) in [0, log tokens].

        Raises:
            TypeError: a UNet without cross-attention blocks.
            ValueError: fewer blocks than `layer` asks for, or a compiled UNet.
        """
        maps = conditional_attention(call, model)
        if self.layer is not None and self.layer >= len(maps):
            raise ValueError(f"layer={self.layer} of {len(maps)} cross-attention blocks: give a smaller one, or None")
        chosen = maps if self.layer is None else [maps[self.layer]]
        attention = torch.stack([item.weights.mean((1, 2)) for item in chosen]).mean(0)
        return -torch.special.xlogy(attention, attention).sum(1)
