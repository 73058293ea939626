"""FLIPD of clean latents over the checkpoint's own noise levels: the curve, its knee, and a regression over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from sd_guard.lanes import Conditioning, evaluate_lanes
from sd_guard.noise import NoiseLevel, at_least_float32, interpret
from sd_guard.statistics.base import Denoiser, StepCall
from sd_guard.statistics.lid import CleanPoint, estimate_flipd
from sd_guard.trace import FiniteDifference, Hutchinson, RowFunction, RowSeeds

LEVELS: Final = 12
# Latents have about unit scale: noise as large as the latents themselves shows where the data lie, and no manifold.
LARGEST_SIGMA: Final = 1.0
_SPREAD: Final = (0.5, 0.5**0.5, 1.0, 2.0**0.5, 2.0)  # of the regression's levels around the middle one


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipdCurve:
    """FLIPD of B clean latents at L noise levels.

    Attributes:
        timesteps: (L,) training timesteps, int64, ascending.
        values: (L, B) FLIPD in directions, float32 or better. In theory 0 to D; below 0 where a network pulls harder
            towards an image than the noise accounts for.
        knee_timestep: (B,) int64, of `timesteps`.
        lid: (B,) the values at the knees; NaN where a value of the curve is not finite, so that no knee can be told.
    """

    timesteps: Tensor
    values: Tensor
    knee_timestep: Tensor
    lid: Tensor


def sigmas_of(model: Denoiser) -> Tensor:
    """(T,) float64: the noise-to-signal ratio ``s / a`` of every training timestep."""
    alpha_bar = model.alphas_cumprod.double().cpu()
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def nearest_timesteps(model: Denoiser, sigmas: Tensor) -> Tensor:
    """(L,) int64: the training timesteps whose levels are nearest to (L,) `sigmas` in the logarithm."""
    return (sigmas_of(model).log() - sigmas.double()[:, None].log()).abs().argmin(1)


def default_timesteps(model: Denoiser) -> Tensor:
    """At most `LEVELS` training timesteps, int64, even in ``log sigma`` from the lowest to sigma = `LARGEST_SIGMA`."""
    smallest = float(sigmas_of(model)[0])
    top = torch.tensor(max(LARGEST_SIGMA, smallest)).log().item()
    even = torch.linspace(sigmas_of(model)[0].log().item(), top, LEVELS, dtype=torch.float64).exp()
    return nearest_timesteps(model, even).unique()


def conditional_lanes(call: StepCall) -> Conditioning:
    """The B prompts' rows of a call's 2B lanes."""
    images = call.x.shape[0]
    return call.lanes.select(torch.arange(images, 2 * images, device=call.x.device))


def predict_at(model: Denoiser, timestep: int, lanes: Conditioning) -> tuple[NoiseLevel, RowFunction]:
    """The level of a training timestep, and e_hat there as a function of the UNet's input (B, C, H, W).

    Args:
        model: whose own schedule is read.
        timestep: in [0, T).
        lanes: B rows.

    Raises:
        ValueError: a timestep outside the schedule.
    """
    count = len(model.alphas_cumprod)
    if not 0 <= timestep < count:
        raise ValueError(f"timestep={timestep} is not of this checkpoint's schedule: give one of 0 to {count - 1}")
    level = NoiseLevel.from_alpha_bar(float(model.alphas_cumprod[timestep]))

    def predict(x: Tensor) -> Tensor:
        output = evaluate_lanes(model.unet, x, torch.full((), timestep, device=x.device), lanes)
        return interpret(output, x, level, model.prediction_type).e_hat

    return level, predict


def flipd_curve(
    model: Denoiser,
    clean: Tensor,
    lanes: Conditioning,
    *,
    timesteps: Sequence[int] | None = None,
    probes: int = 8,
    step: int = 0,
    point: CleanPoint = "image",
) -> FlipdCurve:
    """FLIPD (Kamkari et al. 2024, arXiv 2406.03537) of clean latents at several levels, and its knee.

    All levels share their Rademacher vectors, so that the curve is smooth. An image costs ``L (1 + probes)`` lanes.

    Args:
        model: its schedule gives the levels, its seeds (B) the probes.
        clean: (B, C, H, W) clean latents in the UNet's units and dtype.
        lanes: B rows.
        timesteps: at least one training timestep; None for `default_timesteps`.
        probes: random vectors a level, at least 1.
        step: keys the probes with the seeds.
        point: what `clean` is.

    Raises:
        ValueError: no timesteps, one outside the schedule, no probes, or as many seeds as latents not given.
    """
    grid = default_timesteps(model).tolist() if timesteps is None else sorted(set(timesteps))
    if not grid:
        raise ValueError("timesteps=() has no level to look at: give at least one training timestep")
    check_probes(probes)
    product, estimator, seeds = FiniteDifference(), Hutchinson(probes), RowSeeds(model.seeds, step)
    rows: list[Tensor] = []
    for timestep in grid:
        level, predict = predict_at(model, timestep, lanes)
        rows.append(estimate_flipd(predict, clean, level, product, estimator, seeds, point=point).value)
    values, levels = torch.stack(rows), torch.tensor(grid)
    knee = knee_index(levels, values)
    lid = values.gather(0, knee[None])[0].where(values.isfinite().all(0), torch.nan)
    return FlipdCurve(timesteps=levels, values=values, knee_timestep=levels[knee.cpu()], lid=lid)


def knee_index(timesteps: Tensor, values: Tensor) -> Tensor:
    """Where a curve that falls steeply at first turns flat: the point furthest below the chord between its ends.

    At the lowest levels a network no longer resolves the manifold and FLIPD rises towards D; at high levels it falls
    because the noise covers the manifold. The axis is that of the timestep. This is the idea of Kneedle (Satopaa et al.
    2011), for which scaling the axes changes nothing, without its smoothing and its sensitivity; the FLIPD paper's own
    settings were not at hand. A curve that is nowhere below its chord does not rise at low levels, and the lowest of
    them, which is the closest look, is taken.

    Args:
        timesteps: (L,) ascending.
        values: (L, B).

    Returns:
        (B,) int64 indices into L.
    """
    share = (timesteps - timesteps[0]) / (timesteps[-1] - timesteps[0]).clamp(min=1)
    share = share.to(values)[:, None]
    depth = values[0] + share * (values[-1] - values[0]) - values
    # Rounding in the chord must not count as depth.
    tolerance = 1e-4 * values.abs().amax(0)
    return torch.where(depth.amax(0) > tolerance, depth.argmax(0), 0)


def check_probes(probes: int) -> None:
    """Refuse an empty estimate.

    Raises:
        ValueError: fewer than one probe.
    """
    if probes < 1:
        raise ValueError(f"probes={probes} measures nothing: give at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class FPRegress:
    """LID of the predicted image by regression of its log density on the log of the noise ("FPRegress", 2406.03537).

    LIDL (Tempczyk et al. 2022, arXiv 2206.14882): of data on a d-dimensional manifold, convolved with noise of
    deviation delta, the log density at a point of the manifold is ``(d - D) log delta + const``. Kamkari et al. get the
    densities from one diffusion model, by the Fokker-Planck equation: here in the form ``d log rho / d log delta =
    FLIPD - D``, ``delta = s / a``. As in the authors' code (layer6ai-labs/dgm_geometry) the equation is solved from the
    largest delta down and a line is fitted by least squares, D being added to its slope; the five deltas are LIDL's for
    one delta given, from half of it to twice. Two differences: their Euler steps in time are trapezoids in log delta
    here, and each delta is that of the nearest training timestep of the checkpoint.

    Taken at the Tweedie point ``x0_hat`` of the prompt's lane. The result is a weighted mean of five FLIPD values.

    Attributes:
        timestep: training timestep of the middle delta.
        probes: Rademacher vectors a level; each image has its own, from its seed and the step.
        at: the last step, where the prediction is the image.

    Raises:
        ValueError: no probes.
    """

    name: str = field(default="fp_regress", init=False)
    higher_is_memorized: bool = field(default=False, init=False)
    timestep: int = 40
    probes: int = 2
    at: tuple[float, ...] | None = (1.0,)

    def __post_init__(self) -> None:
        """Refuse an empty estimate."""
        check_probes(self.probes)

    @property
    def lanes(self) -> float:
        """A prediction and its probes at each of five levels."""
        return float(len(_SPREAD) * (1 + self.probes))

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,) in directions, in theory 0 to D.

        Raises:
            ValueError: the schedule has no five different levels from half to twice that of `timestep`.
        """
        sigmas = sigmas_of(model)
        if not 0 <= self.timestep < len(sigmas):
            raise ValueError(f"timestep={self.timestep} is not of this schedule: give one of 0 to {len(sigmas) - 1}")
        middle = sigmas[self.timestep]
        timesteps = nearest_timesteps(model, middle * torch.tensor(_SPREAD, dtype=torch.float64)).unique()
        if len(timesteps) < len(_SPREAD) or middle * _SPREAD[0] < sigmas[0] or middle * _SPREAD[-1] > sigmas[-1]:
            raise ValueError(
                f"timestep={self.timestep}: the schedule has no five levels from half to twice its noise; give one "
                "further from its ends"
            )
        clean = model.read(call, "conditional").x0_hat.to(call.x.dtype)
        curve = flipd_curve(
            model,
            clean,
            conditional_lanes(call),
            timesteps=timesteps.tolist(),
            probes=self.probes,
            step=call.step,
            point="tweedie",
        )
        return call.x[0].numel() + log_density_slope(sigmas[timesteps].log(), curve.values - call.x[0].numel())


def log_density_slope(log_delta: Tensor, derivative: Tensor) -> Tensor:
    """Slope of the least-squares line through a function that is known by its derivative.

    Args:
        log_delta: (L,) ascending, at least two.
        derivative: (L, B) of the function.

    Returns:
        (B,), a weighted mean of `derivative`.
    """
    derivative = at_least_float32(derivative)
    x = log_delta.to(derivative)
    rises = (derivative[1:] + derivative[:-1]) / 2 * x.diff()[:, None]
    heights = torch.cat([torch.zeros_like(rises[:1]), rises.cumsum(0)])  # a constant changes no slope
    centred = (x - x.mean())[:, None]
    return (centred * heights).sum(0) / centred.square().sum()
