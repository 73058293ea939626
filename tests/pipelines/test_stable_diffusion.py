"""The guarded pipeline beside its host: the same images where nothing is flagged, and the host's manners everywhere."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from tiny import SCHEDULERS, Forget, build, byte_tokenizer, components, make_scheduler, seeded, watching

from sd_guard.calibration import Calibration
from sd_guard.detection import PrematureDetail
from sd_guard.fingerprint import take_fingerprint
from sd_guard.guard import Guard
from sd_guard.pipelines.stable_diffusion import (
    GuardedStableDiffusionPipeline,
    GuardedStableDiffusionPipelineOutput,
    MemorizedGenerationError,
)

STEPS = 6
PROMPTS = ["x", "a dog on the moon", "blue"]
GENERATORS = {
    "list": lambda: seeded(1, 2, 3),
    "single": lambda: torch.Generator().manual_seed(1),
    "none": lambda: None,
}


def latents_of(pipe: Any, mode: str = "list", **arguments: Any) -> tuple[Any, torch.Tensor]:
    """Output of a call that starts from a known global state, and the global state that it leaves."""
    arguments = {"prompt": PROMPTS, "num_inference_steps": STEPS, "output_type": "latent"} | arguments
    if "generator" not in arguments:
        arguments["generator"] = GENERATORS[mode]()
    torch.manual_seed(7)
    output = pipe(**arguments)
    return output, torch.get_rng_state()


def scores_of(output: GuardedStableDiffusionPipelineOutput) -> list[float]:
    assert output.records is not None
    return [record.score for record in output.records]


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_only_flagged_images_change(plain: Any, guarded: Any, scheduler: str, generator: str) -> None:
    """Nothing flagged: all bits are the host's, the global random state too. One flagged: its neighbours' bits are."""
    expected, state = latents_of(plain(scheduler), generator)
    watched, watched_state = latents_of(guarded(watching(), scheduler), generator)
    assert np.array_equal(watched.images, expected.images)
    assert torch.equal(watched_state, state)
    scores = scores_of(watched)
    assert all(record.outcome == "passed" for record in watched.records)
    assert all(math.isfinite(score) for score in scores)

    order = np.argsort(scores)
    threshold = (scores[order[1]] + scores[order[2]]) / 2
    mixed, mixed_state = latents_of(guarded(watching(threshold), scheduler), generator)
    flagged = int(order[2])
    for row, record in enumerate(mixed.records):
        same = np.array_equal(mixed.images[row], expected.images[row])
        assert (record.outcome, same) == (("rescued", False) if row == flagged else ("passed", True))
        assert record.score == scores[row]
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
    pipe = guarded(watching())
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
    assert torch.equal(guarded(watching())(*call, generator=seeded(3), output_type="latent").images, expected)


@pytest.mark.parametrize("negative", [False, True])
def test_embeddings_in_place_of_prompts(plain: Any, guarded: Any, negative: bool) -> None:
    host = plain()
    given = {"prompt": None, "prompt_embeds": embeddings(host, PROMPTS)}
    if negative:
        given["negative_prompt_embeds"] = embeddings(host, ["a cat"] * 3)
    expected, _ = latents_of(host, **given)
    watched, _ = latents_of(guarded(watching()), **given)
    assert torch.equal(watched.images, expected.images)
    # Without negative embeddings the sampler's own lane is the control: only the probe is paid.
    assert [record.extra_lanes for record in watched.records] == [4 if negative else 2] * 3
    assert watched.records[0].decided_at_step == 3
    mitigated, _ = latents_of(guarded(watching(-math.inf, (Forget(),)), budget=50), **given)
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
    watched, _ = latents_of(guarded(watching(), scheduler), **schedule)
    assert torch.equal(watched.images, expected.images)
    assert watched.records[0].decided_at_step == middle


def test_user_callbacks(plain: Any, guarded: Any) -> None:
    """Once a step, given what was asked for, and what they return is sampled on."""
    seen: list[tuple[int, list[str]]] = []

    def nudge(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, sorted(tensors)))
        return {"latents": tensors["latents"] * 1.05, "prompt_embeds": tensors["prompt_embeds"].flip(-1)}

    call = {
        "callback_on_step_end": nudge,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "negative_prompt_embeds"],
    }
    expected, _ = latents_of(plain(), **call)
    untouched, _ = latents_of(plain())
    assert not torch.equal(expected.images, untouched.images)
    of_host, seen = seen, []
    watched, _ = latents_of(guarded(watching()), **call)
    assert torch.equal(watched.images, expected.images)
    assert seen == of_host == [(step, ["latents", "negative_prompt_embeds", "prompt_embeds"]) for step in range(STEPS)]


def test_unknown_callback_tensor(guarded: Any) -> None:
    with pytest.raises(ValueError, match=r"has to be in .* but found .*noise_pred"):
        latents_of(guarded(watching()), callback_on_step_end=dict, callback_on_step_end_tensor_inputs=["noise_pred"])


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("cutoff", [0, 1, 2, 3, 5])
def test_guidance_cut_off(plain: Any, guarded: Any, cutoff: int, several: bool) -> None:
    """The host's own callback ends the guidance, before or after the deciding step (3): scored all the same."""
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=cutoff)
    call = {
        "prompt": "a dog on the moon",
        "generator": seeded(1),
        "callback_on_step_end": MultiPipelineCallbacks([callback]) if several else callback,
    }
    expected, _ = latents_of(plain(), **call)
    whole, _ = latents_of(plain(), prompt="a dog on the moon", generator=seeded(1))
    assert torch.equal(expected.images, whole.images) == (cutoff == STEPS - 1)
    watched, _ = latents_of(guarded(watching()), **(call | {"generator": seeded(1)}))
    (record,) = watched.records
    assert torch.equal(watched.images, expected.images)
    assert record.outcome == "passed"
    assert math.isfinite(record.score)
    # Steps 1 and 3 are observed: where the sampler has no control lane any more, the guard pays for it.
    assert record.extra_lanes == 2 + (cutoff < 1) + (cutoff < 3)
    rescued, _ = latents_of(guarded(watching(record.score / 2), budget=50), **(call | {"generator": seeded(1)}))
    assert rescued.records[0].outcome == "rescued"
    assert torch.isfinite(rescued.images).all()


