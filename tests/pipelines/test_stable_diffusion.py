"""The guarded pipeline beside its host: the same images where nothing is flagged, whatever is asked of it."""

from __future__ import annotations

import math
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
)
from pipelines.calls import GENERATORS, PROMPTS, latents_of, scores_of
from tiny import EVERYBODY, SCHEDULERS, build, components, make_scheduler, seeded, watching

from sd_guard.pipelines.stable_diffusion import (
    GuardedStableDiffusionPipeline,
)


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_only_flagged_images_change(plain: Any, guarded: Any, scheduler: str, generator: str) -> None:
    """Nothing flagged, all probed: all bits are the host's, the global random state too.

    One flagged, one in doubt beside it, one never probed: its neighbours' bits are.
    """
    expected, state = latents_of(plain(scheduler), generator)
    watched, watched_state = latents_of(guarded(watching(doubt=EVERYBODY), scheduler), generator)
    assert np.array_equal(watched.images, expected.images)
    assert torch.equal(watched_state, state)
    scores = scores_of(watched)
    assert [record.outcome for record in watched.records] == ["passed"] * 3
    assert [record.extra_lanes for record in watched.records] == [2] * 3
    assert all(math.isfinite(score) for score in scores)

    order = np.argsort(scores)
    threshold = (scores[order[1]] + scores[order[2]]) / 2
    guard = watching(threshold, doubt=(scores[order[0]], math.inf))
    mixed, mixed_state = latents_of(guarded(guard, scheduler), generator)
    flagged = int(order[2])
    for row, record in enumerate(mixed.records):
        same = np.array_equal(mixed.images[row], expected.images[row])
        assert (record.outcome, same) == (("rescued", False) if row == flagged else ("passed", True))
        assert record.score == scores[row]
        assert any("lid" in value.name for value in record.statistics) == (row != order[0])
    assert np.isfinite(mixed.images).all()
    assert torch.equal(mixed_state, state)


def embeddings(pipe: Any, prompts: list[str]) -> torch.Tensor:
    return pipe.encode_prompt(prompts, "cpu", 1, False)[0]


CALLS: dict[str, dict[str, Any]] = {
    "eta": {"eta": 0.7},
    "guidance_rescale": {"guidance_rescale": 0.7},
    "negative_prompt": {"negative_prompt": ["a cat", "blurred", ""]},
    "no_guidance": {"guidance_scale": 1.0},
    "no_guidance_negative": {"guidance_scale": 1.0, "negative_prompt": ["a cat"] * 3},
    "positional": {},
    "images_per_prompt": {"prompt": ["a red fox", "x"], "num_images_per_prompt": 2, "generator": "four"},
    "one_prompt": {"prompt": "a red fox", "generator": None},
    "latents": {"latents": torch.linspace(-2, 2, 3 * 256).reshape(3, 4, 8, 8)},
    "size": {"height": 16, "width": 24},
    "array": {"output_type": "np"},
    "tensor": {"output_type": "pt"},
}


@pytest.mark.parametrize("call", CALLS)
def test_arguments_of_the_host(plain: Any, guarded: Any, call: str) -> None:
    def arguments() -> dict[str, Any]:
        chosen = CALLS[call]
        return chosen | {"generator": seeded(1, 2, 3, 4)} if chosen.get("generator") == "four" else chosen

    expected, _ = latents_of(plain(), **arguments())
    pipe = guarded(watching(doubt=EVERYBODY))
    watched, _ = latents_of(pipe, **arguments())
    assert np.array_equal(watched.images, expected.images)
    assert len(watched.records) == len(expected.images)
    assert all(record.outcome == "passed" for record in watched.records)
    pipe.disable_guard()
    off, _ = latents_of(pipe, **arguments())
    assert off.records is None
    assert np.array_equal(off.images, expected.images)


def test_positional_arguments(plain: Any, guarded: Any) -> None:
    call = (["a fox"], 16, 24, 4)
    expected = plain()(*call, generator=seeded(3), output_type="latent").images
    assert expected.shape[-2:] == (8, 12)
    assert torch.equal(
        guarded(watching(doubt=EVERYBODY))(*call, generator=seeded(3), output_type="latent").images, expected
    )


