"""What a statistic is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from sd_guard.lanes import Conditioning, Unet, evaluate_lanes
from sd_guard.noise import NoiseLevel, Prediction, PredictionType, interpret
from sd_guard.trace import RowFunction

Lane: TypeAlias = Literal["control", "conditional"]


@dataclass(frozen=True, slots=True)
class StepCall:
    """One UNet call of a sampler, read off its loop.

    Attributes:
        step: index into the scheduler's timesteps.
        timestep: scalar tensor.
        level: noise level of `x`.
        x: (B, C, H, W) UNet input.
        conditional: (B, C, H, W) raw output of the prompt's lanes.
        control: (B, C, H, W) raw output of the lanes without a prompt; None where the sampler has none.
        lanes: 2B rows, the control's first.
        latents: (B, C, H, W) the sampler's latents before the step; None where they are not at hand.
        next_latents: (B, C, H, W) after it; likewise.
        spent: lanes an image that were evaluated for this call beyond the sampler's own.
    """

    step: int
    timestep: Tensor
    level: NoiseLevel
    x: Tensor
    conditional: Tensor
    control: Tensor | None
    lanes: Conditioning
    latents: Tensor | None = None
    next_latents: Tensor | None = None
    spent: int = 0


@dataclass(frozen=True, slots=True)
class Denoiser:
    """The model behind a trajectory, for statistics that ask it more than the sampler did.

    Attributes:
        unet: a `UNet2DConditionModel` or anything with its call signature.
        prediction_type: of its output.
        alphas_cumprod: (T,) the checkpoint's own noise schedule, by training timestep.
        seeds: of probe vectors, one an image, in [0, 2^64).
        decode: (B, C, H, W) clean latents to (B, 3, h, w) images in [0, 1]; None where there is no autoencoder.
        timestep_dtype: as the sampler gives timesteps to the UNet: a compiled one is compiled for that.
    """

    unet: Unet
    prediction_type: PredictionType
    alphas_cumprod: Tensor
    seeds: Sequence[int]
    decode: Callable[[Tensor], Tensor] | None = None
    timestep_dtype: torch.dtype = torch.int64

    def read(self, call: StepCall, lane: Lane) -> Prediction:
        """What the sampler's own UNet call says in one lane, float32 or better.

        Raises:
            ValueError: the sampler evaluated no control.
        """
        output = call.conditional if lane == "conditional" else call.control
        if output is None:
            raise ValueError("this trajectory has no lane without a prompt: sample with guidance_scale above 1")
        return interpret(output, call.x, call.level, self.prediction_type)

    def noise_function(self, call: StepCall, lane: Lane) -> RowFunction:
        """e_hat as a function of the UNet's input, (B, C, H, W) to the same, at the call's timestep and text."""
        images = call.x.shape[0]
        rows = torch.arange(images, device=call.x.device) + (images if lane == "conditional" else 0)
        lanes = call.lanes.select(rows)

        def predict(x: Tensor) -> Tensor:
            output = evaluate_lanes(self.unet, x, call.timestep, lanes)
            return interpret(output, x, call.level, self.prediction_type).e_hat

        return predict


class Statistic(Protocol):
    """One number an image from one sampling step. It depends on no other image of the batch."""

    @property
    def name(self) -> str:
        """Of its row in a table."""
        ...

    @property
    def higher_is_memorized(self) -> bool:
        """Which way it points."""
        ...

    @property
    def lanes(self) -> float:
        """Lane evaluations an image that one measurement costs beyond the sampler's own."""
        ...

    @property
    def at(self) -> tuple[float, ...] | None:
        """Shares of the schedule in [0, 1] where its authors take it, 1 being the last step; None: anywhere."""
        ...

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,) float32 or better."""
        ...


class SeedStatistic(Protocol):
    """One number a prompt from several seeds: how alike what they show is."""

    @property
    def name(self) -> str:
        """Of its row in a table."""
        ...

    @property
    def higher_is_memorized(self) -> bool:
        """Which way it points."""
        ...

    @property
    def lanes(self) -> float:
        """Lane evaluations an image beyond the sampler's own."""
        ...

    @property
    def at(self) -> tuple[float, ...] | None:
        """As of `Statistic`."""
        ...

    def feature(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B, *F) what is compared."""
        ...

    def compare(self, features: Tensor) -> float:
        """Of the (N, *F) features of one prompt's N >= 2 seeds."""
        ...
