"""The plain trajectory against the host's."""

import itertools

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import build, components

from sd_guard.pipelines.trajectory import denoiser_of, walk

SCHEDULERS = ("ddim", "ddpm", "pndm", "lms", "euler", "euler_ancestral", "heun", "dpm_multistep", "unipc")


@pytest.fixture(scope="module")
def parts():
    return components()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_reaches_the_latents_of_the_host(parts, scheduler):
    pipe = build(StableDiffusionPipeline, parts, scheduler)
    prompts, seeds = ["a cat", "a red dog"], [3, 4]
    calls = list(walk(pipe, prompts, seeds, steps=5, guidance_scale=4.0))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    expected = pipe(prompts, generator=generators, num_inference_steps=5, guidance_scale=4.0, output_type="latent")
    torch.testing.assert_close(calls[-1].next_latents, expected.images, rtol=0, atol=0)
    for call, following in itertools.pairwise(calls):
        assert call.next_latents is following.latents


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_without_guidance_the_lane_without_a_prompt_is_for_comparison_only(parts, scheduler):
    pipe = build(StableDiffusionPipeline, parts, scheduler)
    guided, free = (next(walk(pipe, ["a cat"], [3], steps=5, guidance_scale=scale)) for scale in (7.5, 1.0))
    assert (guided.spent, free.spent) == (0, 1)
    for name in ("conditional", "control"):  # of one first latent
        assert torch.equal(getattr(free, name), getattr(guided, name))
    calls = list(walk(pipe, ["a cat"], [3], steps=5, guidance_scale=0.0))
    generator = torch.Generator().manual_seed(3)
    expected = pipe("a cat", generator=generator, num_inference_steps=5, guidance_scale=1.0, output_type="latent")
    torch.testing.assert_close(calls[-1].next_latents, expected.images, rtol=1e-4, atol=1e-4)


def test_the_noise_function_gives_what_the_sampler_saw(parts):
    pipe = build(StableDiffusionPipeline, parts)
    call = next(walk(pipe, ["a cat", "a red dog"], [3, 4], steps=5))
    model = denoiser_of(pipe, [0, 1])
    for lane in ("control", "conditional"):
        seen = model.read(call, lane).e_hat
        torch.testing.assert_close(model.noise_function(call, lane)(call.x), seen, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.read(call, "control").e_hat, model.read(call, "conditional").e_hat)
    images = model.decode(call.latents)
    assert images.shape == (2, 3, 16, 16)
    assert 0 <= images.min() and images.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(dict(seeds=[1]), "seeds"), (dict(prompts=[], seeds=[]), "seeds")],
)
def test_refuses_what_it_cannot_walk(parts, arguments, named):
    with pytest.raises(ValueError, match=named):
        next(walk(build(StableDiffusionPipeline, parts), **{"prompts": ["a", "b"], "seeds": [1, 2]} | arguments))


def test_refuses_a_unet_without_a_lane_of_no_prompt(parts):
    pipe = build(StableDiffusionPipeline, parts)
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    try:
        with pytest.raises(ValueError, match="guidance as an embedding"):
            next(walk(pipe, ["a"], [1]))
    finally:
        pipe.unet.register_to_config(time_cond_proj_dim=None)
