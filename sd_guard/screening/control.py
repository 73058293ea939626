"""What a seed shows without a prompt: quick depth computes it once, for all prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sd_guard.noise import NoiseLevel


@dataclass(frozen=True, slots=True)
class Place:
    """A step of the schedule: its index, timestep (a scalar tensor) and noise level."""

    step: int
    timestep: Tensor
    level: NoiseLevel


@dataclass(frozen=True, slots=True)
class Control:
    """What S seeds show without a prompt, at K observed steps.

    Attributes:
        x: (S, K, C, H, W) UNet inputs.
        output: (S, K, C, H, W) what the UNet returned for them without a prompt.
        lid: (S,) trajectory LID without a prompt at the last of the steps; 0 where there are no probes.
        others: (S, M, C, H, W) UNet inputs of M other seeds, where these are looked at.
    """

    x: Tensor
    output: Tensor
    lid: Tensor
    others: Tensor

    def select(self, rows: Tensor) -> Control:
        """Of some seeds, which may repeat."""
        return Control(self.x[rows], self.output[rows], self.lid[rows], self.others[rows])

    @staticmethod
    def join(controls: Sequence[Control]) -> Control:
        """Of the seeds of all of these, in order."""
        parts = zip(*((one.x, one.output, one.lid, one.others) for one in controls), strict=True)
        return Control(*(torch.cat(part) for part in parts))
