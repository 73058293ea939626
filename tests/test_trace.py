"""Jacobian products against each other and against autograd; trace estimators against exact traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GaussianMixture
from torch import Tensor

from sd_guard.noise import NoiseLevel
from sd_guard.trace import (
    ESTIMATORS,
    PRODUCTS,
    Exact,
    FiniteDifference,
    ForwardMode,
    Hutchinson,
    HutchPlusPlus,
    JacobianProduct,
    ReverseMode,
    RowSeeds,
    draw_probes,
    draw_row_probes,
    perturb,
)

SHAPE = (4, 8, 8)
LEVEL = NoiseLevel(0.8, 0.6)
ALL_PRODUCTS: list[JacobianProduct] = [
    FiniteDifference(),
    FiniteDifference("central"),
    ForwardMode(),
    ReverseMode(),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture() -> GaussianMixture:
    means = torch.randn(3, 256, generator=seeded(5), dtype=torch.float64) * 0.1
    return GaussianMixture(means, torch.tensor([0.5, 0.1, 0.3]))


def linear(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """The map x -> A x on flattened rows, whose Jacobian is A."""
    return lambda x: (x.flatten(1) @ matrix.T.to(x.dtype)).reshape(x.shape)


@cache
def tiny_unet(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A random UNet2DConditionModel with cross-attention; row i is conditioned on its own embedding."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        prompts = torch.randn(4, 7, 32)
    unet = unet.eval().requires_grad_(False).to(dtype)
    return lambda x: unet(x, 500, encoder_hidden_states=prompts[: len(x)].to(dtype), return_dict=False)[0]


@cache
def unet_truth() -> tuple[Tensor, Tensor, Tensor]:
    """Latents exact in bfloat16, probes, and the float64 Jacobian products of the tiny UNet."""
    x = torch.randn(4, 4, 8, 8, generator=seeded(1)).bfloat16().double()
    v = draw_row_probes(range(4), x.shape[1:], 0, "cpu")
    return x, v, ForwardMode()(tiny_unet(torch.float64), x, v)


def quadratic(v: Tensor, jv: Tensor) -> Tensor:
    return (v * jv).flatten(1).sum(1)


# Jacobian products ---------------------------------------------------------------------------------------------------
def test_products_agree_with_autograd_in_float64() -> None:
    """On a curved map: 1e-10 for the two modes, 1e-6 for finite differences, in v . J v and elementwise."""
    x = mixture().noised(2, LEVEL, SHAPE)
    torch.manual_seed(0)
    mix = torch.randn(256, 256, dtype=torch.float64) / 16

    def f(z: Tensor) -> Tensor:
        return torch.tanh(linear(mix)(z)) + z**2

    v = draw_probes(x.shape, seeded(), "gaussian", "cpu").double()
    jacobians = [torch.func.jacrev(f)(row[None]).reshape(256, 256) for row in x]
    exact = torch.stack([j @ row.flatten() for j, row in zip(jacobians, v, strict=True)]).reshape(x.shape)
    transposed = torch.stack([j.T @ row.flatten() for j, row in zip(jacobians, v, strict=True)]).reshape(x.shape)
    for product in ALL_PRODUCTS:
        got = product(f, x, v, f(x))
        tolerance = 1e-6 if isinstance(product, FiniteDifference) else 1e-10
        want = transposed if isinstance(product, ReverseMode) else exact
        assert got.dtype == torch.float64 and got.shape == x.shape
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(quadratic(v, got), quadratic(v, exact), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("product", ALL_PRODUCTS, ids=str)
def test_products_on_an_oracle_denoiser_float64(product: JacobianProduct) -> None:
    oracle = mixture()
    x = oracle.noised(2, LEVEL, SHAPE)
    e_hat = lambda z: oracle.predict_noise(z, LEVEL)  # noqa: E731
    got = Exact(chunk=64).estimate(e_hat, x, product, seeded())
    want = (256 - oracle.trajectory_lid(x, LEVEL)) / LEVEL.s
    torch.testing.assert_close(got.value, want, rtol=1e-6, atol=0)
    assert got.stderr is not None and not got.stderr.any()


# Root mean square error of one Rademacher probe's v . J v, relative to that probe's own spread sqrt(2) |J|_F: what the
# arithmetic adds to what a probe costs anyway. Measured over 12 probes and rows (torch 2.13, CPU), and the bound here.
ERRORS = {
    ("forward", torch.float32): 0.003,  # 0.0013
    ("central", torch.float32): 0.0005,  # 0.0001
    ("forward", torch.float16): 0.12,  # 0.06
    ("central", torch.float16): 0.04,  # 0.016
    ("forward", torch.bfloat16): 0.35,  # 0.18
    ("central", torch.bfloat16): 0.08,  # 0.03
}


@pytest.mark.parametrize(("scheme", "dtype"), ERRORS, ids=str)
def test_short_floats_on_a_unet(scheme: Any, dtype: torch.dtype) -> None:
    x, v, truth = unet_truth()
    spread = math.sqrt(2.0) * truth.flatten(1).norm(dim=1)
    got = FiniteDifference(scheme)(tiny_unet(dtype), x.to(dtype), v)
    assert got.dtype == torch.float32
    error = ((quadratic(v, got) - quadratic(v, truth)) / spread).square().mean().sqrt()
    assert error < ERRORS[scheme, dtype]


@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_default_steps_sit_at_the_minimum(scheme: Any, dtype: torch.dtype) -> None:
    """The error in J v is within 2.5 of the least around, and far below that of much shorter or longer steps."""
    x, v, truth = unet_truth()
    step = FiniteDifference(scheme).step_for(torch.empty(1, dtype=dtype))
    errors = [
        float((FiniteDifference(scheme, step * 2.0**k)(tiny_unet(dtype), x.to(dtype), v) - truth).norm())
        for k in (-4, -1, 0, 1, 3)
    ]
    assert errors[2] < 2.5 * min(errors)
    assert errors[0] > 3 * errors[2] and errors[-1] > 2 * errors[2]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 0.005), (torch.bfloat16, 0.03)])
def test_forward_mode_in_short_floats(dtype: torch.dtype, bound: float) -> None:
    x, v, truth = unet_truth()
    got = ForwardMode()(tiny_unet(dtype), x.to(dtype), v)
    spread = math.sqrt(2.0) * truth.flatten(1).norm(dim=1)
    assert ((quadratic(v, got) - quadratic(v, truth)) / spread).square().mean().sqrt() < bound


@settings(deadline=None, max_examples=20)
@given(
    step=st.floats(2.0**-9, 0.5), scale=st.floats(0.01, 30.0), dtype=st.sampled_from([torch.float16, torch.bfloat16])
)
def test_identity_jacobian_survives_any_rounding(step: float, scale: float, dtype: torch.dtype) -> None:
    """The part of J that must cancel in D - s tr J: a diagonal Jacobian is exact, though the input was rounded."""
    x = (scale * torch.randn(2, 256, generator=seeded(3))).to(dtype)
    v = draw_probes(x.shape, seeded(4), "rademacher", "cpu")
    moved = perturb(x, v, step)
    still = moved.point == x
    got = FiniteDifference(step=step)(lambda z: z, x, v)
    torch.testing.assert_close(got[~still], v[~still], rtol=1e-6, atol=0)
    assert not got[still].any()


def test_forward_difference_reuses_the_base_evaluation() -> None:
    calls: list[int] = []

    def f(z: Tensor) -> Tensor:
        calls.append(len(z))
        return 2 * z

    x = torch.randn(3, 4, generator=seeded())
    got = Hutchinson(2).estimate(f, x, FiniteDifference(), seeded(), fx=2 * x)
    assert calls == [3, 3] and got.evaluations == 2
    assert Hutchinson(2).estimate(f, x, FiniteDifference(), seeded()).evaluations == 3 == len(calls) - 2
    assert Hutchinson(2).estimate(f, x, FiniteDifference("central"), seeded()).evaluations == 4 == len(calls) - 5


def backends() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


@contextmanager
def without_flash() -> Iterator[None]:
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def test_forward_mode_leaves_the_attention_kernels_as_found() -> None:
    x, v, _ = unet_truth()
    inside: list[tuple[bool, ...]] = []

    def f(z: Tensor) -> Tensor:
        inside.append(backends())
        return tiny_unet(torch.float64)(z)

    def broken(z: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with without_flash():
        before = backends()
        assert before[0] is False
        with torch.no_grad():
            ForwardMode()(f, x, v)
        assert inside == [(False, False, True, False)]
        assert backends() == before
        with pytest.raises(RuntimeError, match="out of memory"):
            ForwardMode()(broken, x, v)
        assert backends() == before


def test_modes_agree_through_a_unet_under_no_grad() -> None:
    x, v, truth = unet_truth()
    with torch.no_grad():
        reverse = ReverseMode()(tiny_unet(torch.float64), x, v)
        central = FiniteDifference("central")(tiny_unet(torch.float64), x, v)
    torch.testing.assert_close(quadratic(v, reverse), quadratic(v, truth), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(quadratic(v, central), quadratic(v, truth), rtol=1e-6, atol=0)
    assert not reverse.requires_grad


# Trace estimators ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("product", ALL_PRODUCTS, ids=str)
def test_rademacher_is_exact_on_diagonal_jacobians(product: JacobianProduct) -> None:
    diagonal = torch.randn(256, generator=seeded(1), dtype=torch.float64)
    x = torch.randn(2, *SHAPE, generator=seeded(2), dtype=torch.float64)
    got = Hutchinson(1).estimate(lambda z: z * diagonal.reshape(SHAPE), x, product, seeded())
    torch.testing.assert_close(got.value, diagonal.sum().expand(2), rtol=1e-6, atol=1e-6)
    assert got.stderr is None


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("source", ["generator", "row seeds"])
def test_hutchinson_is_unbiased_and_knows_its_error(distribution: Any, source: str) -> None:
    """400 rows share one matrix: their mean hits the trace, their spread is the theory's and what stderr says."""
    matrix = torch.randn(32, 32, generator=seeded(1), dtype=torch.float64)
    x = torch.zeros(400, 32, dtype=torch.float64)
    probes = seeded() if source == "generator" else RowSeeds(range(400), 7)
    got = Hutchinson(8, distribution).estimate(linear(matrix), x, ForwardMode(), probes)
    symmetric = (matrix + matrix.T) / 2
    if distribution == "rademacher":
        symmetric = symmetric - torch.diag(symmetric.diagonal())
    deviation = math.sqrt(2 * float(symmetric.square().sum()) / 8)
    assert abs(float(got.value.mean() - matrix.trace())) < 4 * deviation / math.sqrt(400)
    assert float(got.value.std()) == pytest.approx(deviation, rel=0.15)
    assert got.stderr is not None
    assert float(got.stderr.square().mean().sqrt()) == pytest.approx(deviation, rel=0.1)


