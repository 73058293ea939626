"""A rescued image that is likely to end in the flagged picture is sampled once more, from other noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from pipelines.calls import PROMPTS, STEPS, latents_of
from pipelines.test_later_looks import Late, looking
from tiny import CountLanes, Forget, seeded

from sd_guard.guard import Guard, GuardRecord
from sd_guard.mitigation import Change, NewSeed, Subject
from sd_guard.mitigation.latents import other_noise
from sd_guard.observation import predicted_image
from sd_guard.pipelines.escalation import Escalation
from sd_guard.policy import Policy
from sd_guard.statistics.sharpness import resemblance

NOISE: list[torch.Tensor] = []  # what the last proposal's image would start from


@dataclass(frozen=True)
class Rewrite:
    """Another prompt, of which the guard knows the words."""

    def propose(self, subject: Subject) -> Iterator[Change]:
        NOISE[:] = [other_noise(subject)]
        yield Change("rewrite", 1.0, subject.encode(["a cat"])[0], "a cat")


@dataclass(frozen=True)
class Embeds:
    """The same, of which it does not."""

    def propose(self, subject: Subject) -> Iterator[Change]:
        yield Change("embeds", 1.0, subject.encode(["a cat"])[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Wary(Policy):
    """Expects every rescue to relapse."""

    def may_relapse(self, survival: float, share: float) -> bool:
        return True


def wary(guard: Guard) -> Guard:
    own = {f.name: getattr(guard.policy, f.name) for f in fields(guard.policy)}
    return Guard(**{f.name: getattr(guard, f.name) for f in fields(guard)} | {"policy": Wary(**own)})


@pytest.fixture
def survivals(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What is left of the flagged picture, in the order in which it is asked."""
    left: list[float] = []
    monkeypatch.setattr(Escalation, "survival_of", lambda _self, _rescue: torch.tensor([left.pop(0)]))
    return left


def attempts_of(record: GuardRecord) -> list[tuple[str, int, bool]]:
    return [(attempt.mitigation, attempt.resumed_from_step, attempt.passed) for attempt in record.attempts]


AT_ONCE = Late(at_once=1.0, later=(9.0,))  # flagged at step 1, rescued, and looked at again at step 3
BETTER, WORSE = [0.7, 0.7, 0.1], [0.7, 0.1, 0.1]  # asked whether it may relapse; the old one; the new one


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpm_multistep", "lms", "pndm"])
def test_the_image_is_that_of_the_new_words_and_other_noise(
    guarded: Any, plain: Any, survivals: list[float], name: str
) -> None:
    survivals[:] = BETTER
    pipe = guarded(wary(looking(AT_ONCE, (Rewrite(),))), name)
    with CountLanes(pipe.unet) as count:
        output, state = latents_of(pipe)
    record = output.records[1]
    assert record.outcome == "rescued"
    assert attempts_of(record) == [("rewrite", 0, False), ("rewrite+new_seed", 0, True)]
    assert record.attempts[1].prompt == "a cat"
    steps = len(pipe.scheduler.timesteps)
    assert count.rows == 2 * steps * len(PROMPTS) + record.extra_lanes
    expected, plain_state = latents_of(plain(name))
    assert torch.equal(state, plain_state)
    assert torch.equal(output.images[[0, 2]], expected.images[[0, 2]])
    start = NOISE[0][None].to(output.images)
    alone = plain(name)(
        "a cat", latents=start / alone_scale(plain(name)), num_inference_steps=STEPS, output_type="latent"
    )
    torch.testing.assert_close(output.images[1], alone.images[0], rtol=1e-3, atol=1e-3)


def alone_scale(pipe: Any) -> float:
    """What a call multiplies the latents by that it is given."""
    pipe.scheduler.set_timesteps(STEPS)
    return float(pipe.scheduler.init_noise_sigma)


def test_of_both_the_one_is_kept_that_has_less_of_the_flagged_picture(guarded: Any, survivals: list[float]) -> None:
    survivals[:] = [0.0]
    first = latents_of(guarded(looking(AT_ONCE, (Rewrite(),))))[0]
    survivals[:] = WORSE
    output = latents_of(guarded(wary(looking(AT_ONCE, (Rewrite(),)))))[0]
    assert attempts_of(output.records[1]) == [("rewrite+new_seed", 0, False), ("rewrite", 0, True)]
    assert output.records[1].outcome == "rescued"
    assert torch.equal(output.images, first.images)
    assert output.records[1].extra_lanes == first.records[1].extra_lanes + 8


