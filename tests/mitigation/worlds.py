"""A model whose every statistic is known in closed form, as a function of the text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import subject_of
from torch import Tensor

from sd_guard.mitigation import Subject
from sd_guard.noise import NoiseLevel, Prediction

WIDTH = 4
PICTURE = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1))


@dataclass
class Remembering:
    """``x_0 ~ N(m P, exp(-3 m) I)`` of a picture P, where m, how much of it is remembered, is in the text.

    m is the weighted sum of the first entries of all places but the first, where the prompt has ones.

    Attributes:
        weights: of the places behind the first.
        budget: lanes.
        level: of the first step.
        by_sigma: whether latents are kept as Karras' schedulers keep them, ``x_0 + sigma e``.
    """

    weights: Sequence[float] = (0.25, 0.75)
    budget: float = 10_000.0
    level: NoiseLevel = field(default_factory=lambda: NoiseLevel(0.6, 0.8))
    by_sigma: bool = False

    @property
    def scale(self) -> float:
        return 1 / self.level.a if self.by_sigma else 1.0

    def memory(self, text: Tensor) -> Tensor:
        """(N, tokens, width) to (N,)."""
        return text[:, 1:, 0] @ torch.tensor(self.weights, dtype=text.dtype)

    def denoise(self, text: Tensor, latents: Tensor) -> Prediction:
        self.budget -= len(text)
        a, s = self.level.a, self.level.s
        m = self.memory(text).float()[:, None, None, None]
        x, variance = latents.float() / self.scale, torch.exp(-3 * m)
        x0_hat = m * PICTURE + a * variance / (s**2 + a**2 * variance) * (x - a * m * PICTURE)
        return Prediction((x - a * x0_hat) / s, x0_hat)

    def trajectory_lid(self, m: float) -> float:
        a, s = self.level.a, self.level.s
        return PICTURE.numel() * a**2 * math.exp(-3 * m) / (s**2 + a**2 * math.exp(-3 * m))

    def renoise(self, clean: Tensor, noise: Tensor, _step: int) -> Tensor:
        return self.scale * (self.level.a * clean + self.level.s * noise)

    def bill(self, lanes: float) -> None:
        self.budget -= lanes

    def subject(self, prompt: str | None = "a b", **fields: Any) -> Subject:
        latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(2))
        own = {
            "prompt_embeds": torch.ones(1 + len(self.weights), WIDTH) + 0.1 * torch.arange(WIDTH),
            "empty_embeds": torch.zeros(1 + len(self.weights), WIDTH),
            "latents": self.scale * latents,
            "denoise": self.denoise,
            "bill": self.bill,
            "level": lambda _step: self.level,
            "renoise": self.renoise,
            "lanes_left": lambda: self.budget,
        }
        return subject_of(prompt, **(own | fields))