@settings(deadline=None, max_examples=20)
@given(rank=st.integers(1, 4), seed=st.integers(0, 100))
def test_hutch_plus_plus_is_exact_for_low_rank(rank: int, seed: int) -> None:
    left = torch.randn(64, rank, generator=seeded(seed), dtype=torch.float64)
    right = torch.randn(64, rank, generator=seeded(seed + 1000), dtype=torch.float64)
    x = torch.randn(2, 64, generator=seeded(seed), dtype=torch.float64)
    got = HutchPlusPlus(3 * rank).estimate(linear(left @ right.T), x, ForwardMode(), seeded(seed))
    torch.testing.assert_close(got.value, (left * right).sum().expand(2), rtol=1e-8, atol=1e-7)
    assert got.evaluations == 3 * rank * 2


def test_hutch_plus_plus_beats_hutchinson_on_decaying_spectra() -> None:
    basis = torch.linalg.qr(torch.randn(64, 64, generator=seeded(2), dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.arange(1, 65, dtype=torch.float64) ** -2) @ basis.T
    x = torch.zeros(200, 64, dtype=torch.float64)
    spread = [
        float((e.estimate(linear(matrix), x, ForwardMode(), seeded(3)).value - matrix.trace()).square().mean().sqrt())
        for e in (Hutchinson(12), HutchPlusPlus(12))
    ]
    assert spread[1] < spread[0] / 3


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_exact_in_chunks(chunk: int) -> None:
    matrix = torch.randn(12, 12, generator=seeded(1), dtype=torch.float64)
    got = Exact(chunk).estimate(linear(matrix), torch.zeros(3, 12, dtype=torch.float64), ReverseMode(), seeded())
    torch.testing.assert_close(got.value, matrix.trace().expand(3))


@pytest.mark.parametrize("estimator", [Hutchinson(2), HutchPlusPlus(3)], ids=str)
def test_rows_do_not_depend_on_their_batchmates(estimator: Any) -> None:
    """With row seeds the probes are bit-identical, and float32 results agree to 1e-5."""
    f, product = tiny_unet(torch.float32), FiniteDifference("central")
    x = unet_truth()[0].float()
    together = estimator.estimate(f, x, product, RowSeeds([11, 12, 13, 14], 5)).value
    alone = estimator.estimate(f, x[:1], product, RowSeeds([11], 5)).value
    # one row's arithmetic may differ in the last bits by kernel: a difference quotient magnifies them by 1 / step
    torch.testing.assert_close(together[:1], alone, rtol=2e-3, atol=0)
    exact = estimator.estimate(f, x, ForwardMode(), RowSeeds([11, 12, 13, 14], 5)).value
    torch.testing.assert_close(
        exact[:1], estimator.estimate(f, x[:1], ForwardMode(), RowSeeds([11], 5)).value, rtol=1e-5, atol=1e-4
    )


# Probes --------------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=20)
@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4),
    step=st.integers(0, 999),
    probe=st.integers(0, 99),
    shape=st.sampled_from([(4, 8, 8), (3, 5), (1,), (130,)]),
)
def test_row_probes_depend_on_seed_step_and_index_only(
    seeds: list[int], step: int, probe: int, shape: tuple[int, ...]
) -> None:
    batch = draw_row_probes(seeds, shape, step, "cpu", probe)
    assert batch.shape == (len(seeds), *shape) and batch.dtype == torch.float32
    assert set(batch.unique().tolist()) <= {-1.0, 1.0}
    for i, seed in enumerate(seeds):
        assert torch.equal(batch[i], draw_row_probes([seed], shape, step, "cpu", probe)[0])


