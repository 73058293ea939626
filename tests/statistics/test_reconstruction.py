"""The denoising loss at the predicted image against its closed form."""

import pytest
import torch
from oracles import GaussianSubspace, PointMass

from sd_guard.noise import NoiseLevel
from sd_guard.statistics.reconstruction import ReconstructionCost
from sd_guard.trace import RowSeeds, draw_probes
from tests.statistics.cases import ALPHAS, noise, oracle_case

SHAPE, D = (4, 4, 4), 64


def test_a_point_is_reconstructed_at_no_cost():
    oracle = PointMass(noise(1, 1, SHAPE))
    call, model = oracle_case(PointMass(torch.zeros(D)), oracle, 400, noise(3, 0, SHAPE))
    assert ReconstructionCost().measure(call, model).max() < 1e-12


@pytest.mark.parametrize("timestep", [50, 200, 600])
def test_a_subspace_costs_what_the_posterior_leaves_open(timestep):
    """E|e_hat - e|^2 = (a/s)^2 ((1 - g a)^2 |z|^2 + g^2 s^2 k), z the point's place on the subspace, g the gain."""
    k, variance = 10, 2.0
    oracle = GaussianSubspace(D, k, variance, shift=1.0)
    call, model = oracle_case(PointMass(torch.zeros(D)), oracle, 400, noise(3, 0, SHAPE))
    level = NoiseLevel.from_alpha_bar(float(ALPHAS[timestep]))
    a, s = level.a, level.s
    gain = a * variance / (s**2 + a**2 * variance)
    place = (oracle.denoise(call.x, call.level).flatten(1) - oracle.mean) @ oracle.basis
    expected = (a / s) ** 2 * ((1 - gain * a) ** 2 * place.square().sum(1) + gain**2 * s**2 * k) / D
    value = ReconstructionCost(timestep=timestep, draws=200).measure(call, model)
    torch.testing.assert_close(value, expected, rtol=4 * (2 / (k * 200)) ** 0.5 * 1.5, atol=0)


def test_the_noise_is_the_images_own():
    oracle = GaussianSubspace(D, 10, 2.0)
    call, model = oracle_case(PointMass(torch.zeros(D)), oracle, 400, noise(2, 0, SHAPE))
    level = NoiseLevel.from_alpha_bar(float(ALPHAS[200]))
    e = draw_probes((2, *SHAPE), RowSeeds(model.seeds, call.step), "gaussian", "cpu").double()
    e_hat = oracle.predict_noise(level.a * oracle.denoise(call.x, call.level) + level.s * e, level)
    expected = (e_hat - e).flatten(1).square().mean(1)
    torch.testing.assert_close(ReconstructionCost(timestep=200, draws=1).measure(call, model), expected)


def test_refusals():
    call, model = oracle_case(PointMass(torch.zeros(D)), PointMass(torch.zeros(D)), 400, noise(1, 0, SHAPE))
    with pytest.raises(ValueError, match="draws=0"):
        ReconstructionCost(draws=0)
    with pytest.raises(ValueError, match="timestep=1000"):
        ReconstructionCost(timestep=1000).measure(call, model)
