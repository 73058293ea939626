"""Changes that the host's loop cannot go on with, and those that start elsewhere than at its first latent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pipelines.calls import PROMPTS, STEPS, latents_of
from tiny import SCHEDULERS, CountLanes, Forget, seeded, watching

from sd_guard.guard import Guard
from sd_guard.mitigation import Change, DelayedGuidance, Later, Subject
from sd_guard.mitigation.guidance import Constant, Transition
from sd_guard.noise import early_steps
from sd_guard.observation import Observation

ROW, OTHERS = 1, [0, 2]  # the image that is flagged, and its neighbours
SCALE = 7.5  # of the host's call
LOOKS = {"observe_at": (0.2, 0.5), "look_again_at": ()}  # steps 1 and 3 of 6


@dataclass(frozen=True)
class Flag:
    """Flags one image of three; what is resumed scores as it is told, at the deciding step and at the second look."""

    resumed: tuple[float, float] = (0.0, 0.0)
    threshold: float = 0.5

    def score(self, observations: Any, later: Sequence[Observation] = ()) -> torch.Tensor:
        images = len(observations[0].values["detail"])
        if images < len(PROMPTS):
            return torch.full((images,), self.resumed[bool(later)])
        return torch.eye(images)[ROW]

    def in_doubt(self, observations: Any) -> torch.Tensor:
        return torch.zeros(len(observations[0].values["detail"]), dtype=torch.bool)


@dataclass(frozen=True)
class Own:
    """One change, of what is given; the rest as it was. Functions are given the subject."""

    fields: dict[str, Any]

    def propose(self, subject: Subject) -> Iterator[Change]:
        given = {name: value(subject) if name in MADE else value for name, value in self.fields.items()}
        yield Change("own", 0.0, **({"prompt_embeds": subject.prompt_embeds} | given))


MADE = ("attention_mask", "anchor_embeds", "latents")


def changing(*plan: Any, resumed: tuple[float, float] = (0.0, 0.0), **options: Any) -> Guard:
    guard = watching(plan=plan, detector=Flag(resumed), **(LOOKS | options))
    return guard.with_policy(budget=100)


def flagged_alone(pipe: Any, **arguments: Any) -> torch.Tensor:
    """What the host makes of the flagged image in a call of its own: two lanes a step, as the loop of its own."""
    arguments = {"prompt": [PROMPTS[ROW]], "generator": seeded(ROW + 1)} | arguments
    return latents_of(pipe, **arguments)[0].images[0]


def looked_at(pipe: Any) -> list[int]:
    timesteps = pipe.scheduler.timesteps.tolist()
    return pipe.guard.steps(len(timesteps), early_steps(pipe.scheduler, timesteps))


def start_of(pipe: Any, asked: int) -> int:
    """The step that is resumed from: observed ones are, and the first."""
    steps = looked_at(pipe)
    return max(step for step in (0, *steps) if step <= asked)


# Changes in a loop of its own that change nothing, and the lanes that looking at them costs.
NOTHING: dict[str, tuple[dict[str, Any], int]] = {
    "guidance": ({"guidance": Constant(SCALE)}, 0),
    "mask": ({"attention_mask": lambda subject: torch.ones(len(subject.prompt_embeds), dtype=torch.bool)}, 0),
    "anchor": ({"anchor_embeds": lambda subject: subject.empty_embeds}, 2),
    "snapshot": ({"guidance": Constant(SCALE), "resume_from": 3}, 0),
}


FEW = ("ddim", "heun", "dpm_multistep_sde")
EVERY = [*((name, "guidance") for name in SCHEDULERS), *((name, change) for name in FEW for change in NOTHING)]


@pytest.mark.parametrize(("name", "change"), dict.fromkeys(EVERY))
def test_nothing_changed_arrives_where_the_host_does(guarded: Any, plain: Any, name: str, change: str) -> None:
    """Its neighbours' bits are those of the plain pipeline, and each lane is on the bill."""
    fields, looking = NOTHING[change]
    pipe = guarded(changing(Own(fields)), name)
    expected, state = latents_of(plain(name))
    with CountLanes(pipe.unet) as count:
        output, own_state = latents_of(pipe)
    record, steps = output.records[ROW], len(pipe.scheduler.timesteps)
    start = start_of(pipe, fields.get("resume_from", 0))
    assert [attempt.resumed_from_step for attempt in record.attempts] == [start]
    assert (record.outcome, record.extra_lanes) == ("rescued", 2 * (steps - start) + looking)
    assert count.rows == 2 * steps * len(PROMPTS) + record.extra_lanes
    assert torch.equal(output.images[OTHERS], expected.images[OTHERS])
    assert torch.equal(state, own_state)
    torch.testing.assert_close(output.images[ROW], expected.images[ROW], rtol=2e-3, atol=2e-3)
    if change == "guidance" and name != "dpm_sde":  # the host's own arithmetic; a Brownian tree is of the whole batch
        assert torch.equal(output.images[ROW], flagged_alone(plain(name)))


