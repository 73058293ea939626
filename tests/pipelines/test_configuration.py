"""How a guard is put on a pipeline, saved with it and shared, and what no guard can work with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from pipelines.calls import STEPS, latents_of
from tiny import build, byte_tokenizer, make_scheduler, seeded, watching

from sd_guard.calibration import Calibration, scoring_of
from sd_guard.detection import PrematureDetail
from sd_guard.fingerprint import take_fingerprint
from sd_guard.guard import Guard
from sd_guard.pipelines.stable_diffusion import (
    GuardedStableDiffusionPipeline,
)


def test_enable_and_disable(guarded: Any) -> None:
    pipe = guarded(watching(0.3))
    pipe.enable_guard(budget=7, on_failure="keep")
    assert pipe.guard is not None
    assert pipe.guard.detector.threshold == 0.3
    assert (pipe.guard.policy.budget, pipe.guard.policy.on_failure) == (7, "keep")
    pipe.disable_guard()
    assert pipe.guard is None
    pipe.enable_guard()
    assert pipe.guard == Guard()


@pytest.mark.parametrize("options", [{"budget": -1}, {"on_failure": "shrug"}])
def test_settings_that_no_call_could_use(guarded: Any, options: dict[str, Any]) -> None:
    pipe = guarded(watching(0.3))
    with pytest.raises(ValueError, match=next(iter(options))):
        pipe.enable_guard(**options)
    assert pipe.guard == watching(0.3)


def test_save_and_load(guarded: Any, plain: Any, tmp_path: Any) -> None:
    guard = Guard(observe_at=(0.1, 0.3), probes=3, detector=PrematureDetail(threshold=0.125, doubt=-0.25), seed=4)
    pipe = guarded(guard, budget=17)
    pipe.save_pretrained(tmp_path)
    for cls in (StableDiffusionPipeline, DiffusionPipeline, AutoPipelineForText2Image):
        assert type(cls.from_pretrained(tmp_path)) is StableDiffusionPipeline
    loaded = GuardedStableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is GuardedStableDiffusionPipeline
    assert loaded.guard == guard.with_policy(budget=17)
    expected, _ = latents_of(pipe, prompt="a fox", generator=seeded(1))
    assert torch.equal(latents_of(loaded, prompt="a fox", generator=seeded(1))[0].images, expected.images)

    pipe.disable_guard()
    pipe.save_pretrained(tmp_path)  # with the guard off no earlier settings may stay behind
    assert GuardedStableDiffusionPipeline.from_pretrained(tmp_path).guard == Guard()
    (tmp_path / "guard.json").write_text("{}")
    with pytest.raises(ValueError, match=r"guard\.json does not hold guard settings"):
        GuardedStableDiffusionPipeline.from_pretrained(tmp_path)


def test_from_pipe_shares_and_does_not_cast(own_parts: dict[str, Any]) -> None:
    own_parts["unet"].to(torch.bfloat16)
    host = build(StableDiffusionPipeline, own_parts)
    pipe = GuardedStableDiffusionPipeline.from_pipe(host)
    assert all(value is host.components[name] for name, value in pipe.components.items())
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    euler = EulerDiscreteScheduler.from_config(host.scheduler.config)
    assert GuardedStableDiffusionPipeline.from_pipe(host, scheduler=euler).scheduler is euler
    assert GuardedStableDiffusionPipeline.from_pipe(host, torch_dtype=torch.float32).unet.dtype == torch.float32


def test_from_pipe_samples_alike(plain: Any) -> None:
    host = plain("euler")
    pipe = GuardedStableDiffusionPipeline.from_pipe(host)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_guard(watching())
    expected, _ = latents_of(host)
    assert torch.equal(latents_of(pipe)[0].images, expected.images)
    back = StableDiffusionPipeline.from_pipe(pipe)
    back.set_progress_bar_config(disable=True)
    assert torch.equal(latents_of(back)[0].images, expected.images)


def test_calibration_of_another_configuration(guarded: Any) -> None:
    pipe = guarded(watching())
    fingerprint = take_fingerprint(pipe, steps=STEPS, guidance_scale=7.5)
    scoring = scoring_of(pipe.guard.detector)
    calibration = Calibration(fingerprint, 0.1, 20, (0.2, 0.5), (), 1, 0, {1: 5.0, 3: -math.inf}, scoring, ())
    pipe.enable_guard(calibration=calibration)
    output, _ = latents_of(pipe)
    assert [record.verdict for record in output.records] == ["flag"] * 3  # by the threshold of the deciding step
    assert output.records[0].fingerprint == fingerprint.digest
    with pytest.raises(ValueError, match=r"made for another configuration .*steps: 6, not 5"):
        latents_of(pipe, num_inference_steps=5)
    with pytest.raises(ValueError, match=r"guidance: 7\.5, not 3"):
        latents_of(pipe, guidance_scale=3.0)
    with pytest.raises(ValueError, match=r"model: .* at 8 x 6"):
        latents_of(pipe, height=16, width=12)
    assert latents_of(pipe, width=12)[0].records  # the host takes both or none
    with pytest.raises(ValueError, match=r"model: .* at 10 x 8"):
        latents_of(pipe, latents=torch.zeros(3, 4, 10, 8))
    with pytest.raises(ValueError, match=r"scheduler: .* schedule "):
        latents_of(pipe, timesteps=[900, 700, 500, 300, 200, 100])
    with pytest.raises(ValueError, match=r"scheduler: .* eta 1"):
        latents_of(pipe, eta=1.0)
    assert latents_of(pipe, height=16, width=16)[0].records  # the model's own size, said
    pipe.enable_guard(budget=0)  # keeps the settings in force, and with them what they hold for
    with pytest.raises(ValueError, match=r"steps: 6, not 5"):
        latents_of(pipe, num_inference_steps=5)
    pipe.scheduler = make_scheduler("euler")
    with pytest.raises(ValueError, match="scheduler: DDIMScheduler"):
        latents_of(pipe)
    pipe.enable_guard(watching())
    assert len(latents_of(pipe)[0].records) == 3


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


def test_clip_skip(guarded: Any) -> None:
    pipe = guarded(watching())
    if hasattr(pipe.text_encoder, "text_model"):
        pytest.skip("clip_skip works with these transformers")
    with pytest.raises(ValueError, match="clip_skip=1 does not work with the installed") as caught:
        latents_of(pipe, clip_skip=1)
    one_line(caught.value)


def test_missing_tokenizer(parts: dict[str, Any]) -> None:
    empty = type(byte_tokenizer())(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    pipe = build(GuardedStableDiffusionPipeline, {**parts, "tokenizer": empty})
    for attempt in (pipe.enable_guard, lambda: latents_of(pipe)):
        with pytest.raises(ValueError, match="tokenizer has 2 tokens") as caught:
            attempt()
        one_line(caught.value)


def test_deep_cache(own_parts: dict[str, Any]) -> None:
    unet = own_parts["unet"]
    original = unet.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    wrapped.__module__ = "DeepCache.extension.deepcache"
    pipe = build(GuardedStableDiffusionPipeline, own_parts)
    pipe.enable_guard(watching())
    unet.forward = wrapped
    with pytest.raises(ValueError, match="DeepCache changes what a probe sees") as caught:
        latents_of(pipe)
    one_line(caught.value)
    pipe.disable_guard()
    assert latents_of(pipe)[0].records is None


def test_edm_scheduler(parts: dict[str, Any]) -> None:
    pipe = build(GuardedStableDiffusionPipeline, parts, EDMEulerScheduler())
    with pytest.raises(TypeError, match=r"EDMEulerScheduler .*preconditioning") as caught:
        latents_of(pipe)
    one_line(caught.value)


def test_another_model_has_another_fingerprint(own_parts: dict[str, Any]) -> None:
    """Whichever weight was changed, of UNet or text encoder; and the same one again once it is changed back."""
    pipe = build(GuardedStableDiffusionPipeline, own_parts)
    take = lambda: take_fingerprint(pipe, steps=STEPS, guidance_scale=7.5).model  # noqa: E731
    own = take()
    assert take() == own
    for module, name in ((pipe.unet, "attn2.to_v"), (pipe.unet, "conv_in"), (pipe.text_encoder, "q_proj")):
        weight = next(w for key, w in module.named_parameters() if name in key)
        with torch.no_grad():
            weight.mul_(1.5)
            assert take() != own
            weight.div_(1.5)
        assert take() == own
    assert take_fingerprint(pipe, steps=STEPS, guidance_scale=7.5, clip_skip=1).model != own
    assert take_fingerprint(pipe.to(torch.float16), steps=STEPS, guidance_scale=7.5).model == own


@pytest.mark.parametrize("encoder", [True, False])
def test_a_fused_adapter_is_another_model(
    own_parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, encoder: bool
) -> None:
    """As peft fuses one, which leaves no trace on the parameter."""

    def write(sign: float) -> Any:
        def change(pipe: Any, *_: Any, **__: Any) -> None:
            pipe.unet.mid_block.attentions[0].proj_in.weight.data += sign

        return change

    monkeypatch.setattr(StableDiffusionPipeline, "fuse_lora", write(1.0))
    monkeypatch.setattr(StableDiffusionPipeline, "unfuse_lora", write(-1.0))
    pipe = build(GuardedStableDiffusionPipeline, own_parts if encoder else own_parts | {"text_encoder": None})
    digests = [take_fingerprint(pipe, steps=STEPS, guidance_scale=7.5).digest]
    for change in (pipe.fuse_lora, pipe.unfuse_lora, pipe.fuse_lora):
        change()
        digests.append(take_fingerprint(pipe, steps=STEPS, guidance_scale=7.5).digest)
    assert digests[1] == digests[3] != digests[0] == digests[2]


def test_a_calibration_is_saved_with_the_guard(guarded: Any, tmp_path: Any) -> None:
    """Else its threshold would be taken up in any configuration."""
    pipe = guarded(Guard(observe_at=(0.2, 0.5)))
    fingerprint = take_fingerprint(pipe, steps=STEPS, guidance_scale=7.5)
    scoring = scoring_of(pipe.guard.detector)
    pipe.enable_guard(calibration=Calibration(fingerprint, 0.1, 20, (0.2, 0.5), (), 1, 0, {3: 0.75}, scoring, (0.5,)))
    pipe.save_pretrained(tmp_path)
    loaded = GuardedStableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.guard, loaded.calibration) == (pipe.guard, pipe.calibration)
    with pytest.raises(ValueError, match=r"steps: 6, not 5"):
        latents_of(loaded, num_inference_steps=5)
    pipe.enable_guard(Guard())
    pipe.save_pretrained(tmp_path)
    assert GuardedStableDiffusionPipeline.from_pretrained(tmp_path).calibration is None
