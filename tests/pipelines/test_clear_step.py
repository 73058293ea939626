"""A noise prediction on a linear schedule shows nothing for a while: the guard looks where it does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from tiny import Forget, Identity, build, seeded, watching

from sd_guard.evaluation.collect import collect
from sd_guard.mitigation import Change, NewSeed, Subject
from sd_guard.noise import first_clear_step, interpret
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.pipelines.trajectory import walk
from sd_guard.screening.calibrating import score_prompts
from sd_guard.screening.prompts import PromptRow
from sd_guard.screening.quick import QuickScreener
from sd_guard.screening.settings import ModelSettings

STEPS, CLEAR = 10, 2
PROMPTS = ["a dog on the moon", "blue"]
LINEAR = {
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


@pytest.fixture(params=[DDIMScheduler, EulerDiscreteScheduler])
def linear(request: Any, parts: dict[str, Any]) -> Any:
    return build(GuardedStableDiffusionPipeline, parts, request.param(**LINEAR))


def looking(threshold: float = math.inf, **options: Any) -> Any:
    return watching(threshold, observe_at=(0.1, 0.4), **options)


def call(pipe: Any) -> Any:
    return pipe(PROMPTS, generator=seeded(1, 2), num_inference_steps=STEPS, output_type="latent")


@dataclass
class Asks:
    """Keeps what the model predicts for the image's own prompt."""

    answers: list[torch.Tensor] = field(default_factory=list)

    def propose(self, subject: Subject) -> Iterator[Change]:
        self.answers.append(subject.predict(subject.prompt_embeds[None])[0])
        yield from ()


def test_shares_are_of_the_steps_that_show_something(linear: Any) -> None:
    linear.enable_guard(looking(look_again_at=(0.9,)))
    records = call(linear).records
    assert first_clear_step(linear.scheduler, linear.scheduler.timesteps.tolist()) == CLEAR
    for record in records:
        assert {value.step for value in record.statistics} == {2, 5, 9}
        assert record.verdict == "pass"
    linear.scheduler.register_to_config(prediction_type="v_prediction")
    assert {value.step for value in call(linear).records[0].statistics} == {1, 4, 9}


def test_all_ways_of_looking_agree(linear: Any) -> None:
    """In a call, in a calibration and in an evaluation; quick depth is at the same step."""
    guard = looking(look_again_at=(0.7,), probes=0)
    linear.enable_guard(guard)
    called = call(linear).records
    settings = {"num_inference_steps": STEPS, "guidance_scale": 7.5}
    scored = score_prompts(linear, PROMPTS, [1, 2], **settings)
    assert [record.score for record in scored] == pytest.approx([record.score for record in called], rel=1e-4)
    rows = [PromptRow(prompt, "novel") for prompt in PROMPTS]
    table = collect(linear, rows, [], steps=STEPS, guard=guard, progress=False).values.to_pylist()
    assert {row["step"] for row in table} == {5, 7}
    quick = QuickScreener.make(linear, ModelSettings(model="tiny/random", steps=STEPS), guard=guard)
    assert [place.step for place in quick.observed] == [2, 5]
    assert all(record.verdict == "pass" for record in quick.measure(PROMPTS, [1, 2]))


def test_a_flagged_image_is_resumed_from_its_first_clear_step(linear: Any) -> None:
    """And arrives where it was, with nothing changed; without its prompt it passes. It pays for no step before that."""
    linear.disable_guard()
    plain = call(linear).images
    linear.enable_guard(looking(-1e9, plan=(Identity(),)).with_policy(on_failure="keep"))
    kept = call(linear)
    torch.testing.assert_close(kept.images, plain, rtol=1e-4, atol=1e-4)
    assert [attempt.resumed_from_step for attempt in kept.records[0].attempts] == [CLEAR]
    assert kept.records[0].extra_lanes == 2 * (5 + 1 - CLEAR)  # to the deciding step, where nothing has changed
    linear.enable_guard(looking(-1e9, plan=(Forget(),)))
    assert call(linear).records[0].attempts[0].mitigation == "forget"


@pytest.mark.parametrize(("budget", "resumed"), [(100, [CLEAR, 0, 0]), (18, [CLEAR, CLEAR])])
def test_where_too_much_is_left_more_is_made_anew(linear: Any, budget: int, resumed: list[int]) -> None:
    """As far as that can be afforded: an attempt costs 8 lanes to the deciding step, and 12 from the first."""
    guard = looking(-1e9, plan=(Identity(),) * 3).with_policy(max_resemblance=0.9, budget=budget)
    linear.enable_guard(guard)
    record = call(linear).records[0]
    assert [attempt.resumed_from_step for attempt in record.attempts] == resumed
    assert record.extra_lanes <= budget


def test_a_change_of_the_first_latents_is_resumed_from_these(linear: Any) -> None:
    linear.enable_guard(looking(-1e9, plan=(NewSeed(),)).with_policy(on_failure="keep"))
    assert [attempt.resumed_from_step for attempt in call(linear).records[0].attempts] == [0]


def test_a_search_asks_where_the_prediction_shows_something(linear: Any) -> None:
    asks = Asks()
    linear.enable_guard(looking(-1e9, plan=(asks,)).with_policy(on_failure="keep"))
    call(linear)
    for step in walk(linear, PROMPTS, [1, 2], steps=STEPS):
        if step.step == CLEAR:
            expected = interpret(step.conditional, step.x, step.level, "epsilon").x0_hat
            torch.testing.assert_close(torch.stack(asks.answers), expected, rtol=1e-3, atol=1e-3)
            return
    raise AssertionError("the step is one of the schedule")
