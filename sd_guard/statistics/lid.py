"""Local intrinsic dimension (LID) of a denoiser: how many directions it leaves open at a latent.

Three estimates share the trace of the noise prediction's Jacobian, and are valid at different points. At a *noisy*
``x_t`` only the trajectory LID carries a signal: there ``E|e_hat|^2`` equals ``s E[tr d e_hat/dx]``, so FLIPD's two
terms cancel and leave the latent dimension D whatever the data. FLIPD belongs to a *clean* point scaled by ``a``. Every
result names the point it was taken at. All functions take and return per-image values (B,), in float32 or better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sd_guard.noise import NoiseLevel, at_least_float32
from sd_guard.trace import JacobianProduct, ProbeSource, RowFunction, TraceEstimator

CleanPoint: TypeAlias = Literal["tweedie", "image"]
Point: TypeAlias = Literal["noisy", "tweedie", "image"]


def trajectory_lid(dimension: int, s: float, trace: Tensor) -> Tensor:
    """LID at a noisy latent: ``D - s tr(d e_hat/dx)``, which is ``(a/s)^2 tr Cov[x_0 | x_t]``.

    Args:
        dimension: D, the number of entries of one latent.
        s: Standard deviation of the noise at x_t.
        trace: tr(d e_hat/dx) at x_t, (B,).

    Returns:
        Directions left open, from 0 (one image) to D, (B,).
    """
    return dimension - s * at_least_float32(trace)


def flipd(dimension: int, s: float, trace: Tensor, e_hat: Tensor) -> Tensor:
    """FLIPD (Kamkari et al. 2024, arXiv 2406.03537): ``D - s tr(d e_hat/dx) + |e_hat|^2`` at ``a x``, x clean.

    Args:
        dimension: D, the number of entries of one latent.
        s: Standard deviation of the noise, which sets the scale at which the manifold is looked at.
        trace: tr(d e_hat/dx) at ``a x``, (B,).
        e_hat: Predicted noise at ``a x``, (B, *S). Taken at a noisy latent, the mean is D whatever the data.

    Returns:
        Dimension of the model's manifold at x, (B,).
    """
    return trajectory_lid(dimension, s, trace) + _square_norm(e_hat)


def stein_lid(e_hat: Tensor) -> Tensor:
    """``D - |e_hat|^2`` at x_t: the trajectory LID in expectation over x_t only (Stein's identity), at no cost.

    Args:
        e_hat: Predicted noise at x_t, (B, *S).

    Returns:
        A free, noisy LID: its own deviation is about sqrt(2 D), (B,).
    """
    return e_hat[0].numel() - _square_norm(e_hat)


@dataclass(frozen=True, slots=True)
class LidEstimate:
    """An estimated LID per image.

    Attributes:
        point: Where it was taken: ``noisy`` (x_t), ``tweedie`` (a x0_hat) or ``image`` (a times an encoded image).
        value: LID, (B,).
        stderr: Standard error over the probes, (B,); None if a single probe cannot tell.
        evaluations: UNet evaluations spent a row.
    """

    point: Point
    value: Tensor
    stderr: Tensor | None
    evaluations: int


def estimate_trajectory_lid(
    predict_noise: RowFunction,
    x: Tensor,
    level: NoiseLevel,
    product: JacobianProduct,
    estimator: TraceEstimator,
    generator: ProbeSource,
    *,
    e_hat: Tensor | None = None,
) -> LidEstimate:
    """Trajectory LID at the noisy latent `x`.

    Args:
        predict_noise: e_hat at the fixed timestep and conditioning, (B, *S) -> (B, *S).
        x: The UNet's input, (B, *S).
        level: The noise level of `x`.
        product: How Jacobian products are taken.
        estimator: How the trace is estimated from them.
        generator: Source of the probes: a generator, or the rows' seeds.
        e_hat: ``predict_noise(x)`` where the sampling loop has it already.

    Returns:
        The estimate, at the point ``noisy``.
    """
    trace = estimator.estimate(predict_noise, x, product, generator, e_hat)
    value = trajectory_lid(x[0].numel(), level.s, trace.value)
    return LidEstimate("noisy", value, _scaled(trace.stderr, level.s), trace.evaluations)


def estimate_flipd(
    predict_noise: RowFunction,
    clean: Tensor,
    level: NoiseLevel,
    product: JacobianProduct,
    estimator: TraceEstimator,
    generator: ProbeSource,
    *,
    point: CleanPoint = "tweedie",
) -> LidEstimate:
    """FLIPD of clean latents, evaluated at ``a clean``.

    Args:
        predict_noise: e_hat at the timestep of `level`, (B, *S) -> (B, *S).
        clean: x0_hat of a step, or an encoded image; *not* a noisy latent, (B, *S).
        level: Noise level at which the manifold is looked at.
        product: How Jacobian products are taken.
        estimator: How the trace is estimated from them.
        generator: Source of the probes: a generator, or the rows' seeds.
        point: Which of the two `clean` is.

    Returns:
        The estimate, at `point`.
    """
    x = (level.a * at_least_float32(clean)).to(clean.dtype)
    e_hat = predict_noise(x)
    trace = estimator.estimate(predict_noise, x, product, generator, e_hat)
    value = flipd(x[0].numel(), level.s, trace.value, e_hat)
    return LidEstimate(point, value, _scaled(trace.stderr, level.s), trace.evaluations + 1)


@dataclass(frozen=True, slots=True)
class LidContrast:
    """Trajectory LID with and without the prompt, on the same probes.

    Attributes:
        conditional: With the prompt.
        unconditional: Without it.
        difference: Conditional minus unconditional, (B,). A small one does not clear an image: at a memorized latent
            the unconditional LID collapses too.
    """

    conditional: LidEstimate
    unconditional: LidEstimate
    difference: Tensor


def contrast(
    predict_conditional: RowFunction,
    predict_unconditional: RowFunction,
    x: Tensor,
    level: NoiseLevel,
    product: JacobianProduct,
    estimator: TraceEstimator,
    generator: ProbeSource,
    *,
    e_conditional: Tensor | None = None,
    e_unconditional: Tensor | None = None,
) -> LidContrast:
    """Conditional and unconditional trajectory LID with shared probes, so that their noise cancels in the difference.

    Guidance itself is left out: its combination ``g T_c - (g - 1) T_u`` of the two traces is no dimension.

    Args:
        predict_conditional: e_hat with the prompt, (B, *S) -> (B, *S).
        predict_unconditional: e_hat without it.
        x: The UNet's input, (B, *S).
        level: The noise level of `x`.
        product: How Jacobian products are taken.
        estimator: How the trace is estimated from them.
        generator: Source of the probes; a generator is advanced once for both.
        e_conditional: ``predict_conditional(x)`` if known.
        e_unconditional: ``predict_unconditional(x)`` if known.

    Returns:
        Both estimates and their difference.
    """
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    with_prompt = estimate_trajectory_lid(
        predict_conditional, x, level, product, estimator, generator, e_hat=e_conditional
    )
    if isinstance(generator, torch.Generator) and state is not None:
        generator.set_state(state)
    without = estimate_trajectory_lid(
        predict_unconditional, x, level, product, estimator, generator, e_hat=e_unconditional
    )
    return LidContrast(with_prompt, without, with_prompt.value - without.value)


@dataclass(frozen=True, slots=True)
class ProbeProducts:
    """One probe's view of the Jacobian of e_hat.

    Attributes:
        local: ``v * (J v)`` summed over channels, (B, H, W); about C/s where the image is pinned, less where open.
        total: Its sum, an unbiased estimate of the trace, (B,).
    """

    local: Tensor
    total: Tensor


def probe_products(v: Tensor, e_hat_perturbed: Tensor, e_hat: Tensor, h: float | Tensor) -> ProbeProducts:
    """Local and total quadratic form from one perturbed evaluation.

    Args:
        v: Probe, (B, C, H, W).
        e_hat_perturbed: Predicted noise at ``x + h v``, (B, C, H, W).
        e_hat: Predicted noise at x, (B, C, H, W).
        h: Step; in half precision give the realised ``Perturbation.step`` (B, C, H, W) of `sd_guard.trace.perturb`.

    Returns:
        The map and its total, in float32 or better.
    """
    difference = at_least_float32(e_hat_perturbed) - at_least_float32(e_hat)
    local = (v.to(difference.device) * difference / h).sum(1)
    return ProbeProducts(local, local.flatten(1).sum(1))


def _square_norm(tensor: Tensor) -> Tensor:
    return at_least_float32(tensor).flatten(1).square().sum(1)


def _scaled(stderr: Tensor | None, s: float) -> Tensor | None:
    return None if stderr is None else s * stderr
