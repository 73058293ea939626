"""What the host accepts is accepted, with its images; what cannot be guarded is refused in one line."""

from __future__ import annotations

import copy
import math
from typing import Any

import diffusers
import pytest
import torch
from pipelines.calls import PROMPTS, STEPS, latents_of
from tiny import EVERYBODY, TOKENS, WIDTH, Identity, build, seeded, watching

from sd_guard.detection import PrematureDetail
from sd_guard.fingerprint import take_fingerprint
from sd_guard.guard import Guard
from sd_guard.mitigation import EmbeddingNoise, NewSeed
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline

DOUBTFUL = watching(doubt=EVERYBODY, other_seeds=1)
FLAGGED = watching(-math.inf, (Identity(),))


def texts(tokens: int) -> dict[str, torch.Tensor]:
    """Embeddings of as many tokens as the caller likes: a long prompt is several texts in a row."""
    drawn = torch.randn(2, 3, tokens, WIDTH, generator=torch.Generator().manual_seed(3))
    return {"prompt": None, "prompt_embeds": drawn[0], "negative_prompt_embeds": drawn[1]}


@pytest.mark.parametrize("guard", [DOUBTFUL, FLAGGED], ids=["in doubt", "flagged"])
@pytest.mark.parametrize("tokens", [TOKENS // 2, TOKENS, 2 * TOKENS, 2 * TOKENS + 3])
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_prompts_of_any_length(plain: Any, guarded: Any, guard: Guard, tokens: int, guidance_scale: float) -> None:
    call = texts(tokens) | {"guidance_scale": guidance_scale}
    expected, _ = latents_of(plain(), **call)
    output, _ = latents_of(guarded(guard, on_failure="keep"), **call)
    assert torch.equal(output.images, expected.images)
    assert all(record.verdict != "unscored" and record.extra_lanes for record in output.records)


def test_what_a_long_prompt_is_compared_with_is_as_long(guarded: Any) -> None:
    """Prompts of the encoder's own length, written twice, are held against the empty prompt, written twice."""
    pipe = guarded(DOUBTFUL)
    prompts, empty = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    call: dict[str, Any] = {"prompt": None, "guidance_scale": 1.0}
    short, _ = latents_of(pipe, prompt_embeds=prompts, **call)
    long, _ = latents_of(pipe, prompt_embeds=prompts.repeat(1, 2, 1), **call)
    for one, other in zip(short.records, long.records, strict=True):  # attention does not see how often it is all there
        assert one.score == pytest.approx(other.score, abs=1e-3)
    cut, _ = latents_of(pipe, prompt=None, prompt_embeds=prompts[:, :5], negative_prompt_embeds=empty[:, :5])
    told = {(statistic.name, statistic.step) for statistic in cut.records[0].statistics}
    assert ("trajectory_lid", cut.records[0].decided_at_step) in told


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_without_the_empty_prompt_there_is_nothing_to_compare_with(parts: dict[str, Any], part: str) -> None:
    pipe = build(GuardedStableDiffusionPipeline, parts | {part: None})
    with pytest.raises(ValueError, match=rf"^{part} is None, .* keep it .* or disable_guard\(\)$"):
        latents_of(pipe, **texts(TOKENS))
    pipe.disable_guard()
    assert latents_of(pipe, **texts(TOKENS))[0].images.isfinite().all()


def test_arguments_that_the_host_leaves_out_of_account(plain: Any, guarded: Any) -> None:
    for call in (
        texts(TOKENS) | {"clip_skip": 1},  # it encodes no prompt
        {"callback_on_step_end_tensor_inputs": None},
        {"height": 24},  # one side alone
        {"prompt": ["", "", "x"]},
    ):
        expected, _ = latents_of(plain(), **call)
        output, _ = latents_of(guarded(DOUBTFUL), **call)
        assert torch.equal(output.images, expected.images), call


def test_a_callback_may_draw_latents(plain: Any, guarded: Any) -> None:
    def draw(pipe: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe.prepare_latents(3, 4, 16, 16, torch.float32, "cpu", seeded(5, 6, 7))
        return {}

    expected, _ = latents_of(plain(), callback_on_step_end=draw)
    output, _ = latents_of(guarded(DOUBTFUL), callback_on_step_end=draw)
    assert torch.equal(output.images, expected.images)
    assert all(math.isfinite(record.score) for record in output.records)


@pytest.mark.parametrize("guard", [DOUBTFUL, FLAGGED], ids=["in doubt", "flagged"])
def test_under_autocast(own_parts: dict[str, Any], guard: Guard) -> None:
    """Weights that were never read before are read under it, too."""
    images = []
    for kind in (diffusers.StableDiffusionPipeline, GuardedStableDiffusionPipeline):
        pipe = build(kind, copy.deepcopy(own_parts))
        if kind is GuardedStableDiffusionPipeline:
            pipe.enable_guard(guard, on_failure="keep")
            pipe.encode_ahead(PROMPTS)  # without autocast: another thread, and another text
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if kind is GuardedStableDiffusionPipeline:
                pipe._ahead = None
                pipe.encode_ahead(PROMPTS)
                assert pipe._ahead is None
            images.append(latents_of(pipe)[0].images)
            other = take_fingerprint(pipe, steps=STEPS, guidance_scale=7.5)
        assert take_fingerprint(copy.deepcopy(pipe), steps=STEPS, guidance_scale=7.5) == other
    assert torch.equal(*images)


@pytest.mark.parametrize(
    "guard",
    [watching(doubt=EVERYBODY, other_seeds=2), watching(-math.inf, (EmbeddingNoise(), NewSeed()))],
    ids=["in doubt", "flagged"],
)
def test_with_the_device_as_the_default_of_torch(own_parts: dict[str, Any], guard: Guard) -> None:
    """Numbers that are drawn on the host are drawn there, wherever else tensors are made."""
    there = pytest.importorskip("faraway", reason="needs a newer torch", exc_type=ImportError).faraway()
    parts = {name: part.to(there) if isinstance(part, torch.nn.Module) else part for name, part in own_parts.items()}
    pipe = build(GuardedStableDiffusionPipeline, parts)
    pipe.enable_guard(guard, on_failure="keep")
    first, _ = latents_of(pipe)
    try:
        torch.set_default_device(there)
        second, _ = latents_of(pipe)
    finally:
        torch.set_default_device(None)
    assert [record.score for record in second.records] == [record.score for record in first.records]
    assert torch.equal(second.images.cpu(), first.images.cpu())


def test_a_pipeline_is_copied_while_texts_are_on_their_way(guarded: Any) -> None:
    pipe = guarded(watching())
    pipe.encode_ahead(PROMPTS)
    expected, _ = latents_of(copy.deepcopy(pipe))
    assert torch.equal(latents_of(pipe)[0].images, expected.images)


@pytest.mark.parametrize("steps", [4, 8, 20])
@pytest.mark.parametrize("scheduler", [None, "euler", "lcm", "tcd"])
def test_zero_terminal_snr(parts: dict[str, Any], steps: int, scheduler: str | None) -> None:
    """Sampling begins without a signal, and with few steps that is where it is decided."""
    pipe = build(GuardedStableDiffusionPipeline, parts)
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    names = {None: "DDIM", "euler": "EulerDiscrete", "lcm": "LCM", "tcd": "TCD"}
    kind = getattr(diffusers, f"{names[scheduler]}Scheduler")
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    doubtful = PrematureDetail(threshold=math.inf, doubt=-math.inf, undecided=(-math.inf, math.inf))
    pipe.enable_guard(Guard(detector=doubtful))
    output, _ = latents_of(pipe, num_inference_steps=steps)
    assert [record.verdict for record in output.records] == ["pass"] * 3
    assert all(math.isfinite(record.score) for record in output.records)


def test_a_unet_that_keeps_what_it_computed_is_refused(own_parts: dict[str, Any]) -> None:
    pipe = build(GuardedStableDiffusionPipeline, own_parts)
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        spatial_attention_block_identifiers=("attentions",),
        current_timestep_callback=lambda: 500,
    )
    diffusers.apply_pyramid_attention_broadcast(pipe.unet, config)
    with pytest.raises(ValueError, match=r"^PyramidAttentionBroadcastHook changes what a probe sees: remove it"):
        latents_of(pipe)


def test_a_unet_that_moves_or_casts_its_weights_is_not(own_parts: dict[str, Any]) -> None:
    pipe = build(GuardedStableDiffusionPipeline, own_parts)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    pipe.enable_guard(DOUBTFUL)
    assert all(math.isfinite(record.score) for record in latents_of(pipe)[0].records)


class Engine:
    """A compiled UNet of another make: what the host asks of one, and no torch module."""

    def __init__(self, unet: Any) -> None:
        self._unet, self.config, self.dtype, self.add_embedding = unet, unet.config, unet.dtype, None

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return self._unet(*args, **inputs)


def test_a_unet_that_is_no_module(plain: Any, guarded: Any) -> None:
    expected, _ = latents_of(plain())
    pipe = guarded(DOUBTFUL)
    pipe.unet = Engine(pipe.unet)
    output, _ = latents_of(pipe)
    assert torch.equal(output.images, expected.images)


def test_a_guarded_pipeline_made_from_another_has_its_settings(guarded: Any) -> None:
    first = guarded(watching())
    assert GuardedStableDiffusionPipeline.from_pipe(first).guard == first.guard
    first.disable_guard()
    assert GuardedStableDiffusionPipeline.from_pipe(first).guard is None
    assert GuardedStableDiffusionPipeline.from_pipe(first, torch_dtype=torch.float32).guard is None


def test_settings_that_cannot_be_written_are_refused_before_anything_is(guarded: Any, tmp_path: Any) -> None:
    pipe = guarded(watching())  # whose detector is of the tests alone
    with pytest.raises((TypeError, ValueError)):
        pipe.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()