def test_row_probes_are_fresh_and_balanced() -> None:
    """Seeds, steps and indices give uncorrelated vectors; pinned bits keep old records reproducible."""
    shape = (4, 64, 64)
    vectors = torch.cat(
        [draw_row_probes([s], shape, t, "cpu", p).flatten(1) for s in (0, 1) for t in (0, 1) for p in (0, 1)]
    )
    gram = vectors @ vectors.T / vectors.shape[1]
    assert (gram - torch.eye(8)).abs().max() < 5 / math.sqrt(vectors.shape[1])
    assert vectors.mean(1).abs().max() < 5 / math.sqrt(vectors.shape[1])
    assert draw_row_probes([42], (16,), 3, "cpu", 1).int().flatten().tolist() == [
        -1,
        -1,
        1,
        1,
        -1,
        1,
        -1,
        1,
        -1,
        1,
        -1,
        1,
        1,
        1,
        1,
        1,
    ]


def test_generators_advance_and_are_reproducible() -> None:
    one, two = seeded(), seeded()
    first = draw_probes((2, 8), one, "rademacher", "cpu")
    assert torch.equal(first, draw_probes((2, 8), two, "rademacher", "cpu"))
    assert not torch.equal(first, draw_probes((2, 8), one, "rademacher", "cpu"))


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 row seeds"):
        draw_probes((3, 8), RowSeeds([1, 2]), "rademacher", "cpu")
    with pytest.raises(ValueError, match="at least one"):
        Hutchinson(0)
    with pytest.raises(ValueError, match="at least three"):
        HutchPlusPlus(2)


def test_families_are_named() -> None:
    assert set(PRODUCTS) == {"finite-difference", "forward-mode", "reverse-mode"}
    assert set(ESTIMATORS) == {"hutchinson", "hutch++", "exact"}


@pytest.mark.parametrize("seed", [0, 2**53, 2**63 + 12345, 2**64 - 2])
def test_neighbouring_seeds_have_different_probes(seed: int) -> None:
    """Up to the last bit of a seed: above 2^63 a list of integers would silently become floats."""
    first, second = draw_row_probes([seed, seed + 1], (4, 8, 8), 5, torch.device("cpu"))
    assert not torch.equal(first, second)
