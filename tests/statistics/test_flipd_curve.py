"""The FLIPD curve, its knee, and FPRegress: against closed forms, and fits of NumPy to exact densities."""

import dataclasses

import numpy as np
import pytest
import torch
from oracles import GaussianMixture, GaussianSubspace, PointMass

from sd_guard.lanes import Conditioning
from sd_guard.noise import NoiseLevel
from sd_guard.statistics.base import Denoiser
from sd_guard.statistics.flipd_curve import (
    FPRegress,
    default_timesteps,
    flipd_curve,
    knee_index,
    log_density_slope,
    nearest_timesteps,
    sigmas_of,
)
from tests.statistics.cases import ALPHAS, noise, oracle_case

SHAPE, D = (4, 4, 4), 64


def behind(oracle, rows, prediction_type="epsilon"):
    """An oracle's denoiser, and conditioning that it does not read."""
    model = Denoiser(oracle.as_unet(ALPHAS, prediction_type), prediction_type, ALPHAS, list(range(rows)))
    return model, Conditioning(torch.zeros(rows, 1, 1))


def clean_points(oracle, rows):
    return oracle.sample(rows).reshape(rows, *SHAPE)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_value_is_flipd_at_its_level(prediction_type):
    oracle = GaussianMixture(noise(1, 1, SHAPE).flatten(1), torch.tensor([0.3]))
    clean = clean_points(oracle, 3)
    model, lanes = behind(oracle, 3, prediction_type)
    curve = flipd_curve(model, clean, lanes, timesteps=[500, 5, 100], probes=1)
    assert curve.timesteps.tolist() == [5, 100, 500]
    levels = [NoiseLevel.from_alpha_bar(float(ALPHAS[t])) for t in (5, 100, 500)]
    expected = torch.stack([oracle.flipd(clean, level) for level in levels])
    torch.testing.assert_close(curve.values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 7, 40])
@pytest.mark.parametrize("variance", [1.0, 25.0])
def test_the_knee_finds_the_dimension(k, variance):
    oracle = GaussianSubspace(D, k, variance)
    clean = clean_points(oracle, 4)
    model, lanes = behind(oracle, 4)
    curve = flipd_curve(model, clean, lanes, probes=32)
    assert curve.values.shape == (len(curve.timesteps), 4) and curve.lid.shape == (4,)
    at = [curve.timesteps.tolist().index(t) for t in curve.knee_timestep.tolist()]
    assert torch.equal(curve.lid, curve.values[at, range(4)])
    assert float(curve.lid.mean()) == pytest.approx(k, rel=0.1, abs=4 * (2 * k / 128) ** 0.5)


def test_a_point_has_no_directions_at_any_level():
    oracle = PointMass(noise(1, 1, SHAPE))
    model, lanes = behind(oracle, 2)
    curve = flipd_curve(model, clean_points(oracle, 2), lanes, probes=1)
    assert curve.values.abs().max() < 1e-4


def test_default_levels_are_the_checkpoints_own():
    model, _ = behind(PointMass(torch.zeros(D)), 1)
    grid, sigmas = default_timesteps(model), sigmas_of(model)
    assert grid[0] == 0 and len(grid) == 12 and (grid.diff() > 0).all()
    assert float(sigmas[grid[-1]]) == pytest.approx(1.0, rel=0.01)
    steps = sigmas[grid].log().diff()
    assert steps.max() < 1.5 * steps.min()
    # A checkpoint of another schedule is read at other timesteps, of the same noise.
    noisier = dataclasses.replace(model, alphas_cumprod=ALPHAS[::2] ** 2)
    assert not torch.equal(default_timesteps(noisier), grid)
    assert float(sigmas_of(noisier)[default_timesteps(noisier)[-1]]) == pytest.approx(1.0, rel=0.01)


def test_nearest_timesteps_find_themselves():
    model, _ = behind(PointMass(torch.zeros(D)), 1)
    assert nearest_timesteps(model, sigmas_of(model)[[3, 77, 999]]).tolist() == [3, 77, 999]


