"""LID estimates against Gaussians of known dimension, at the point where each is valid and where it is not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GaussianMixture, GaussianSubspace, Oracle, PointMass
from torch import Tensor

from sd_guard.noise import NoiseLevel
from sd_guard.statistics.lid import (
    contrast,
    estimate_flipd,
    estimate_trajectory_lid,
    flipd,
    probe_products,
    stein_lid,
    trajectory_lid,
)
from sd_guard.trace import (
    Exact,
    FiniteDifference,
    ForwardMode,
    Hutchinson,
    HutchPlusPlus,
    RowFunction,
    RowSeeds,
    draw_probes,
    perturb,
)

PROBES = 24
SUBSPACES = {
    "side": st.sampled_from([4, 6]),
    "k": st.integers(1, 20),
    "a": st.floats(0.3, 0.995),
    "variance": st.floats(0.05, 4.0),
    "seed": st.integers(0, 10**6),
}


def level_of(a: float) -> NoiseLevel:
    return NoiseLevel(a, math.sqrt(1.0 - a * a))


def e_hat_of(oracle: Oracle, level: NoiseLevel) -> RowFunction:
    return lambda x: oracle.predict_noise(x, level)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def within_four_errors(value: Tensor, truth: Tensor, trajectory: Tensor, k: int) -> bool:
    """Four of the true standard errors of `PROBES` probes: the spread of v . P v is at most sqrt(2 k), P of rank k."""
    stderr = trajectory / k * math.sqrt(2 * k / PROBES)
    return bool(((value - truth).abs() <= 4.0 * stderr + 1e-5 * truth.abs() + 1e-6).all())


@settings(deadline=None, max_examples=12, derandomize=True)
@given(**SUBSPACES)
def test_trajectory_lid_of_subspaces(side: int, k: int, a: float, variance: float, seed: int) -> None:
    """Within four standard errors of the closed form, exact with the exact trace, at x_t on its marginal and off."""
    level, shape = level_of(a), (4, side, side)
    oracle = GaussianSubspace(4 * side**2, k, variance, seed, shift=2.0)
    on = oracle.noised(2, level, shape, seed)
    off = 3.0 * torch.randn(2, *shape, generator=seeded(seed), dtype=torch.float64)
    for x in (on, off):
        truth = oracle.trajectory_lid(x, level)
        got = estimate_trajectory_lid(
            e_hat_of(oracle, level), x, level, FiniteDifference("central"), Hutchinson(PROBES), seeded(seed)
        )
        assert got.point == "noisy" and got.evaluations == 48 and got.value.dtype == torch.float64
        assert within_four_errors(got.value, truth, truth, k)
        exact = estimate_trajectory_lid(
            e_hat_of(oracle, level), x, level, FiniteDifference("central"), Exact(chunk=144), seeded()
        )
        torch.testing.assert_close(exact.value, truth, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=12, derandomize=True)
@given(**SUBSPACES)
def test_flipd_of_subspaces(side: int, k: int, a: float, variance: float, seed: int) -> None:
    """Within four standard errors of the closed form, at clean points and at Tweedie points (on the subspace too)."""
    level, shape = level_of(a), (4, side, side)
    oracle = GaussianSubspace(4 * side**2, k, variance, seed, shift=2.0)
    tweedie = oracle.denoise(oracle.noised(2, level, shape, seed), level)
    image = oracle.sample(2, seed).reshape(2, *shape)
    for point, clean in (("image", image), ("tweedie", tweedie)):
        got = estimate_flipd(
            e_hat_of(oracle, level), clean, level, FiniteDifference(), Hutchinson(PROBES), seeded(seed), point=point
        )
        assert got.point == point and got.evaluations == 25
        lid = oracle.trajectory_lid(level.a * clean, level)
        assert within_four_errors(got.value, oracle.flipd(clean, level), lid, k)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_both_find_k_at_low_noise_and_flipd_on_the_trajectory_does_not(k: int) -> None:
    """Trap 1 of design.md: at x_t the mean of FLIPD is D whatever k, so the wrong pairing carries no signal."""
    dimension, level = 64, level_of(math.sqrt(0.99))
    oracle = GaussianSubspace(dimension, k, 1.0)
    x = oracle.noised(2000, level, (4, 4, 4))
    e_hat = oracle.predict_noise(x, level)
    trace = (dimension - oracle.trajectory_lid(x, level)) / level.s
    clean = oracle.denoise(x, level)
    at_clean = oracle.predict_noise(level.a * clean, level)
    assert float(trajectory_lid(dimension, level.s, trace).mean()) == pytest.approx(k, rel=0.02)
    assert float(flipd(dimension, level.s, trace, at_clean).mean()) == pytest.approx(k, rel=0.02)
    wrong = flipd(dimension, level.s, trace, e_hat)
    assert float(wrong.mean()) == pytest.approx(dimension, abs=4 * float(wrong.std()) / math.sqrt(2000))
    free = stein_lid(e_hat)
    assert float(free.mean()) == pytest.approx(k, rel=0.02, abs=4 * float(free.std()) / math.sqrt(2000))


def test_a_memorized_point_has_no_dimension() -> None:
    """Rademacher probes cancel the identity exactly: LID 0 from one probe, at the latent and at the point itself."""
    level = level_of(0.7)
    oracle = PointMass(torch.randn(256, generator=seeded(1)))
    x = oracle.noised(3, level, (4, 8, 8))
    product, estimator = FiniteDifference(), Hutchinson(1)
    noisy = estimate_trajectory_lid(e_hat_of(oracle, level), x, level, product, estimator, seeded())
    clean = estimate_flipd(
        e_hat_of(oracle, level), oracle.denoise(x, level), level, product, estimator, seeded(), point="image"
    )
    assert noisy.value.abs().max() < 1e-4 and noisy.stderr is None
    assert clean.value.abs().max() < 1e-4


def test_mixture_between_memory_and_novelty() -> None:
    """A mixture of a pinned and a wide component: LID is near 0 at the first, wide at the second, exact at both."""
    level = level_of(0.9)
    means = torch.stack([torch.full((64,), 1.5), torch.full((64,), -1.5)])
    oracle = GaussianMixture(means, torch.tensor([1e-4, 1.0]))
    noise = level.s * torch.randn(2, 64, generator=seeded(3), dtype=torch.float64)
    x = (level.a * means.double() + noise).reshape(2, 4, 4, 4)
    got = estimate_trajectory_lid(e_hat_of(oracle, level), x, level, ForwardMode(), Exact(), seeded())
    torch.testing.assert_close(got.value, oracle.trajectory_lid(x, level), rtol=1e-8, atol=1e-8)
    assert got.value[0] < 0.1 and got.value[1] > 40


@pytest.mark.parametrize("product", [FiniteDifference(), FiniteDifference("central"), ForwardMode()], ids=str)
@pytest.mark.parametrize("estimator", [Hutchinson(32), HutchPlusPlus(30)], ids=str)
def test_every_pairing_in_float32(product: object, estimator: object) -> None:
    level = level_of(0.8)
    oracle = GaussianSubspace(256, 30, 1.0)
    x = oracle.noised(4, level, (4, 8, 8)).float()
    got = estimate_trajectory_lid(e_hat_of(oracle, level), x, level, product, estimator, RowSeeds(range(4)))  # type: ignore[arg-type]
    assert got.value.dtype == torch.float32 and got.value.shape == (4,)
    assert got.stderr is not None
    assert ((got.value - oracle.trajectory_lid(x, level)).abs() < 4 * got.stderr + 0.1).all()


@pytest.mark.parametrize("source", ["generator", "row seeds"])
def test_contrast_shares_its_probes(source: str) -> None:
    """The same model twice differs by exactly nothing, and a generator moves on as after one estimate."""
    level = level_of(0.8)
    wide, pinned = GaussianSubspace(256, 40, 1.0), PointMass(torch.zeros(256))
    x = wide.noised(2, level, (4, 8, 8)).float()
    first, second = seeded(5), seeded(5)
    probes = first if source == "generator" else RowSeeds([3, 4], 9)
    fd, estimator = FiniteDifference(), Hutchinson(3)
    same = contrast(e_hat_of(wide, level), e_hat_of(wide, level), x, level, fd, estimator, probes)
    assert not same.difference.any() and torch.equal(same.conditional.value, same.unconditional.value)
    if source == "generator":
        estimate_trajectory_lid(e_hat_of(wide, level), x, level, fd, estimator, second)
        assert torch.equal(first.get_state(), second.get_state())
    got = contrast(
        e_hat_of(pinned, level),
        e_hat_of(wide, level),
        x,
        level,
        fd,
        estimator,
        probes,
        e_conditional=pinned.predict_noise(x, level),
    )
    assert got.conditional.value.abs().max() < 0.05
    assert (got.conditional.evaluations, got.unconditional.evaluations) == (3, 4)
    torch.testing.assert_close(got.difference, got.conditional.value - got.unconditional.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_probe_products_show_where_the_image_is_pinned(dtype: torch.dtype) -> None:
    """Left half a point, right half wide: the map is C / s on the left, and its total is the probe's quadratic form."""
    level = level_of(0.8)
    gain = torch.zeros(1, 8, 8)
    gain[..., 4:] = 1.0  # variance 1 where open: x0_hat = a x there, and 0 elsewhere
    f: RowFunction = lambda x: x * ((1 - level.a**2 * gain) / level.s).to(x.dtype)  # noqa: E731
    x = torch.randn(2, 4, 8, 8, generator=seeded(1)).to(dtype)
    v = draw_probes(x.shape, seeded(2), "rademacher", "cpu")
    product = FiniteDifference()
    moved = perturb(x, v, product.step_for(x))
    got = probe_products(v, f(moved.point), f(x), moved.step)
    assert got.local.shape == (2, 8, 8) and got.total.shape == (2,)
    tolerance = 0.35 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(
        got.local[..., :4], torch.full((2, 8, 4), 4 / level.s, dtype=got.local.dtype), rtol=tolerance, atol=0
    )
    torch.testing.assert_close(
        got.local[..., 4:], torch.full((2, 8, 4), 4 * level.s, dtype=got.local.dtype), rtol=tolerance, atol=0
    )
    reference = (v * product(f, x, v)).flatten(1).sum(1)
    torch.testing.assert_close(got.total, reference, rtol=1e-5, atol=1e-4)
    lid = trajectory_lid(256, level.s, got.total)
    assert ((lid - 128 * level.a**2).abs() < (3.0 if dtype == torch.bfloat16 else 0.1)).all()


def test_half_precision_in_float32_out() -> None:
    e_hat = torch.randn(2, 4, 8, 8, generator=seeded(1)).half()
    trace = torch.tensor([300.0, 10.0]).half()
    for value in (stein_lid(e_hat), flipd(256, 0.5, trace, e_hat), trajectory_lid(256, 0.5, trace)):
        assert value.dtype == torch.float32 and value.shape == (2,)
    assert trajectory_lid(256, 0.5, trace.double()).dtype == torch.float64