@pytest.mark.parametrize("negative", [False, True])
def test_embeddings_in_place_of_prompts(plain: Any, guarded: Any, negative: bool) -> None:
    host = plain()
    given = {"prompt": None, "prompt_embeds": embeddings(host, PROMPTS)}
    if negative:
        given["negative_prompt_embeds"] = embeddings(host, ["a cat"] * 3)
    expected, _ = latents_of(host, **given)
    watched, _ = latents_of(guarded(watching(doubt=EVERYBODY)), **given)
    assert torch.equal(watched.images, expected.images)
    # Without negative embeddings the sampler's own lane is the control: only the probe's two lanes are paid.
    assert [record.extra_lanes for record in watched.records] == [4 if negative else 2] * 3
    assert watched.records[0].decided_at_step == 3
    mitigated, _ = latents_of(guarded(watching(-math.inf, doubt=EVERYBODY), budget=50), **given)
    assert [record.attempts[0].mitigation for record in mitigated.records] == ["forget"] * 3


@pytest.mark.parametrize(
    ("scheduler", "schedule", "middle"),
    [
        ("ddpm", {"timesteps": [901, 700, 420, 210, 3]}, 3),
        ("euler", {"timesteps": [901, 700, 420, 210, 3]}, 3),
        ("euler", {"sigmas": [12.0, 5.0, 2.0, 0.6, 0.1]}, 2),  # the last sigma is where Euler ends: four steps
        ("euler", {"sigmas": np.array([12.0, 5.0, 2.0, 0.6, 0.1])}, 2),
    ],
)
def test_custom_schedules(plain: Any, guarded: Any, scheduler: str, schedule: dict[str, Any], middle: int) -> None:
    expected, _ = latents_of(plain(scheduler), **schedule)
    watched, _ = latents_of(guarded(watching(doubt=EVERYBODY), scheduler), **schedule)
    assert torch.equal(watched.images, expected.images)
    assert watched.records[0].decided_at_step == middle


def test_one_step(plain: Any, guarded: Any) -> None:
    expected, _ = latents_of(plain(), num_inference_steps=1)
    watched, _ = latents_of(guarded(watching(doubt=EVERYBODY)), num_inference_steps=1)
    assert torch.equal(watched.images, expected.images)
    assert [record.decided_at_step for record in watched.records] == [0, 0, 0]
    tried, _ = latents_of(guarded(watching(-math.inf, doubt=EVERYBODY), budget=10), num_inference_steps=1)
    assert [len(record.attempts) for record in tried.records] == [1] * 3
    assert [record.attempts[0].score for record in tried.records] == pytest.approx([math.log(0.01)] * 3)


def test_no_prompt_at_all(plain: Any, guarded: Any) -> None:
    """An empty list is whatever it is upstream."""
    errors = []
    for pipe in (plain(), guarded(watching(doubt=EVERYBODY))):
        with pytest.raises(Exception) as caught:
            pipe([], num_inference_steps=2)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_prediction_types(parts: dict[str, Any], prediction_type: str) -> None:
    scheduler = make_scheduler("ddim", prediction_type=prediction_type)
    expected, _ = latents_of(build(StableDiffusionPipeline, parts, scheduler))
    pipe = build(GuardedStableDiffusionPipeline, parts, scheduler)
    pipe.enable_guard(watching(doubt=EVERYBODY))
    watched, _ = latents_of(pipe)
    assert torch.equal(watched.images, expected.images)
    assert np.isfinite(scores_of(watched)).all()


def test_bfloat16(own_parts: dict[str, Any]) -> None:
    for name in ("unet", "vae", "text_encoder"):
        own_parts[name].to(torch.bfloat16)
    expected, _ = latents_of(build(StableDiffusionPipeline, own_parts))
    pipe = build(GuardedStableDiffusionPipeline, own_parts)
    pipe.enable_guard(watching(doubt=EVERYBODY))
    watched, _ = latents_of(pipe)
    assert watched.images.dtype == torch.bfloat16
    assert torch.equal(watched.images, expected.images)
    assert np.isfinite(scores_of(watched)).all()
    pipe.enable_guard(watching(min(scores_of(watched)) - 1e-3, doubt=EVERYBODY))
    mitigated, _ = latents_of(pipe)
    assert [len(record.attempts) for record in mitigated.records] == [1] * 3


def test_slicing(own_parts: dict[str, Any]) -> None:
    pipes = [build(cls, own_parts) for cls in (StableDiffusionPipeline, GuardedStableDiffusionPipeline)]
    pipes[0].enable_attention_slicing("max")
    own_parts["vae"].enable_slicing()
    pipes[1].enable_guard(watching(doubt=EVERYBODY))
    expected, _ = latents_of(pipes[0], output_type="np")
    watched, _ = latents_of(pipes[1], output_type="np")
    assert np.array_equal(watched.images, expected.images)
    pipes[1].enable_guard(watching(sorted(scores_of(watched))[1], doubt=EVERYBODY))
    mixed, _ = latents_of(pipes[1], output_type="np")
    same = [np.array_equal(a, b) for a, b in zip(mixed.images, expected.images, strict=True)]
    assert same == [record.verdict == "pass" for record in mixed.records]
    assert same.count(False) == 1


