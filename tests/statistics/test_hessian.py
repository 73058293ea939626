"""The Hessian-vector norm against the exact Jacobians of mixtures, and in closed form."""

import math

import pytest
import torch
from oracles import GaussianMixture

from sd_guard.statistics.hessian import HessianScoreNorm
from sd_guard.trace import FiniteDifference, ForwardMode
from tests.statistics.cases import jacobian, noise, oracle_case


def mixture(seed, variance):
    means = noise(3, seed).flatten(1)
    return GaussianMixture(means, torch.full((3,), variance))


@pytest.mark.parametrize("timestep", [981, 500, 100])
@pytest.mark.parametrize("product", [FiniteDifference("central"), FiniteDifference(), ForwardMode()], ids=repr)
def test_against_the_exact_jacobians(timestep, product):
    control, conditional = mixture(1, 0.5), mixture(2, 0.05)
    x = noise(4)
    call, model = oracle_case(control, conditional, timestep, x)
    e_u, e_c = call.control.flatten(1), call.conditional.flatten(1)
    hessian = (jacobian(conditional, call) - jacobian(control, call)) / -call.level.s
    score = (e_c - e_u) / -call.level.s
    expected = torch.einsum("bij,bj->bi", hessian, score).norm(dim=1)
    value = HessianScoreNorm(product=product).measure(call, model)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)


def test_of_two_gaussians_in_closed_form():
    """Scores -(x - a m) / (s^2 + a^2 v), so the Hessians are multiples of the identity."""
    means, variances = noise(2, 3).flatten(1), (1.0, 0.01)
    control, conditional = (GaussianMixture(m[None], torch.tensor([v])) for m, v in zip(means, variances, strict=True))
    x = noise(5, 1)
    call, model = oracle_case(control, conditional, 700, x)
    a, s = call.level.a, call.level.s
    precision = [1 / (s**2 + a**2 * v) for v in variances]
    scores = [-(x.flatten(1) - a * m) * p for m, p in zip(means, precision, strict=True)]
    expected = (scores[1] - scores[0]).norm(dim=1) * abs(precision[0] - precision[1])
    torch.testing.assert_close(HessianScoreNorm().measure(call, model), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("scheme", "lanes"), [("forward", 2), ("central", 4)])
def test_cost(scheme, lanes):
    statistic = HessianScoreNorm(product=FiniteDifference(scheme))
    call, model = oracle_case(mixture(1, 0.5), mixture(2, 0.05), 500, noise(3))
    statistic.measure(call, model)
    assert statistic.lanes == lanes and model.unet.rows == 3 * lanes


def test_no_guidance_is_no_sharpness():
    call, model = oracle_case(mixture(1, 0.5), mixture(1, 0.5), 500, noise(2))
    assert HessianScoreNorm().measure(call, model).tolist() == [0.0, 0.0]
    assert math.isfinite(call.level.sigma)
