"""Denoisers whose answers are known in closed form: what the estimators are held against.

Each oracle is a distribution of clean latents. Under ``x = a x_0 + s e`` its posterior is known exactly, and with it
the best possible noise prediction, its Jacobian's trace and the trajectory LID ``(a/s)^2 tr Cov[x_0 | x]``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sd_guard.noise import NoiseLevel, PredictionType


class Oracle(ABC):
    """A distribution over R^D; latents of any shape (B, *S) with prod(S) = D are accepted, and computed in float64."""

    dimension: int

    @abstractmethod
    def posterior(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Mean (B, D) and trace of the covariance (B,) of ``x_0`` given flattened float64 ``x`` (B, D)."""

    @abstractmethod
    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Draw `n` clean points, (n, D) in float64."""

    def denoise(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Posterior mean of the clean latent, shaped and typed like `x`."""
        mean, _ = self.posterior(x.double().flatten(1), level)
        return mean.reshape(x.shape).to(x.dtype)

    def predict_noise(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """The exact noise prediction at `x`, shaped and typed like it."""
        x64 = x.double().flatten(1)
        mean, _ = self.posterior(x64, level)
        return ((x64 - level.a * mean) / level.s).reshape(x.shape).to(x.dtype)

    def trajectory_lid(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Exact trajectory LID at the point `x`, (B,) in float64."""
        _, trace = self.posterior(x.double().flatten(1), level)
        return (level.a / level.s) ** 2 * trace

    def flipd(self, clean: Tensor, level: NoiseLevel) -> Tensor:
        """Exact FLIPD of a clean point, (B,) in float64: trajectory LID at ``a clean`` plus the squared noise there."""
        x = level.a * clean.double()
        return self.trajectory_lid(x, level) + self.predict_noise(x, level).flatten(1).square().sum(1)

    def noised(self, n: int, level: NoiseLevel, shape: tuple[int, ...], seed: int = 0) -> Tensor:
        """Draw `n` points of the noisy marginal, (n, *shape) in float64."""
        noise = torch.randn(n, self.dimension, generator=_generator(seed + 1), dtype=torch.float64)
        return (level.a * self.sample(n, seed) + level.s * noise).reshape(n, *shape)

    def as_unet(self, schedule: Any, prediction_type: PredictionType) -> OracleUNet:
        """This oracle behind the call signature of a UNet2DConditionModel.

        Args:
            schedule: A diffusers scheduler, or its ``alphas_cumprod`` of shape (T,).
            prediction_type: What the UNet is to return.
        """
        return OracleUNet(self, getattr(schedule, "alphas_cumprod", schedule), prediction_type)


class OracleUNet:
    """A UNet that knows its noise level by the timestep alone, as a real one does."""

    def __init__(self, oracle: Oracle, alphas_cumprod: Tensor, prediction_type: PredictionType) -> None:
        self.oracle = oracle
        self.prediction_type = prediction_type
        alpha_bar = alphas_cumprod.double().cpu().numpy()
        self._alpha_bar = alpha_bar
        self._log_sigma = 0.5 * np.log((1.0 - alpha_bar) / np.maximum(alpha_bar, 1e-300))
        self.dtype = torch.float32
        self.config = SimpleNamespace(in_channels=4, out_channels=4)

    def level(self, timestep: int | float | Tensor) -> NoiseLevel:
        """Level of a timestep; between two integers the logarithm of sigma is interpolated."""
        t = float(timestep)
        if t.is_integer():
            return NoiseLevel.from_alpha_bar(float(self._alpha_bar[int(t)]))
        return NoiseLevel.from_sigma(math.exp(np.interp(t, np.arange(len(self._log_sigma)), self._log_sigma)))

    def timestep_of(self, level: NoiseLevel) -> float:
        """The fractional timestep that would mean `level` to this UNet."""
        return float(np.interp(math.log(level.sigma), self._log_sigma, np.arange(len(self._log_sigma))))

    def __call__(
        self,
        sample: Tensor,
        timestep: int | float | Tensor,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool = True,
        **_: Any,
    ) -> Any:
        """The oracle's output for `sample` (B, C, H, W) in this UNet's parametrisation."""
        level = self.level(timestep)
        x0, e = self.oracle.denoise(sample, level), self.oracle.predict_noise(sample, level)
        out = {"epsilon": e, "v_prediction": level.a * e - level.s * x0, "sample": x0}[self.prediction_type]
        return SimpleNamespace(sample=out) if return_dict else (out,)


@dataclass
class PointMass(Oracle):
    """All mass on one point (D,): a perfectly memorized image."""

    mean: Tensor

    def __post_init__(self) -> None:
        self.mean = self.mean.double().flatten()
        self.dimension = self.mean.numel()

    def posterior(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return self.mean.expand_as(x), torch.zeros(len(x), dtype=x.dtype)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        return self.mean.expand(n, -1).clone()


@dataclass
class GaussianSubspace(Oracle):
    """An isotropic Gaussian on a random `k`-dimensional subspace of R^D, shifted by a mean of norm `shift`."""

    dimension: int
    k: int
    variance: float = 1.0
    seed: int = 0
    shift: float = 0.0

    def __post_init__(self) -> None:
        g = _generator(self.seed)
        self.basis = torch.linalg.qr(torch.randn(self.dimension, self.k, generator=g, dtype=torch.float64))[0]
        direction = torch.randn(self.dimension, generator=g, dtype=torch.float64)
        self.mean = self.shift * direction / direction.norm()

    def posterior(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        a, s = level.a, level.s
        gain = a * self.variance / (s**2 + a**2 * self.variance)
        mean = self.mean + gain * ((x - a * self.mean) @ self.basis) @ self.basis.T
        trace = self.k * self.variance * s**2 / (s**2 + a**2 * self.variance)
        return mean, torch.full((len(x),), trace, dtype=x.dtype)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        z = torch.randn(n, self.k, generator=_generator(seed), dtype=torch.float64)
        return self.mean + math.sqrt(self.variance) * z @ self.basis.T


@dataclass
class GaussianMixture(Oracle):
    """Isotropic Gaussians: means (M, D), variances (M,) and weights (M,), uniform where not given."""

    means: Tensor
    variances: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        self.means, self.variances = self.means.double(), self.variances.double()
        count, self.dimension = self.means.shape
        weights = torch.ones(count) if self.weights is None else self.weights
        self.log_weights = (weights.double() / weights.sum()).log()

    def posterior(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        a, s = level.a, level.s
        marginal = s**2 + a**2 * self.variances  # (M,)
        offset = x[:, None] - a * self.means  # (B, M, D)
        log_density = -0.5 * (offset.square().sum(-1) / marginal + self.dimension * marginal.log())
        r = torch.softmax(self.log_weights + log_density, dim=1)  # (B, M), by log-sum-exp
        means = self.means + (a * self.variances / marginal)[:, None] * offset
        mean = (r[..., None] * means).sum(1)
        within = r @ (self.dimension * self.variances * s**2 / marginal)
        between = (r * (means - mean[:, None]).square().sum(-1)).sum(1)
        return mean, within + between

    def sample(self, n: int, seed: int = 0) -> Tensor:
        g = _generator(seed)
        which = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=g)
        z = torch.randn(n, self.dimension, generator=g, dtype=torch.float64)
        return self.means[which] + self.variances[which].sqrt()[:, None] * z


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
