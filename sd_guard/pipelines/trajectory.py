"""A plain trajectory, step by step: what `StableDiffusionPipeline.__call__` samples, without images or mitigation.

For whoever wants to see every UNet call and needs no image: evaluation of statistics, calibration.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor

from sd_guard.compiled import of_one_shape
from sd_guard.lanes import Conditioning, evaluate_lanes
from sd_guard.noise import check_scheduler, read_level
from sd_guard.pipelines.inputs import prediction_type
from sd_guard.pipelines.replay import guide
from sd_guard.statistics.base import Denoiser, StepCall


@torch.no_grad()
def walk(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], *, steps: int = 50, guidance_scale: float = 7.5
) -> Iterator[StepCall]:
    """Samples one image a prompt; yields each step's UNet call after the step was made.

    Latents are those that the pipeline itself reaches with `torch.Generator().manual_seed(seed)` for each image. Stop
    iterating to end early. The pipeline's scheduler is left as it was.

    Args:
        pipe: a `StableDiffusionPipeline`.
        prompts: B prompts.
        seeds: B seeds.
        steps: sampling steps.
        guidance_scale: at most 1 means none, as in the host; the lane without a prompt is then evaluated for whoever
            compares, and each call says that it was `spent`.

    Raises:
        ValueError, TypeError: a scheduler that cannot be read, a UNet that was distilled to do without guidance, or as
            many seeds as prompts not given.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"{len(seeds)} seeds were given for {len(prompts)} prompts; give one each, at least one")
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise ValueError("the UNet takes guidance as an embedding (LCM): it has no lane without a prompt; use another")
    check_scheduler(pipe.scheduler)
    device, scheduler, guided = pipe._execution_device, copy.deepcopy(pipe.scheduler), guidance_scale > 1
    prompt_embeds, negative_embeds = pipe.encode_prompt(list(prompts), device, 1, True)
    lanes = Conditioning(torch.cat([negative_embeds, prompt_embeds]))
    retrieve_timesteps(scheduler, steps, device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = _initial_latents(pipe, scheduler, generators, prompt_embeds)
    arguments: dict[str, Any] = pipe.prepare_extra_step_kwargs(generators, 0.0)
    on_host = scheduler.timesteps.tolist()  # at once: each would be waited for
    for step, timestep in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
        level = read_level(scheduler, on_host[step])
        negative, conditional = evaluate_lanes(pipe.unet, x, timestep, lanes).chunk(2)
        noise = guide(conditional, negative, guidance_scale, 0.0) if guided else conditional
        before, latents = latents, scheduler.step(noise, timestep, latents, **arguments, return_dict=False)[0]
        own = x[: len(prompts)], conditional, negative, lanes, before, latents
        yield StepCall(step, timestep, level, *own, spent=0 if guided else 1)


def denoiser_of(pipe: Any, seeds: Sequence[int], *, rows: int | None = None) -> Denoiser:
    """The model of a pipeline, for statistics.

    Args:
        pipe: a `StableDiffusionPipeline`.
        seeds: of its probe vectors, one an image.
        rows: of each call of the UNet, where that is compiled; None for as many as are asked for.
    """

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        scaled = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
        return (pipe.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    unet = pipe.unet if rows is None else of_one_shape(pipe.unet, rows)
    scheduler = pipe.scheduler
    return Denoiser(
        unet, prediction_type(pipe), scheduler.alphas_cumprod, seeds, decode, timestep_dtype=scheduler.timesteps.dtype
    )


def _initial_latents(pipe: Any, scheduler: Any, generators: list[torch.Generator], embeds: Tensor) -> Tensor:
    """(B, C, H, W) as the host draws them, scaled for the scheduler."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (pipe.unet.config.in_channels, height, width)
    noise = torch.cat([torch.randn(1, *shape, generator=g, device="cpu", dtype=embeds.dtype) for g in generators])
    return noise.to(embeds.device) * scheduler.init_noise_sigma