def adapt(parts: dict[str, Any]) -> None:
    """Gives the UNet an IP adapter of random weights, from a state dict made in memory."""
    unet, tokens, image_width = parts["unet"], 4, 8
    width = unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(5)
    hidden = [p for name, p in unet.named_parameters() if name.endswith("attn2.to_k.weight")]
    state = {
        "image_proj": {
            "proj.weight": torch.randn(tokens * width, image_width, generator=generator),
            "proj.bias": torch.zeros(tokens * width),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        },
        "ip_adapter": {
            f"{2 * i + 1}.to_{which}_ip.weight": torch.randn(p.shape, generator=generator)
            for i, p in enumerate(hidden)
            for which in "kv"
        },
    }
    unet._load_ip_adapter_weights([state])


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_ip_adapter(own_parts: dict[str, Any], guidance_scale: float) -> None:
    adapt(own_parts)
    lanes = 6 if guidance_scale > 1 else 3
    image_embeds = torch.randn(lanes, 1, 8, generator=torch.Generator().manual_seed(6))
    call = {"ip_adapter_image_embeds": [image_embeds], "guidance_scale": guidance_scale}
    expected, _ = latents_of(build(StableDiffusionPipeline, own_parts), **call)
    other, _ = latents_of(
        build(StableDiffusionPipeline, own_parts), **(call | {"ip_adapter_image_embeds": [image_embeds + 1]})
    )
    assert not torch.equal(expected.images, other.images)
    pipe = build(GuardedStableDiffusionPipeline, own_parts)
    pipe.enable_guard(watching(doubt=EVERYBODY))
    watched, _ = latents_of(pipe, **call)
    assert torch.equal(watched.images, expected.images)
    pipe.enable_guard(watching(sorted(scores_of(watched))[1], doubt=EVERYBODY))
    mixed, _ = latents_of(pipe, **call)
    changed = [not torch.equal(a, b) for a, b in zip(mixed.images, expected.images, strict=True)]
    assert changed == [record.verdict == "flag" for record in mixed.records]
    assert sum(changed) == 1


def test_scheduler_of_a_subclass(plain: Any, guarded: Any) -> None:
    class Mine(DDIMScheduler):
        pass

    expected, _ = latents_of(plain(Mine.from_config(make_scheduler("ddim").config)))
    watched, _ = latents_of(guarded(watching(doubt=EVERYBODY), Mine.from_config(make_scheduler("ddim").config)))
    assert torch.equal(watched.images, expected.images)


def test_weights_that_are_only_there_while_they_are_used(own_parts: dict[str, Any]) -> None:
    """As sequential offload leaves them, by the same hooks; probes and resumed trajectories call the UNet too."""
    expected = latents_of(build(StableDiffusionPipeline, own_parts))[0].images
    pipe = build(GuardedStableDiffusionPipeline, own_parts)
    for module in (pipe.unet, pipe.text_encoder, pipe.vae):
        accelerate.cpu_offload(module, execution_device="cpu", offload_buffers=True)
    assert next(pipe.unet.parameters()).device.type == "meta"
    pipe.enable_guard(watching(doubt=EVERYBODY))
    output = latents_of(pipe)[0]
    assert torch.equal(output.images, expected)
    assert all(record.extra_lanes > 0 for record in output.records)
    pipe.enable_guard(watching(-math.inf, doubt=EVERYBODY))
    flagged, _ = latents_of(pipe)
    assert [record.attempts[0].mitigation for record in flagged.records] == ["forget"] * 3


@pytest.mark.parametrize(
    ("offload", "device"),
    [
        ("enable_model_cpu_offload", "cpu"),
        pytest.param("enable_model_cpu_offload", "cuda", marks=pytest.mark.gpu),
        pytest.param("enable_sequential_cpu_offload", "cuda", marks=pytest.mark.gpu),
    ],
)
def test_offload(offload: str, device: str) -> None:
    outputs = []
    for cls in (StableDiffusionPipeline, GuardedStableDiffusionPipeline):
        pipe = build(cls, components())
        getattr(pipe, offload)(device=device)
        if cls is GuardedStableDiffusionPipeline:
            pipe.enable_guard(watching(doubt=EVERYBODY))
        outputs.append(latents_of(pipe)[0])
    assert torch.equal(outputs[0].images, outputs[1].images)
    pipe.enable_guard(watching(-math.inf, doubt=EVERYBODY))
    flagged, _ = latents_of(pipe)
    assert [record.attempts[0].mitigation for record in flagged.records] == ["forget"] * 3
