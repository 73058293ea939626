"""Trajectory LIDs against oracles of known dimension, in both lanes and compared."""

import math

import pytest
import torch
from oracles import GaussianMixture, GaussianSubspace, PointMass

from sd_guard.noise import NoiseLevel
from sd_guard.statistics.dimension import (
    FlipdStatistic,
    LidContrast,
    LidRatio,
    SteinLid,
    TrajectoryLid,
    TrajectoryLidControl,
)
from tests.statistics.cases import ALPHAS, noise, oracle_case

SHAPE, D = (4, 4, 4), 64
MEAN = noise(1, 1, SHAPE).flatten(1)
POINT = PointMass(MEAN)


def gaussian(variance):
    """Isotropic: its Jacobian is a multiple of the identity, of which one Rademacher vector gives the exact trace."""
    return GaussianMixture(MEAN, torch.tensor([variance]))


def open_directions(variance, level):
    return D * level.a**2 * variance / (level.s**2 + level.a**2 * variance)


@pytest.mark.parametrize("timestep", [20, 300, 800])
def test_each_lane_by_itself(timestep):
    call, model = oracle_case(gaussian(0.5), gaussian(0.1), timestep, noise(3, 0, SHAPE))
    for statistic, variance in ((TrajectoryLid(probes=1), 0.1), (TrajectoryLidControl(probes=1), 0.5)):
        expected = torch.full((3,), open_directions(variance, call.level), dtype=torch.float64)
        torch.testing.assert_close(statistic.measure(call, model), expected, rtol=1e-5, atol=1e-5)


def test_the_prompt_against_none():
    call, model = oracle_case(gaussian(0.5), gaussian(0.1), 300, noise(3, 0, SHAPE))
    control, conditional = (open_directions(v, call.level) for v in (0.5, 0.1))
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(LidContrast().measure(call, model), ones * (control - conditional) / D)
    torch.testing.assert_close(LidRatio().measure(call, model), ones * conditional / control)


def test_both_lanes_share_their_probes():
    """The estimates themselves are off by several directions; their difference is nothing at all."""
    same = GaussianSubspace(D, 20)
    call, model = oracle_case(same, same, 300, noise(3, 0, SHAPE))
    exact = same.trajectory_lid(call.x, call.level)
    assert ((TrajectoryLid(probes=1).measure(call, model) - exact).abs() > 0.5).any()
    assert LidContrast(probes=1).measure(call, model).tolist() == [0.0] * 3
    assert LidRatio(probes=1).measure(call, model).tolist() == [1.0] * 3


def test_a_point_has_no_directions_and_a_ratio_to_none_is_finite():
    call, model = oracle_case(POINT, POINT, 300, noise(3, 0, SHAPE))
    for statistic in (TrajectoryLid(), TrajectoryLidControl(), LidContrast(), LidRatio(), FlipdStatistic()):
        assert statistic.measure(call, model).abs().max() < 1e-4


@pytest.mark.parametrize("k", [1, 5, 40])
def test_subspaces_give_their_dimension(k):
    oracle = GaussianSubspace(D, k, variance=25.0)
    level = NoiseLevel.from_alpha_bar(float(ALPHAS[20]))
    call, model = oracle_case(oracle, oracle, 20, oracle.noised(24, level, SHAPE))
    spread = 4 * math.sqrt(2 * k / (8 * 24))  # four errors of 24 images with 8 vectors each
    for statistic in (
        TrajectoryLid(probes=8),
        FlipdStatistic(timestep=None, probes=8),
        FlipdStatistic(timestep=50, probes=8),
    ):
        assert float(statistic.measure(call, model).mean()) == pytest.approx(k, rel=0.02, abs=spread)
    free = SteinLid().measure(call, model)
    torch.testing.assert_close(free, D - oracle.predict_noise(call.x, level).flatten(1).square().sum(1))
    assert float(free.mean()) == pytest.approx(k, rel=0.02, abs=4 * math.sqrt(2 * (D - k) / 24))


@pytest.mark.parametrize("timestep", [None, 50])
def test_flipd_is_that_of_the_tweedie_point_at_the_level_asked_for(timestep):
    oracle = gaussian(0.3)
    call, model = oracle_case(POINT, oracle, 400, noise(3, 0, SHAPE))
    level = call.level if timestep is None else NoiseLevel.from_alpha_bar(float(ALPHAS[timestep]))
    expected = oracle.flipd(oracle.denoise(call.x, call.level), level)
    value = FlipdStatistic(timestep=timestep, probes=1).measure(call, model)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [FlipdStatistic, TrajectoryLid, TrajectoryLidControl, LidContrast, LidRatio])
def test_refuses_no_probes(kind):
    with pytest.raises(ValueError, match="probes=0"):
        kind(probes=0)


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_refuses_a_level_that_the_checkpoint_has_not(timestep):
    call, model = oracle_case(POINT, POINT, 300, noise(1, 0, SHAPE))
    with pytest.raises(ValueError, match=f"timestep={timestep} .* 0 to 999"):
        FlipdStatistic(timestep=timestep).measure(call, model)
