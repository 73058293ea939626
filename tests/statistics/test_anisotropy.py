"""Norm and alignment against NumPy, and at the extremes of the angle."""

import dataclasses

import numpy as np
import pytest
import torch
from oracles import GaussianMixture, PointMass

from sd_guard.noise import NoiseLevel
from sd_guard.statistics.anisotropy import Anisotropy
from tests.statistics.cases import ALPHAS, noise, oracle_case

LOW = 41  # the third from last of 50 DDIM steps of Stable Diffusion


def test_against_numpy():
    control, conditional = (
        GaussianMixture(noise(3, i).flatten(1), torch.full((3,), v)) for i, v in ((1, 0.5), (2, 0.1))
    )
    call, model = oracle_case(control, conditional, 981, noise(4, 5))
    level = NoiseLevel.from_alpha_bar(float(ALPHAS[LOW]))
    e_u, e_c = (oracle.predict_noise(call.x, level).numpy() for oracle in (control, conditional))
    d = e_c - e_u
    cosine = (e_u * d).sum(1) / np.sqrt((e_u**2).sum(1) * (d**2).sum(1))
    norm = np.sqrt(((call.conditional - call.control).numpy() ** 2).sum((1, 2, 3)))
    for weights in ((1.0, 2.0), (0.5, 0.1)):
        statistic = Anisotropy(norm_weight=weights[0], alignment_weight=weights[1])
        expected = weights[0] * norm + weights[1] * cosine.mean((1, 2))
        np.testing.assert_allclose(statistic.measure(call, model).numpy(), expected, rtol=1e-6)
    assert model.unet.rows == 2 * 2 * len(call.x)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_guidance_along_the_unconditional_score(sign):
    """Gaussians about 0 predict multiples of x: the narrower one the larger."""
    narrow, wide = PointMass(torch.zeros(16)), GaussianMixture(torch.zeros(1, 16), torch.tensor([1.0]))
    lanes = (wide, narrow) if sign > 0 else (narrow, wide)
    call, model = oracle_case(*lanes, 981, noise(3, 5))
    expected = torch.full((3,), float(sign), dtype=torch.float64)
    torch.testing.assert_close(Anisotropy().alignment(call, model), expected)


def test_v_prediction_is_read_as_noise():
    control, conditional = (
        GaussianMixture(noise(3, i).flatten(1), torch.full((3,), v)) for i, v in ((1, 0.5), (2, 0.1))
    )
    call, model = oracle_case(control, conditional, 981, noise(2, 5))
    expected = Anisotropy().measure(call, model)
    for unet in model.unet.lanes:
        unet.prediction_type = "v_prediction"
    a, s = call.level.a, call.level.s
    outputs = {
        lane: a * oracle.predict_noise(call.x, call.level) - s * oracle.denoise(call.x, call.level)
        for lane, oracle in (("control", control), ("conditional", conditional))
    }
    model = dataclasses.replace(model, prediction_type="v_prediction")
    torch.testing.assert_close(Anisotropy().measure(dataclasses.replace(call, **outputs), model), expected)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_refuses_a_timestep_out_of_range(share):
    with pytest.raises(ValueError, match=f"low_noise={share}"):
        Anisotropy(low_noise=share)