def test_guidance_turned_on_in_the_middle(guarded: Any) -> None:
    def turn_on(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 5.0
        return {"prompt_embeds": torch.cat([tensors["prompt_embeds"]] * 2) if step == 0 else tensors["prompt_embeds"]}

    call = {"callback_on_step_end": turn_on, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.raises(ValueError, match="guidance was turned on in the middle"):
        latents_of(guarded(watching()), guidance_scale=1.0, **call)


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
    pipe.enable_guard(watching())
    watched, _ = latents_of(pipe, **call)
    assert torch.equal(watched.images, expected.images)
    pipe.enable_guard(watching(sorted(scores_of(watched))[1]))
    mixed, _ = latents_of(pipe, **call)
    changed = [not torch.equal(a, b) for a, b in zip(mixed.images, expected.images, strict=True)]
    assert changed == [record.verdict == "flag" for record in mixed.records]
    assert sum(changed) == 1


def test_tuple(guarded: Any) -> None:
    pipe = guarded(watching())
    expected, _ = latents_of(pipe)
    made, _ = latents_of(pipe, return_dict=False)
    assert type(made) is tuple
    assert len(made) == 2
    assert torch.equal(made[0], expected.images)
    assert made[1] is None


def test_output_is_the_hosts(guarded: Any) -> None:
    output, _ = latents_of(guarded(watching()))
    assert isinstance(output, GuardedStableDiffusionPipelineOutput)
    assert output["records"] is output.records
    assert list(output.keys()) == ["images", "records"]  # None is left out, as in the host's output


class Censor(torch.nn.Module):
    """A safety checker that flags the first image."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, clip_input: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
        images = images.clone()
        images[0] = 0
        return images, [row == 0 for row in range(len(images))]


def test_safety_checker_still_runs(guarded: Any) -> None:
    class Extractor:
        def __call__(self, images: Any, return_tensors: str) -> Any:
            batch = type("Batch", (), {"pixel_values": torch.zeros(len(images), 3, 8, 8)})()
            batch.to = lambda device: batch
            return batch

    pipe = guarded(watching())
    before, _ = latents_of(pipe, output_type="np")
    pipe.safety_checker, pipe.feature_extractor = Censor(), Extractor()
    output, _ = latents_of(pipe, output_type="np")
    assert output.nsfw_content_detected == [True, False, False]
    assert not output.images[0].any()
    assert np.array_equal(output.images[1:], before.images[1:])
    assert [record.outcome for record in output.records] == ["passed"] * 3
    assert latents_of(pipe, output_type="np", return_dict=False)[0][1] == [True, False, False]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_blocked_images_are_blank(plain: Any, guarded: Any, output_type: str) -> None:
    pipe = guarded(watching())
    scores = scores_of(latents_of(pipe)[0])
    pipe.enable_guard(watching(sorted(scores)[1], plan=()))
    expected, _ = latents_of(plain(), output_type=output_type)
    output, _ = latents_of(pipe, output_type=output_type)
    assert type(output.images) is type(expected.images)
    for row, record in enumerate(output.records):
        image, host = np.asarray(output.images[row]), np.asarray(expected.images[row])
        assert host.any()
        assert image.dtype == host.dtype
        blocked = row == int(np.argmax(scores))
        assert record.outcome == ("blocked" if blocked else "passed")
        assert np.array_equal(image, np.zeros_like(host) if blocked else host)


def test_keep(plain: Any, guarded: Any) -> None:
    expected, _ = latents_of(plain())
    output, _ = latents_of(guarded(watching(-math.inf, ()), on_failure="keep"))
    assert [(record.verdict, record.outcome) for record in output.records] == [("flag", "kept")] * 3
    assert torch.equal(output.images, expected.images)


def test_raise(guarded: Any) -> None:
    pipe = guarded(watching())
    scores = scores_of(latents_of(pipe)[0])
    pipe.enable_guard(watching(sorted(scores)[1], plan=()), on_failure="raise")
    with pytest.raises(MemorizedGenerationError, match="1 of 3 images stayed memorized") as caught:
        latents_of(pipe)
    output = caught.value.output
    outcomes = [record.outcome for record in output.records]
    assert sorted(outcomes) == ["blocked", "passed", "passed"]
    assert [bool(image.any()) for image in output.images] == [outcome == "passed" for outcome in outcomes]


def test_one_step(plain: Any, guarded: Any) -> None:
    expected, _ = latents_of(plain(), num_inference_steps=1)
    watched, _ = latents_of(guarded(watching()), num_inference_steps=1)
    assert torch.equal(watched.images, expected.images)
    assert [record.decided_at_step for record in watched.records] == [0, 0, 0]
    tried, _ = latents_of(guarded(watching(-math.inf), budget=10), num_inference_steps=1)
    assert [len(record.attempts) for record in tried.records] == [1] * 3
    assert [record.attempts[0].score for record in tried.records] == pytest.approx([0.0] * 3, abs=1e-5)


def test_no_prompt_at_all(plain: Any, guarded: Any) -> None:
    """An empty list is whatever it is upstream."""
    errors = []
    for pipe in (plain(), guarded(watching())):
        with pytest.raises(Exception) as caught:
            pipe([], num_inference_steps=2)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_prediction_types(parts: dict[str, Any], prediction_type: str) -> None:
    scheduler = make_scheduler("ddim", prediction_type=prediction_type)
    expected, _ = latents_of(build(StableDiffusionPipeline, parts, scheduler))
    pipe = build(GuardedStableDiffusionPipeline, parts, scheduler)
    pipe.enable_guard(watching())
    watched, _ = latents_of(pipe)
    assert torch.equal(watched.images, expected.images)
    assert np.isfinite(scores_of(watched)).all()


def test_bfloat16(own_parts: dict[str, Any]) -> None:
    for name in ("unet", "vae", "text_encoder"):
        own_parts[name].to(torch.bfloat16)
    expected, _ = latents_of(build(StableDiffusionPipeline, own_parts))
    pipe = build(GuardedStableDiffusionPipeline, own_parts)
    pipe.enable_guard(watching())
    watched, _ = latents_of(pipe)
    assert watched.images.dtype == torch.bfloat16
    assert torch.equal(watched.images, expected.images)
    assert np.isfinite(scores_of(watched)).all()
    pipe.enable_guard(watching(min(scores_of(watched)) - 1e-3))
    mitigated, _ = latents_of(pipe)
    assert [len(record.attempts) for record in mitigated.records] == [1] * 3


def test_slicing(own_parts: dict[str, Any]) -> None:
    pipes = [build(cls, own_parts) for cls in (StableDiffusionPipeline, GuardedStableDiffusionPipeline)]
    pipes[0].enable_attention_slicing("max")
    own_parts["vae"].enable_slicing()
    pipes[1].enable_guard(watching())
    expected, _ = latents_of(pipes[0], output_type="np")
    watched, _ = latents_of(pipes[1], output_type="np")
    assert np.array_equal(watched.images, expected.images)
    pipes[1].enable_guard(watching(sorted(scores_of(watched))[1]))
    mixed, _ = latents_of(pipes[1], output_type="np")
    same = [np.array_equal(a, b) for a, b in zip(mixed.images, expected.images, strict=True)]
    assert same == [record.verdict == "pass" for record in mixed.records]
    assert same.count(False) == 1


@pytest.mark.parametrize("shared", [True, False])
def test_two_threads(guarded: Any, shared: bool) -> None:
    """On one pipeline, or on two shallow copies with a guard each."""
    first = guarded(watching())
    threshold = sorted(scores_of(latents_of(first)[0]))[1]
    first.enable_guard(watching(threshold))
    second = first if shared else copy.copy(first)
    if not shared:
        second.enable_guard(watching(-math.inf, plan=(), seed=3), on_failure="keep")
        assert first.guard != second.guard
    calls = [(first, PROMPTS, 1), (second, PROMPTS[::-1], 11)] * 2

    def call(pipe: Any, prompts: list[str], seed: int) -> Any:
        generator = seeded(seed, seed + 1, seed + 2)
        return pipe(prompts, generator=generator, num_inference_steps=STEPS, output_type="latent")

    serial = [call(*arguments) for arguments in calls]
    with ThreadPoolExecutor(2) as pool:
        parallel = list(pool.map(lambda arguments: call(*arguments), calls))
    assert len({tuple(map(str, output.records)) for output in serial}) == 2
    for one, other in zip(serial, parallel, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.records == other.records


def test_a_pipeline_within_a_callback(plain: Any, guarded: Any) -> None:
    """A call made in the middle of another has its own session."""
    inner, results = guarded(watching()), []

    def nest(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        results.append(inner("a fox", generator=seeded(9), num_inference_steps=2, output_type="latent").images)
        return {}

    watched, _ = latents_of(guarded(watching()), callback_on_step_end=nest)
    assert torch.equal(watched.images, latents_of(plain())[0].images)
    alone = plain()("a fox", generator=seeded(9), num_inference_steps=2, output_type="latent").images
    assert len(results) == STEPS
    assert all(torch.equal(result, alone) for result in results)


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
    guard = Guard(observe_at=(0.1, 0.3), probe_at=(0.3,), detector=PrematureDetail(threshold=0.125), seed=4)
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
    calibration = Calibration(fingerprint, 0.1, 20, (0.2, 0.5), (0.5,), 1, {1: 5.0, 3: -math.inf})
    pipe.enable_guard(calibration=calibration)
    output, _ = latents_of(pipe)
    assert [record.verdict for record in output.records] == ["flag"] * 3  # by the threshold of the deciding step
    assert output.records[0].fingerprint == fingerprint.digest
    with pytest.raises(ValueError, match=r"made for another configuration .*steps: 6, not 5"):
        latents_of(pipe, num_inference_steps=5)
    with pytest.raises(ValueError, match=r"guidance: 7\.5, not 3"):
        latents_of(pipe, guidance_scale=3.0)
    pipe.scheduler = make_scheduler("euler")
    with pytest.raises(ValueError, match="scheduler: DDIMScheduler"):
        latents_of(pipe)


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


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload(offload: str) -> None:
    outputs = []
    for cls in (StableDiffusionPipeline, GuardedStableDiffusionPipeline):
        pipe = build(cls, components())
        getattr(pipe, offload)()
        if cls is GuardedStableDiffusionPipeline:
            pipe.enable_guard(watching())
        outputs.append(latents_of(pipe)[0])
    assert torch.equal(outputs[0].images, outputs[1].images)
    pipe.enable_guard(watching(-math.inf))
    flagged, _ = latents_of(pipe)
    assert [record.attempts[0].mitigation for record in flagged.records] == ["forget"] * 3


def test_scheduler_of_a_subclass(plain: Any, guarded: Any) -> None:
    class Mine(DDIMScheduler):
        pass

    expected, _ = latents_of(plain(Mine.from_config(make_scheduler("ddim").config)))
    watched, _ = latents_of(guarded(watching(), Mine.from_config(make_scheduler("ddim").config)))
    assert torch.equal(watched.images, expected.images)
