"""The local LID map: where an image is pinned, against closed forms and the masks of templates."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from oracles import GaussianSubspace, PointMass
from PIL import Image
from tiny import build, components, make_scheduler

from sd_guard.attribution import (
    pinned_map,
)
from sd_guard.guard import Guard
from sd_guard.lanes import Conditioning
from sd_guard.noise import NoiseLevel
from sd_guard.observation import Question, observe, probe
from sd_guard.pipelines.trajectory import denoiser_of, walk
from sd_guard.reference import checkpoint_path, load_truth, mask_path
from sd_guard.statistics.base import Denoiser, StepCall
from sd_guard.statistics.lid import estimate_trajectory_lid
from sd_guard.trace import FiniteDifference, Hutchinson, RowSeeds

needs_captum = pytest.mark.skipif(find_spec("captum") is None, reason="needs captum: pip install 'sd-guard[explain]'")
ALPHAS = make_scheduler("ddim").alphas_cumprod.double()
TIMESTEP = 700
LEVEL = NoiseLevel.from_alpha_bar(float(ALPHAS[TIMESTEP]))


@pytest.fixture(scope="module")
def pipe():
    """The tiny pipeline in float64, whose text encoder and UNet attend by SDPA."""
    return build(StableDiffusionPipeline, components()).to(torch.float64)


def oracle_call(oracle, shape=(4, 4, 4), images=2):
    unet = oracle.as_unet(ALPHAS, "epsilon")
    x = oracle.noised(images, LEVEL, shape)
    e_hat, lanes = oracle.predict_noise(x, LEVEL), Conditioning(torch.zeros(2 * images, 1, 1))
    call = StepCall(5, torch.tensor(TIMESTEP), LEVEL, x, e_hat, e_hat, lanes)
    return call, Denoiser(unet, "epsilon", ALPHAS, list(range(images)))


def test_a_point_mass_is_pinned_everywhere():
    found = pinned_map(*oracle_call(PointMass(torch.randn(64))), probes=2)
    assert found.shape == (2, 4, 4)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-6)


@pytest.mark.parametrize("variance", [0.1, 1.0, 10.0])
def test_a_gaussian_is_as_open_as_its_variance_says(variance):
    """An isotropic one of full rank, for which a single Rademacher probe is exact."""
    found = pinned_map(*oracle_call(GaussianSubspace(64, 64, variance)), probes=1)
    share = LEVEL.a**2 * variance / (LEVEL.s**2 + LEVEL.a**2 * variance)
    torch.testing.assert_close(found, torch.full_like(found, share), rtol=1e-5, atol=1e-6)


def test_the_map_says_which_half_is_pinned_and_the_mean_is_of_the_probes():
    """Left: one picture. Right: a Gaussian whose neighbours lean on each other, so that probes differ."""
    left = torch.zeros(4, 4, dtype=torch.float64)
    left[:, 2:] = 0.5

    def unet(sample, timestep, encoder_hidden_states, **_):
        x0_hat = left * (sample + 0.3 * sample.roll(1, dims=1)) / LEVEL.a
        return ((sample - LEVEL.a * x0_hat) / LEVEL.s,)

    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    output = unet(x, None, None)[0]
    call = StepCall(5, torch.tensor(TIMESTEP), LEVEL, x, output, output, Conditioning(torch.zeros(4, 1, 1)))
    model = Denoiser(unet, "epsilon", ALPHAS, [1, 2])
    one, many = (pinned_map(call, model, probes=probes) for probes in (1, 200))
    torch.testing.assert_close(many[:, :, :2], torch.zeros_like(many[:, :, :2]), rtol=0, atol=1e-6)
    torch.testing.assert_close(many[:, :, 2:], torch.full_like(many[:, :, 2:], 0.5), rtol=0, atol=0.03)
    assert (one[:, :, 2:] - 0.5).abs().max() > 0.05


@pytest.mark.parametrize("lane", ["conditional", "control"])
def test_the_map_sums_to_the_trajectory_lid_of_the_same_probes(pipe, lane):
    """That of the estimator, and the one that the guard itself takes."""
    seeds, probes = [3, 4], 3
    call = list(walk(pipe, ["a cat", "a dog"], seeds, steps=4))[2]
    model = denoiser_of(pipe, seeds)
    total = call.x.shape[1] * pinned_map(call, model, probes=probes, lane=lane).sum((1, 2))
    lid = estimate_trajectory_lid(
        model.noise_function(call, lane),
        call.x,
        call.level,
        FiniteDifference(),
        Hutchinson(probes),
        RowSeeds(seeds, call.step),
        e_hat=model.read(call, lane).e_hat,
    )
    torch.testing.assert_close(total, lid.value, rtol=1e-4, atol=1e-3)
    seen = observe(call, model.prediction_type)
    seen = probe(seen, call, model, [0, 1], Question(probes, range(0)))
    name = "trajectory_lid" if lane == "conditional" else "trajectory_lid_control"
    torch.testing.assert_close(total, seen.values[name].to(total), rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def reference():
    return StableDiffusionPipeline.from_pretrained(checkpoint_path(), local_files_only=True, use_safetensors=True)


def observed(pipe, prompt):
    """The steps that the guard observes, by default."""
    steps = Guard().steps(50)
    walked = zip(walk(pipe, [prompt], [0]), range(steps[-1] + 1), strict=False)
    return [call for call, step in walked if step in steps]


@needs_captum
@pytest.mark.parametrize("number", range(3))
def test_a_template_is_pinned_where_its_picture_is_fixed(reference, number):
    """As soon as the guard decides: correlation with the mask of known truth."""
    rows = [row for row in load_truth() if (row["family"], row["split"]) == ("template", "tune")]
    row = rows[number]
    call = observed(reference, row["prompt"])[-1]
    found = pinned_map(call, denoiser_of(reference, [0]), probes=16)[0]
    fixed = Image.open(mask_path(row)).convert("L").resize((8, 8), Image.Resampling.BOX)
    assert np.corrcoef(found.flatten().numpy(), np.asarray(fixed, dtype=float).flatten())[0, 1] < -0.5