@pytest.mark.parametrize(("name", "asked"), [*((name, 3) for name in SCHEDULERS), *(("ddim", n) for n in (1, 2, 5))])
def test_a_snapshot_is_resumed_where_it_was_taken(guarded: Any, plain: Any, name: str, asked: int) -> None:
    """In the host's loop: the steps from there to the deciding one are made again, and nothing else changes."""
    pipe = guarded(changing(Own({"resume_from": asked})), name)
    expected, state = latents_of(plain(name))
    with CountLanes(pipe.unet) as count:
        output, own_state = latents_of(pipe)
    record, steps = output.records[ROW], len(pipe.scheduler.timesteps)
    start, last = start_of(pipe, asked), looked_at(pipe)[-1]
    assert [attempt.resumed_from_step for attempt in record.attempts] == [start]
    assert (record.outcome, record.extra_lanes) == ("rescued", 2 * (last + 1 - start))
    assert count.rows == 2 * steps * len(PROMPTS) + record.extra_lanes
    assert torch.equal(output.images[OTHERS], expected.images[OTHERS])
    assert torch.equal(state, own_state)
    torch.testing.assert_close(output.images[ROW], expected.images[ROW], rtol=1e-3, atol=1e-3)


def test_a_snapshot_is_of_what_the_callback_left(guarded: Any) -> None:
    """The latents that step 3 was made from, not those that step 2 ended with: the score is the same to the bit."""

    def push(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] + (step == 2)}

    guard = watching(-math.inf, (Own({"resume_from": 3}),), **LOOKS)
    output, _ = latents_of(guarded(guard), callback_on_step_end=push)
    for record in output.records:
        assert [(attempt.score, attempt.resumed_from_step) for attempt in record.attempts] == [(record.score, 3)]


def test_images_that_resume_at_different_steps(guarded: Any) -> None:
    """Each gets its own way, and pays for that."""

    @dataclass(frozen=True)
    class Each:
        def propose(self, subject: Subject) -> Iterator[Change]:
            resume_from = PROMPTS.index(str(subject.prompt)) + 1
            yield Change("each", 0.0, subject.prompt_embeds, resume_from=resume_from)

    output, _ = latents_of(guarded(watching(-math.inf, (Each(),), **LOOKS)))
    assert [record.attempts[0].resumed_from_step for record in output.records] == [1, 1, 3]
    assert [record.extra_lanes for record in output.records] == [6, 6, 2]
    for record in output.records:
        assert record.attempts[0].score == pytest.approx(record.score, abs=1e-3)


@pytest.mark.parametrize("name", ["ddim", "unipc", "kdpm2_ancestral"])
def test_an_own_scale_is_the_hosts_call_with_it(guarded: Any, plain: Any, name: str) -> None:
    output, _ = latents_of(guarded(changing(Own({"guidance": Constant(3.0)})), name))
    assert torch.equal(output.images[ROW], flagged_alone(plain(name), guidance_scale=3.0))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_scale_may_change_on_the_way(guarded: Any, plain: Any, rescale: float) -> None:
    """Below zero at first, the call's from the middle on: as of a host whose scale a callback changes."""

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 2.0 if step + 1 < STEPS / 2 else SCALE
        return {}

    guard = changing(Own({"guidance": Transition(2.0, SCALE, 0.5)}))
    output, _ = latents_of(guarded(guard), guidance_rescale=rescale)
    arguments = {"guidance_scale": 2.0, "guidance_rescale": rescale, "callback_on_step_end": change}
    assert torch.equal(output.images[ROW], flagged_alone(plain(), **arguments))


