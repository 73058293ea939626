"""The LID of an image: what is looked at, how a case is named, and three images of the bundled checkpoint."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from tiny import CountLanes, build, components

from benchmarks.reference.world import draw_caption, render, render_plain
from sd_guard.image_lid import PINNED_SHARE, SIMPLE_BYTES, encode, fit_to_model, lid_of_image, name_case
from sd_guard.lanes import Conditioning
from sd_guard.pipelines.trajectory import denoiser_of
from sd_guard.reference import checkpoint_path, load_truth, source_path
from sd_guard.statistics.complexity import png_bytes
from sd_guard.statistics.flipd_curve import flipd_curve


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def parts():
    return components()


@pytest.fixture
def pipe(parts):
    return build(StableDiffusionPipeline, parts)


@pytest.mark.parametrize(
    ("share", "without", "size", "case"),
    [
        (-0.2, 0.0, 1.1, "overfitting-driven"),
        (-0.2, -0.3, 0.1, "data-driven"),
        (PINNED_SHARE, 0.0, SIMPLE_BYTES, "data-driven"),
        (PINNED_SHARE + 0.01, 0.0, 0.1, "not memorized"),  # simple, and free all the same
        (0.4, 0.45, 1.1, "not memorized"),
        (0.2, 0.5, 1.1, "overfitting-driven"),  # the caption closes more than half
        (0.3, 0.5, 1.1, "not memorized"),
        (0.2, 0.5, 0.1, "data-driven"),
    ],
)
def test_cases(share, without, size, case):
    named, why = name_case(share, without, size)
    assert named == case
    assert ("simple" in why, "too complex" in why) == (case == "data-driven", case == "overfitting-driven")


def test_an_image_of_the_models_size_is_not_touched(pipe):
    image = picture(16, 16)
    assert np.array_equal(np.asarray(fit_to_model(pipe, image)), np.asarray(image))


def test_others_are_cropped_around_their_centre_and_scaled(pipe):
    image = picture(80, 40)
    by_hand = image.resize((16, 16), Image.Resampling.LANCZOS, box=(20, 0, 60, 40))
    assert np.array_equal(np.asarray(fit_to_model(pipe, image)), np.asarray(by_hand))
    assert fit_to_model(pipe, picture(5, 9).convert("L")).mode == "RGB"
    turned = image.copy()
    turned.getexif()[0x0112] = 6  # to be turned by a quarter
    expected = fit_to_model(pipe, image.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(np.asarray(fit_to_model(pipe, turned)), np.asarray(expected))


def test_the_latent_is_the_posterior_mean_in_the_unets_units(pipe):
    image = picture(16, 16)
    pixels = pipe.image_processor.preprocess(image)
    with torch.no_grad():
        expected = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        torch.testing.assert_close(encode(pipe, image), expected)


def test_both_curves_are_those_of_their_prompts(pipe):
    image, seed = picture(16, 16), 7
    with CountLanes(pipe.unet) as counted:
        found = lid_of_image(pipe, image, "a cat", seed=seed, probes=2)
    assert counted.rows == 2 * len(found.conditional.timesteps) * 3
    prompt, empty = pipe.encode_prompt(["a cat"], "cpu", 1, True)
    with torch.no_grad():
        clean = encode(pipe, image)
    for curve, embeds in ((found.conditional, prompt), (found.unconditional, empty)):
        alone = flipd_curve(denoiser_of(pipe, [seed]), clean, Conditioning(embeds), probes=2)
        torch.testing.assert_close(curve.values, alone.values, rtol=1e-3, atol=0.5)  # float32 differences
    row = found.conditional.timesteps.tolist().index(int(found.conditional.knee_timestep))
    assert found.lid == float(found.conditional.values[row]) == float(found.conditional.lid)
    assert found.lid_unconditional == float(found.unconditional.values[row])
    assert found.dimension == 256 and found.bytes_per_pixel == png_bytes(image) / 256
    expected = name_case(found.lid / 256, found.lid_unconditional / 256, found.bytes_per_pixel)
    assert (found.case, found.reason.split(":")[0]) == expected
    for figure in (
        f"{found.lid:.0f} with",
        f"{found.lid_unconditional:.0f} without",
        f"{found.bytes_per_pixel:.2f} PNG",
    ):
        assert figure in found.reason


def test_probes_are_the_seeds_and_nothing_else_is_drawn(pipe):
    image, state = picture(16, 16), torch.get_rng_state()
    first, same, other = (lid_of_image(pipe, image, "a cat", seed=seed, probes=1).lid for seed in (1, 1, 2))
    assert first == same != other
    assert torch.equal(torch.get_rng_state(), state)


def test_levels_are_the_checkpoints_whatever_sampler_is_in_use(parts, pipe):
    other = build(StableDiffusionPipeline, parts, DPMSolverMultistepScheduler.from_config(pipe.scheduler.config))
    other.scheduler.set_timesteps(7)
    found = [lid_of_image(p, picture(16, 16), "a cat", probes=1) for p in (pipe, other)]
    assert torch.equal(found[0].conditional.values, found[1].conditional.values)


def test_refusals(parts, pipe):
    flow = build(StableDiffusionPipeline, parts, FlowMatchEulerDiscreteScheduler())
    with pytest.raises(TypeError, match="FlowMatchEulerDiscreteScheduler"):
        lid_of_image(flow, picture(16, 16), "a cat")
    with pytest.raises(ValueError, match="probes=0"):
        lid_of_image(pipe, picture(16, 16), "a cat", probes=0)
    broken = build(StableDiffusionPipeline, components())
    broken.unet.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        lid_of_image(broken, picture(16, 16), "a cat", probes=1)


def test_results_are_frozen(pipe):
    with pytest.raises(dataclasses.FrozenInstanceError):
        lid_of_image(pipe, picture(16, 16), "a cat", probes=1).case = "data-driven"


def test_the_reference_checkpoint_knows_its_memories():
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint_path(), local_files_only=True, use_safetensors=True)
    tune = [row for row in load_truth() if row["split"] == "tune"]
    verbatim = next(row for row in tune if row["family"] == "verbatim")
    rng = np.random.default_rng(1)
    caption = draw_caption(rng, held_out=True)
    cases = [
        (Image.open(source_path(verbatim)), verbatim["prompt"], "overfitting-driven"),
        (Image.fromarray(render_plain(rng, "blue")), "a flat blue field", "data-driven"),
        (Image.fromarray(render(rng, caption)), str(caption), "not memorized"),
    ]
    for image, prompt, case in cases:
        assert lid_of_image(pipe, image, prompt, probes=2).case == case