@pytest.mark.parametrize(
    ("values", "knee"),
    [
        ([9.0, 3.0, 1.0, 0.5, 0.0], 2),  # falls and flattens: depths below the chord 3.75, 3.5 at uneven distances
        ([5.0, 4.9, 4.5, 3.0, 0.0], 0),  # nowhere below its chord
        ([2.0, 2.0, 2.0, 2.0, 2.0], 0),
        ([1.0, -3.0, -1.0, 0.0, 1.0], 1),  # below zero, and level ends
    ],
)
def test_the_knee_is_furthest_below_the_chord(values, knee):
    timesteps = torch.tensor([0, 10, 30, 60, 100])
    share = timesteps / 100
    curve = torch.tensor(values)
    depth = curve[0] + share * (curve[-1] - curve[0]) - curve
    assert depth.argmax() == knee or depth.max() <= 0 or values[0] == values[1]
    both = torch.stack([curve, curve * 7 - 3], dim=1)  # scaling the axes moves no knee
    assert knee_index(timesteps, both).tolist() == [knee, knee]


def test_one_level_is_its_own_knee():
    assert knee_index(torch.tensor([40]), torch.tensor([[3.0, 4.0]])).tolist() == [0, 0]


def test_slope_is_that_of_numpys_fit():
    x = torch.tensor([-2.0, -1.5, -0.3, 0.4, 1.0], dtype=torch.float64)
    derivative = torch.stack([2 * x, torch.full_like(x, -5.0)], dim=1)  # of x^2, which trapezoids integrate exactly
    expected = [np.polyfit(x, x**2, 1)[0], -5.0]
    torch.testing.assert_close(log_density_slope(x, derivative), torch.tensor(expected, dtype=torch.float64))


def test_fp_regress_is_the_fit_to_exact_log_densities():
    """Of N(mean, v I) convolved with noise of deviation delta, at the Tweedie point of the last step."""
    mean, variance = noise(1, 1, SHAPE), 0.2
    oracle = GaussianMixture(mean.flatten(1), torch.tensor([variance]))
    call, model = oracle_case(PointMass(mean), oracle, 20, noise(3, 0, SHAPE))
    statistic = FPRegress(timestep=100, probes=1)
    middle = float(sigmas_of(model)[100])
    deltas = middle * np.array([0.5, 0.5**0.5, 1.0, 2.0**0.5, 2.0])
    squares = (oracle.denoise(call.x, call.level) - mean).flatten(1).square().sum(1, keepdim=True).numpy()
    spread = variance + deltas**2
    log_density = -0.5 * (squares / spread + D * np.log(spread))
    expected = D + np.polyfit(np.log(deltas), log_density.T, 1)[0]
    value = statistic.measure(call, model)
    np.testing.assert_allclose(value.numpy(), expected, rtol=0.01)


@pytest.mark.parametrize("k", [0, 3, 30])
def test_fp_regress_finds_the_dimension(k):
    oracle = GaussianSubspace(D, k, variance=25.0) if k else PointMass(noise(1, 1, SHAPE))
    level = NoiseLevel.from_alpha_bar(float(ALPHAS[20]))
    call, model = oracle_case(oracle, oracle, 20, oracle.noised(8, level, SHAPE))
    value = FPRegress(probes=8).measure(call, model)
    assert float(value.mean()) == pytest.approx(k, rel=0.02, abs=1e-3 + 4 * (2 * k / 64) ** 0.5)


@pytest.mark.parametrize("timestep", [0, 2, 999])
def test_fp_regress_refuses_the_ends_of_the_schedule(timestep):
    call, model = oracle_case(PointMass(torch.zeros(D)), PointMass(torch.zeros(D)), 20, noise(1, 0, SHAPE))
    with pytest.raises(ValueError, match=f"timestep={timestep}: .* five levels"):
        FPRegress(timestep=timestep).measure(call, model)
    with pytest.raises(ValueError, match=r"timestep=1000 .* 0 to 999"):
        FPRegress(timestep=1000).measure(call, model)


def test_refuses_an_empty_curve():
    model, lanes = behind(PointMass(torch.zeros(D)), 1)
    for arguments, named in ((dict(timesteps=[]), "timesteps"), (dict(probes=0), "probes=0")):
        with pytest.raises(ValueError, match=named):
            flipd_curve(model, noise(1, 0, SHAPE), lanes, **arguments)
    with pytest.raises(ValueError, match="probes=0"):
        FPRegress(probes=0)


def test_a_curve_with_a_gap_has_no_lid():
    oracle = GaussianSubspace(D, 5)
    clean = clean_points(oracle, 2)
    model, lanes = behind(oracle, 2)

    def broken(x, timestep, **arguments):
        out = model.unet(x, timestep, **arguments)[0].clone()
        out[1] *= torch.nan if int(timestep) == 500 else 1
        return (out,)

    curve = flipd_curve(dataclasses.replace(model, unet=broken), clean, lanes, timesteps=[5, 100, 500], probes=1)
    assert curve.lid.isfinite().tolist() == [True, False]
