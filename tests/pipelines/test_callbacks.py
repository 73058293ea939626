"""The host's callbacks, calls within calls and calls at once: the guard keeps out of their way."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from pipelines.calls import PROMPTS, STEPS, latents_of, scores_of
from tiny import EVERYBODY, seeded, watching

from sd_guard.pipelines.inputs import GUIDED_TENSORS, LOOP_TENSORS
from sd_guard.pipelines.session import Session


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
    watched, _ = latents_of(guarded(watching(doubt=EVERYBODY)), **call)
    assert torch.equal(watched.images, expected.images)
    assert seen == of_host == [(step, ["latents", "negative_prompt_embeds", "prompt_embeds"]) for step in range(STEPS)]


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_a_callback_may_write_to_what_it_has_returned(plain: Any, guarded: Any, guidance_scale: float) -> None:
    """Into one buffer at each step: what was observed before the deciding step stays what it was."""

    def into(buffer: torch.Tensor | None) -> Any:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return {"latents": tensors["latents"] if buffer is None else buffer.copy_(tensors["latents"])}

        return callback

    pipe, call = guarded(watching(doubt=EVERYBODY)), {"guidance_scale": guidance_scale}
    fresh, _ = latents_of(pipe, callback_on_step_end=into(None), **call)
    same, _ = latents_of(pipe, callback_on_step_end=into(torch.empty_like(fresh.images)), **call)
    assert torch.equal(fresh.images, same.images)
    assert [record.statistics for record in fresh.records] == [record.statistics for record in same.records]


def test_the_host_is_asked_for_what_somebody_looks_at(guarded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor that is asked for costs the host a copy of all its locals, at each step."""
    given: list[set[str]] = []
    own = Session.on_step_end

    def on_step_end(self: Any, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        given.append(set(tensors))
        return own(self, pipe, step, timestep, tensors)

    monkeypatch.setattr(Session, "on_step_end", on_step_end)
    wanted = ["negative_prompt_embeds"]
    latents_of(
        guarded(watching()),
        callback_on_step_end=lambda *_: {},
        callback_on_step_end_tensor_inputs=wanted,
    )
    decided = 3  # the deciding step, after which nothing is looked at
    assert all({*LOOP_TENSORS, *GUIDED_TENSORS, *wanted} == each for each in given[: decided + 1])
    assert [{"latents", "prompt_embeds", *wanted}] * (STEPS - decided - 1) == given[decided + 1 :]


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
    watched, _ = latents_of(guarded(watching(doubt=EVERYBODY)), **(call | {"generator": seeded(1)}))
    (record,) = watched.records
    assert torch.equal(watched.images, expected.images)
    assert record.outcome == "passed"
    assert math.isfinite(record.score)
    # Steps 1 and 3 are observed: where the sampler has no control lane any more, the guard pays for it.
    assert record.extra_lanes == 2 + (cutoff < 1) + (cutoff < 3)
    rescued, _ = latents_of(
        guarded(watching(record.score - 0.1, doubt=EVERYBODY), budget=50), **(call | {"generator": seeded(1)})
    )
    assert rescued.records[0].outcome == "rescued"
    assert torch.isfinite(rescued.images).all()


@pytest.mark.parametrize("at", [0, 3, STEPS - 2])
def test_guidance_turned_on_in_the_middle(guarded: Any, at: int) -> None:
    """Before the deciding step (3) or after it, when nothing is looked at any more."""

    def turn_on(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step != at:
            return {}
        pipe._guidance_scale = 5.0
        return {"prompt_embeds": torch.cat([tensors["prompt_embeds"]] * 2)}

    call = {"callback_on_step_end": turn_on, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.raises(ValueError, match="guidance was turned on in the middle"):
        latents_of(guarded(watching(doubt=EVERYBODY)), guidance_scale=1.0, **call)


def test_a_pipeline_within_a_callback(plain: Any, guarded: Any) -> None:
    """A call made in the middle of another has its own session."""
    inner, results = guarded(watching(doubt=EVERYBODY)), []

    def nest(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        results.append(inner("a fox", generator=seeded(9), num_inference_steps=2, output_type="latent").images)
        return {}

    watched, _ = latents_of(guarded(watching(doubt=EVERYBODY)), callback_on_step_end=nest)
    assert torch.equal(watched.images, latents_of(plain())[0].images)
    alone = plain()("a fox", generator=seeded(9), num_inference_steps=2, output_type="latent").images
    assert len(results) == STEPS
    assert all(torch.equal(result, alone) for result in results)


@pytest.mark.parametrize("shared", [True, False])
def test_two_threads(guarded: Any, shared: bool) -> None:
    """On one pipeline, or on two shallow copies with a guard each."""
    first = guarded(watching(doubt=EVERYBODY))
    threshold = sorted(scores_of(latents_of(first)[0]))[1]
    first.enable_guard(watching(threshold, doubt=EVERYBODY))
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