def test_one_that_fails_a_look_is_given_up(guarded: Any, survivals: list[float]) -> None:
    """The first rescue still stands: it had passed."""

    @dataclass(frozen=True)
    class OnlyOnce(Late):
        def score(self, observations: Any, later: Any = ()) -> torch.Tensor:
            scores = Late.score(self, observations, later)
            fresh = len(scores) < len(PROMPTS) and observations[0].step == 1 and not later and bool(survivals == [])
            return scores + 9.0 if fresh else scores

    survivals[:] = [0.7]
    output = latents_of(guarded(wary(looking(OnlyOnce(at_once=1.0, later=(9.0,)), (Rewrite(),)))))[0]
    record = output.records[1]
    assert attempts_of(record) == [("rewrite+new_seed", 0, False), ("rewrite", 0, True)]
    assert (record.outcome, record.attempts[0].score) == ("rescued", 9.0)


def test_an_image_gets_one_such_attempt(guarded: Any, survivals: list[float]) -> None:
    for left in (BETTER, WORSE):
        survivals[:] = [*left, 0.7]
        late = Late(at_once=1.0, later=(9.0, 9.0), resumed=(0.0, 0.0, 0.0))
        guard = wary(looking(late, (Rewrite(),), look_again_at=(0.5, 0.98))).with_policy(budget=99)
        record = latents_of(guarded(guard))[0].records[1]
        assert (record.outcome, len(record.attempts)) == ("rescued", 2)


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        ((Embeds(),), {}),  # the memory is still in the words
        ((NewSeed(seeds=1),), {}),  # the noise is another already
        ((Rewrite(),), {"budget": 9}),  # four lanes for the first attempt, eight for another
        ((Rewrite(),), {"max_attempts": 1}),
    ],
)
def test_where_other_noise_is_not_tried(
    guarded: Any, survivals: list[float], plan: Any, options: dict[str, Any]
) -> None:
    survivals[:] = [0.7]
    record = latents_of(guarded(wary(looking(AT_ONCE, plan)).with_policy(**options)))[0].records[1]
    assert (record.outcome, len(record.attempts)) == ("rescued", 1)


@pytest.mark.parametrize(("change", "alike"), [(Forget(), False), (NewSeed(seeds=1), True)])
def test_a_picture_of_other_noise_is_compared_without_the_control(
    guarded: Any, monkeypatch: pytest.MonkeyPatch, change: Any, alike: bool
) -> None:
    """The control shares its noise with the flagged picture, and so tells nothing of one that does not."""
    seen: list[Any] = []
    left_of = Escalation.left_of
    monkeypatch.setattr(Escalation, "left_of", lambda self, *a: (seen.append((self, a)), left_of(self, *a))[1])
    record = latents_of(guarded(looking(Late(at_once=1.0), (change,), look_again_at=())))[0].records[1]
    escalation, (rows, _, now) = seen[-1]
    plainly = float(resemblance(now, predicted_image(escalation.observations)[rows]))
    assert (abs(record.attempts[0].resemblance - plainly) < 1e-5) is alike


@pytest.mark.parametrize("mode", ["single", "none", "list"])
def test_other_noise_is_the_call_s_own(guarded: Any, survivals: list[float], mode: str) -> None:
    """Two calls of one prompt do not come back with one image, and a call that is repeated does."""
    pipe, images = guarded(wary(looking(AT_ONCE, (Rewrite(),)))), []
    for seed in (1, 2, 1):
        generators = {"single": seeded(seed)[0], "none": None, "list": seeded(seed, 8, 9)}
        survivals[:] = BETTER
        torch.manual_seed(seed)
        output = pipe(
            PROMPTS,
            generator=generators[mode],
            num_inference_steps=STEPS,
            output_type="latent",
        )
        assert output.records[1].attempts[-1].mitigation == "rewrite+new_seed"
        images.append(output.images[1])
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[0], images[1]) is (mode == "list")  # there the second image's generator is the same