def test_guidance_sees_every_norm_since_it_was_resumed(guarded: Any) -> None:
    asked: list[tuple[float, int]] = []

    @dataclass(frozen=True)
    class Listening:
        def scale(self, share: float, cfg_norms: Any) -> float:
            asked.append((share, len(cfg_norms)))
            return SCALE

    pipe = guarded(changing(Own({"guidance": Listening(), "resume_from": 3})))
    record = latents_of(pipe)[0].records[ROW]
    assert asked == [(3 / STEPS, 1), (4 / STEPS, 2), (5 / STEPS, 3)]
    assert [record.outcome, record.extra_lanes] == ["rescued", 6]


@pytest.mark.parametrize(("last", "lanes"), [(2, 3 * 2 + 3 * 1 + 2), (5, 6 * 2)])
def test_what_the_host_did_last_is_repeated(guarded: Any, last: int, lanes: int) -> None:
    """Guidance that ended before the deciding step stays ended; what ends later, a loop of its own cannot know."""

    def cut(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step != last:
            return {}
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"][-len(PROMPTS) :]}

    pipe = guarded(changing(Own({"guidance": Constant(SCALE)})))
    wanted = {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with CountLanes(pipe.unet) as count:
        output, _ = latents_of(pipe, **wanted)
    host = len(PROMPTS) * (2 * (last + 1) + STEPS - (last + 1))
    assert output.records[ROW].extra_lanes == lanes  # the control of step 3 among them, of the host's and its own
    assert count.rows == host + sum(record.extra_lanes for record in output.records)


def test_own_latents_are_the_hosts_call_with_them(guarded: Any, plain: Any) -> None:
    """In the host's loop; to the end it is one of a batch, where the reference is alone."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    output, _ = latents_of(guarded(changing(Own({"latents": lambda subject: latents[0].double()}))))
    expected = flagged_alone(plain(), latents=latents)
    torch.testing.assert_close(output.images[ROW], expected, rtol=1e-3, atol=1e-3)
    assert (expected - flagged_alone(plain())).abs().max() > 0.1


def test_an_attempt_that_fails_at_the_deciding_step_is_not_walked_on(guarded: Any) -> None:
    guard = changing(Own({"guidance": Constant(1.0)}), Forget(), resumed=(1.0, 0.0))
    record = latents_of(guarded(guard))[0].records[ROW]
    assert (record.outcome, record.extra_lanes, len(record.attempts)) == ("blocked", 16, 2)


@pytest.mark.parametrize(("later", "outcome", "lanes"), [(0.0, "rescued", 12), (1.0, "blocked", 10)])
def test_the_second_look_is_the_own_loops(guarded: Any, later: float, outcome: str, lanes: int) -> None:
    """It comes before the host's, and what fails it there is not sampled to the end."""
    guard = changing(Own({"guidance": Constant(1.0)}), resumed=(0.0, later), look_again_at=(0.7,))
    record = latents_of(guarded(guard))[0].records[ROW]
    assert (record.outcome, record.extra_lanes) == (outcome, lanes)
    assert [attempt.score for attempt in record.attempts] == [later]


@dataclass(frozen=True)
class FlagLate(Flag):
    """Flags at the second look."""

    def score(self, observations: Any, later: Sequence[Observation] = ()) -> torch.Tensor:
        scores = Flag.score(self, observations, later)
        return scores if later else torch.zeros_like(scores)


def test_what_is_flagged_late_is_sampled_to_the_end_as_well(guarded: Any, plain: Any) -> None:
    guard = watching(
        plan=(Own({"guidance": Constant(1.5)}),), detector=FlagLate(), **(LOOKS | {"look_again_at": (0.7,)})
    )
    output, _ = latents_of(guarded(guard))
    record = output.records[ROW]
    assert (record.outcome, record.decided_at_step, record.extra_lanes) == ("rescued", 4, 12)
    assert torch.equal(output.images[ROW], flagged_alone(plain(), guidance_scale=1.5))


def test_the_budget_pays_for_the_whole_way_or_for_none_of_it(guarded: Any) -> None:
    """Eleven lanes do not, and the next mitigation, which costs less, gets its turn."""
    plan = (Own({"guidance": Constant(1.0)}), Forget())
    for budget, expected in ((11, [("forget", True)]), (12, [("own", True)])):
        record = latents_of(guarded(changing(*plan).with_policy(budget=budget)))[0].records[ROW]
        assert [(attempt.mitigation, attempt.passed) for attempt in record.attempts] == expected
        assert record.extra_lanes <= budget


def test_an_image_that_ends_in_the_flagged_picture_is_blocked(guarded: Any) -> None:
    """The looks may have been fooled; the finished image is compared once more."""
    guard = changing(Own({"guidance": Constant(SCALE)})).with_policy(max_resemblance=0.999)
    resembling = changing(Own({"guidance": Constant(SCALE)}), resumed=(-99.0, -99.0))
    assert latents_of(guarded(guard))[0].records[ROW].outcome == "blocked"
    assert latents_of(guarded(resembling))[0].records[ROW].outcome == "rescued"


def test_what_is_interrupted_is_not_handed_out(guarded: Any) -> None:
    """The place of the image holds the flagged one until sampling is over."""

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 4
        return {}

    output, _ = latents_of(guarded(changing(Own({"guidance": Constant(1.0)}))), callback_on_step_end=stop)
    assert [record.outcome for record in output.records] == ["passed", "blocked", "passed"]
    assert not output.images[ROW].any()


@pytest.mark.parametrize(
    ("guidance_scale", "expected"),
    [(SCALE, [[16, 3]] * STEPS), (1.0, [[3], [3], [16], [3], [3], [16], [3], [3]])],  # the controls of steps 1 and 3
)
def test_a_mask_goes_to_the_conditional_lane_only(guarded: Any, guidance_scale: float, expected: Any) -> None:
    """Of the flagged image's own calls; those of the host have none."""
    masks: list[tuple[int, torch.Tensor | None]] = []

    def look(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masks.append((len(args[0]), kwargs.get("encoder_attention_mask")))

    def first(subject: Subject) -> torch.Tensor:
        return torch.arange(len(subject.prompt_embeds)) < 3

    pipe = guarded(changing(Own({"attention_mask": first})))
    hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    try:
        latents_of(pipe, guidance_scale=guidance_scale)
    finally:
        hook.remove()
    own = [mask.sum(1).tolist() for rows, mask in masks if mask is not None]
    assert own == expected
    assert [rows for rows, mask in masks if mask is None] == [3 if guidance_scale == 1.0 else 6] * (
        len(masks) - len(own)
    )


UNGUIDED = DelayedGuidance(until=(0.9,))  # longer than where it resumes, so that it has something to change


@pytest.mark.parametrize("mitigation", [Own({"guidance": Constant(1.0)}), Later(mitigation=UNGUIDED, at=0.5)])
def test_bits_of_the_neighbours_that_share_a_generator(guarded: Any, plain: Any, mitigation: Any) -> None:
    for name in ("ddim", "euler_ancestral"):
        expected, state = latents_of(plain(name), "single")
        output, own_state = latents_of(guarded(changing(mitigation), name), "single")
        assert output.records[ROW].outcome == "rescued"
        assert torch.equal(state, own_state)
        assert torch.equal(output.images[OTHERS], expected.images[OTHERS])
        assert (output.images[ROW] - expected.images[ROW]).abs().max() > 0.1  # by more than rounding


def test_what_cannot_run_is_refused_when_it_is_configured_and_before_each_call(guarded: Any) -> None:
    @dataclass(frozen=True)
    class Picky(Forget):
        def check(self, pipe: Any) -> None:
            if pipe.scheduler.config.get("clip_sample"):
                raise ValueError("picky: clip_sample=True; set it to False")

    pipe = guarded(watching(plan=(Later(mitigation=Picky()),)))
    before = pipe.guard
    pipe.scheduler.register_to_config(clip_sample=True)
    with CountLanes(pipe.unet) as count:
        for refused in (lambda: pipe.enable_guard(watching(plan=(Picky(),))), lambda: latents_of(pipe)):
            with pytest.raises(ValueError, match=r"^picky: clip_sample=True; set it to False$"):
                refused()
    assert (pipe.guard, count.rows) == (before, 0)
