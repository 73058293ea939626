"""Where no attempt passes and the image is to be kept, it is that of the attempt which came nearest to passing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import pytest
import torch
from pipelines.calls import PROMPTS, STEPS, latents_of
from pipelines.test_other_noise import wary
from tiny import SCHEDULERS, CountLanes, Forget, Identity, seeded, watching

from sd_guard.guard import Guard, GuardRecord
from sd_guard.mitigation import Change, Subject
from sd_guard.mitigation.guidance import Constant
from sd_guard.observation import Observation
from sd_guard.pipelines.escalation import Escalation

ROW, OTHERS = 1, [0, 2]  # the image that is flagged, and its neighbours
AT_ONCE: dict[str, Any] = {"observe_at": (0.2, 0.5), "look_again_at": ()}  # steps 1 and 3 of 6
LATER: dict[str, Any] = {"observe_at": (0.2,), "look_again_at": (0.5,)}  # steps 1 and 3 of 6


@dataclass(frozen=True)
class Say:
    """Other words; in a loop of its own where it has a guidance scale of its own."""

    prompt: str
    scale: float | None = None

    def propose(self, subject: Subject) -> Iterator[Change]:
        guidance = None if self.scale is None else Constant(self.scale)
        yield Change(self.prompt, 0.0, subject.encode([self.prompt])[0], self.prompt, guidance=guidance)


@dataclass(frozen=True)
class Told:
    """Flags one image of three, at once or at the later look; what is resumed scores as it is told, look by look."""

    resumed: Sequence[float]
    flagged: tuple[float, float] = (9.0, 9.0)
    threshold: float = 0.5
    said: list[float] = field(default_factory=list)

    def score(self, observations: Any, later: Sequence[Observation] = ()) -> torch.Tensor:
        images = len(observations[0].values["detail"])
        if images == len(PROMPTS):
            return torch.eye(images)[ROW] * self.flagged[bool(later)]
        self.said.append(self.resumed[len(self.said)])
        return torch.full((images,), self.said[-1])

    def in_doubt(self, observations: Any) -> torch.Tensor:
        return torch.zeros(len(observations[0].values["detail"]), dtype=torch.bool)


def keeping(plan: Any, detector: Any, looks: dict[str, Any], **policy: Any) -> Guard:
    return watching(plan=plan, detector=detector, **looks).with_policy(**{"on_failure": "keep", "budget": 100} | policy)


def tried(record: GuardRecord) -> list[tuple[str, bool, bool]]:
    return [(attempt.mitigation, attempt.passed, attempt.kept) for attempt in record.attempts]


def weaken(step: int) -> Any:
    """A callback that lowers the guidance scale at the end of a step."""

    def on_step_end(pipe: Any, now: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 3.0 if now >= step else pipe._guidance_scale
        return {}

    return on_step_end


def host_of(pipe: Any, prompt: str, **arguments: Any) -> torch.Tensor:
    """What the host makes of the flagged image with other words."""
    prompts = [prompt if row == ROW else own for row, own in enumerate(PROMPTS)]
    return latents_of(pipe, prompt=prompts, **arguments)[0].images[ROW]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_best_is_handed_out_and_nothing_else_changes(guarded: Any, plain: Any, name: str) -> None:
    """The second of three: as if the host had had its words, for no more lanes than the attempts cost."""
    plan = (Say("a"), Say("a cat"), Say("blue"))
    pipe = guarded(keeping(plan, Told([3.0, 1.0, 2.0]), AT_ONCE), name)
    expected, state = latents_of(plain(name))
    with CountLanes(pipe.unet) as count:
        output, own_state = latents_of(pipe)
    record, steps = output.records[ROW], len(pipe.scheduler.timesteps)
    assert tried(record) == [("a", False, False), ("blue", False, False), ("a cat", False, True)]
    assert (record.verdict, record.outcome, record.score) == ("flag", "kept", 9.0)
    assert count.rows == 2 * steps * len(PROMPTS) + record.extra_lanes
    blank = latents_of(guarded(keeping(plan, Told([3.0, 1.0, 2.0]), AT_ONCE, on_failure="blank"), name))[0]
    assert record.extra_lanes == blank.records[ROW].extra_lanes
    assert not blank.images[ROW].any()
    assert [attempt.kept for attempt in blank.records[ROW].attempts] == [False] * 3
    assert torch.equal(state, own_state)
    assert torch.equal(output.images[OTHERS], expected.images[OTHERS])
    torch.testing.assert_close(output.images[ROW], host_of(plain(name), "a cat"), rtol=1e-3, atol=1e-3)
    assert (output.images[ROW] - expected.images[ROW]).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["single", "none"])
def test_neighbours_that_share_a_generator(guarded: Any, plain: Any, mode: str) -> None:
    for name in ("ddim", "euler_ancestral"):
        expected, state = latents_of(plain(name), mode)
        output, own_state = latents_of(guarded(keeping((Say("a"),), Told([1.0]), AT_ONCE), name), mode)
        assert tried(output.records[ROW]) == [("a", False, True)]
        assert torch.equal(state, own_state)
        assert torch.equal(output.images[OTHERS], expected.images[OTHERS])
        assert not torch.equal(output.images[ROW], expected.images[ROW])


@dataclass(frozen=True)
class SayInTurn:
    """Three images of a batch get three words, each another one."""

    turn: int

    def propose(self, subject: Subject) -> Iterator[Change]:
        yield from Say(self.words(str(subject.prompt))).propose(subject)

    def words(self, prompt: str) -> str:
        return ("red", "a cat", "a dog in the sun")[(PROMPTS.index(prompt) + self.turn) % 3]


def test_each_image_of_a_batch_has_its_own_best_whatever_is_tried_first(guarded: Any) -> None:
    """By what the detector really sees of images that are tried together; the same for all orders of the plan."""
    found: list[tuple[list[str], torch.Tensor]] = []
    for plan in permutations(SayInTurn(turn) for turn in range(3)):
        output, _ = latents_of(guarded(watching(-50.0, plan, **AT_ONCE).with_policy(on_failure="keep", budget=100)))
        places: list[int] = []  # of the best in the plan
        for row, record in enumerate(output.records):
            scores = {attempt.mitigation: attempt.score for attempt in record.attempts}
            best = min(scores, key=scores.__getitem__)
            assert len(set(scores.values())) == 3
            assert [(a.mitigation == best, a.kept) for a in record.attempts] == [(False, False)] * 2 + [(True, True)]
            places.append([change.words(PROMPTS[row]) for change in plan].index(best))
        assert len(set(places)) > 1  # not the same attempt is best for all
        found.append(([record.attempts[-1].mitigation for record in output.records], output.images))
    names, images = found[0]
    for others, other_images in found[1:]:
        assert others == names
        torch.testing.assert_close(other_images, images, rtol=1e-3, atol=1e-3)


def test_what_is_still_the_flagged_picture_comes_last(guarded: Any) -> None:
    """However low its score is."""
    guard = keeping((Identity(), Say("a cat")), Told([0.6, 7.0]), AT_ONCE, max_resemblance=0.9)
    record = latents_of(guarded(guard))[0].records[ROW]
    assert record.attempts[0].resemblance > 0.9 > record.attempts[1].resemblance
    assert tried(record) == [("identity", False, False), ("a cat", False, True)]


@pytest.mark.parametrize("plan", [(), (Say("a"),)])
def test_without_an_attempt_it_is_the_image_as_it_would_have_been(guarded: Any, plain: Any, plan: Any) -> None:
    """To the bit: no mitigation, or none that the budget pays for."""
    output, _ = latents_of(guarded(keeping(plan, Told([1.0]), AT_ONCE, budget=7)))
    assert torch.equal(output.images, latents_of(plain())[0].images)
    assert (output.records[ROW].outcome, output.records[ROW].attempts) == ("kept", ())


def test_an_attempt_whose_score_is_no_number_is_not_kept(guarded: Any, plain: Any) -> None:
    output, _ = latents_of(guarded(keeping((Say("a"),), Told([math.nan]), AT_ONCE)))
    assert tried(output.records[ROW]) == [("a", False, False)]
    assert torch.equal(output.images, latents_of(plain())[0].images)
    output, _ = latents_of(guarded(keeping((Say("a"), Say("blue")), Told([math.nan, 8.0]), AT_ONCE)))
    assert tried(output.records[ROW]) == [("a", False, False), ("blue", False, True)]


@pytest.mark.parametrize("budget", [12, 100])
def test_what_is_flagged_late_goes_on_to_where_the_loop_stands(guarded: Any, plain: Any, budget: int) -> None:
    """Both fail at the deciding step, four lanes each; the way from there to the later look is on the bill."""
    pipe = guarded(keeping((Say("a cat"), Say("blue")), Told([1.0, 2.0, 3.0], (0.0, 9.0)), LATER, budget=budget))
    with CountLanes(pipe.unet) as count:
        output, _ = latents_of(pipe)
    record = output.records[ROW]
    assert tried(record) == [("blue", False, False), ("a cat", False, True)]
    assert [attempt.score for attempt in record.attempts] == [2.0, 3.0]  # of the last look that each got
    assert (record.outcome, record.decided_at_step, record.extra_lanes) == ("kept", 3, 4 + 4 + 4)
    assert count.rows == 2 * STEPS * len(PROMPTS) + 12
    torch.testing.assert_close(output.images[ROW], host_of(plain(), "a cat"), rtol=1e-3, atol=1e-3)
    assert torch.equal(output.images[OTHERS], latents_of(plain())[0].images[OTHERS])


def test_a_loop_of_its_own_is_sampled_to_its_end(guarded: Any, plain: Any) -> None:
    pipe = guarded(keeping((Say("a cat", scale=1.5), Say("blue")), Told([1.0, 2.0]), AT_ONCE))
    with CountLanes(pipe.unet) as count:
        output, _ = latents_of(pipe)
    record = output.records[ROW]
    assert tried(record) == [("blue", False, False), ("a cat", False, True)]
    assert (record.outcome, record.extra_lanes) == ("kept", 8 + 8 + 4)
    assert count.rows == 2 * STEPS * len(PROMPTS) + 20
    alone = latents_of(plain(), prompt=["a cat"], generator=seeded(ROW + 1), guidance_scale=1.5)[0].images[0]
    assert torch.equal(output.images[ROW], alone)
    assert torch.equal(output.images[OTHERS], latents_of(plain())[0].images[OTHERS])


@pytest.mark.parametrize(("budget", "kept", "lanes"), [(19, "blue", 16), (20, "a cat", 20)])
def test_the_best_that_the_budget_pays_for(guarded: Any, budget: int, kept: str, lanes: int) -> None:
    """The nearer one would have to be sampled to the end of a loop of its own, which takes four lanes more."""
    guard = keeping((Say("a cat", scale=1.5), Say("blue")), Told([1.0, 2.0]), AT_ONCE, budget=budget)
    record = latents_of(guarded(guard))[0].records[ROW]
    assert [attempt.mitigation for attempt in record.attempts if attempt.kept] == [kept]
    assert record.extra_lanes == lanes


# One passes at once, and is taken back at the later look; the other fails: the scores, and which is kept for how much.
TAKEN_BACK = {
    "failed before, worse": (("blue", "a cat"), [3.0, 0.0, 2.0], "a cat", 8),
    "failed after, worse": (("a cat", "blue"), [0.0, 2.0, 3.0], "a cat", 8),
    "failed before, nearer": (("blue", "a cat"), [1.0, 0.0, 2.0, 1.5], "blue", 12),
    "failed after, nearer": (("a cat", "blue"), [0.0, 2.0, 1.0, 1.5], "blue", 12),
}


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpm_multistep", "lms", "dpm_multistep_sde"])
@pytest.mark.parametrize("case", TAKEN_BACK)
def test_a_rescue_that_was_taken_back_is_an_attempt_as_others_are(
    guarded: Any, plain: Any, case: str, name: str
) -> None:
    """It is where the loop stands already; another has to go there first. The order of the plan does not matter."""
    words, scores, kept, lanes = TAKEN_BACK[case]
    pipe = guarded(keeping(tuple(map(Say, words)), Told(scores), LATER), name)
    with CountLanes(pipe.unet) as count:
        output, _ = latents_of(pipe)
    record, steps = output.records[ROW], len(pipe.scheduler.timesteps)
    other = next(word for word in words if word != kept)
    assert tried(record) == [(other, False, False), (kept, False, True)]
    assert record.outcome == "kept"
    if steps == STEPS:
        assert record.extra_lanes == lanes
    assert count.rows == 2 * steps * len(PROMPTS) + record.extra_lanes
    torch.testing.assert_close(output.images[ROW], host_of(plain(name), kept), rtol=1e-3, atol=1e-3)
    assert torch.equal(output.images[OTHERS], latents_of(plain(name))[0].images[OTHERS])


@dataclass(frozen=True)
class ToldEach:
    """Scores as it is told, image by image, in the order in which it is asked; but not at the host's later look."""

    scores: Iterator[list[float]]
    threshold: float = 0.5

    def score(self, observations: Any, later: Sequence[Observation] = ()) -> torch.Tensor:
        images = len(observations[0].values["detail"])
        if images == len(PROMPTS) and later:
            return torch.full((images,), 9.0)
        return torch.tensor(next(self.scores))

    def in_doubt(self, observations: Any) -> torch.Tensor:
        return torch.zeros(len(observations[0].values["detail"]), dtype=torch.bool)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm_multistep_sde"])
def test_one_of_a_batch_goes_on_by_itself(guarded: Any, plain: Any, name: str) -> None:
    """Tried together, all pass the second time, and one is taken back: only its own first attempt is walked on.

    The guidance that a callback has set meanwhile is that of its way, too, and the negative prompt is its own.
    """
    own: dict[str, Any] = {"callback_on_step_end": weaken(2), "negative_prompt": ["red", "a house", ""]}

    scores = iter([[9.0] * 3, [1.0] * 3, [0.0] * 3, [0.0], [8.0], [0.0], [2.0]])
    pipe = guarded(keeping((Say("a cat"), Say("blue")), ToldEach(scores), LATER), name)
    with CountLanes(pipe.unet) as count:
        output, _ = latents_of(pipe, **own)
    records, steps = output.records, len(pipe.scheduler.timesteps)
    assert [record.outcome for record in records] == ["rescued", "kept", "rescued"]
    assert tried(records[ROW]) == [("blue", False, False), ("a cat", False, True)]
    assert [attempt.score for attempt in records[ROW].attempts] == [8.0, 2.0]
    assert records[ROW].extra_lanes > records[0].extra_lanes == records[2].extra_lanes
    assert count.rows == 2 * steps * len(PROMPTS) + sum(record.extra_lanes for record in records)
    expected = host_of(plain(name), "a cat", **own)
    torch.testing.assert_close(output.images[ROW], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("better", [False, True])
def test_of_two_noises_the_one_that_was_given_up_is_an_attempt_as_others_are(
    guarded: Any, plain: Any, monkeypatch: pytest.MonkeyPatch, better: bool
) -> None:
    """The other is taken back at the last look, and is further from passing."""
    left = iter([0.7, *([0.7, 0.1] if better else [0.1, 0.7]), 0.1])
    monkeypatch.setattr(Escalation, "survival_of", lambda _self, _rescue: torch.tensor([next(left)]))
    scores = [0.0, 0.0, 0.0, 0.0, 9.0, 1.0]  # at once, at the first look; of other noise; at the last look
    guard = wary(keeping((Say("a cat"),), Told(scores), {**LATER, "look_again_at": (0.5, 0.98)}))
    pipe = guarded(guard)
    with CountLanes(pipe.unet) as count:
        output, _ = latents_of(pipe)
    record = output.records[ROW]
    names = ["a cat+new_seed", "a cat"]
    assert tried(record) == [(names[not better], False, False), (names[better], False, True)]
    assert [attempt.score for attempt in record.attempts] == [9.0, 1.0]
    assert count.rows == 2 * STEPS * len(PROMPTS) + record.extra_lanes
    if better:
        torch.testing.assert_close(output.images[ROW], host_of(plain(), "a cat"), rtol=1e-3, atol=1e-3)


def test_what_is_no_number_further_on_is_not_handed_out(guarded: Any) -> None:
    """The next best is."""
    detector = Told([1.0, 2.0, math.nan, 3.0], (0.0, 9.0))
    record = latents_of(guarded(keeping((Say("a cat"), Say("blue")), detector, LATER)))[0].records[ROW]
    assert (tried(record), record.extra_lanes) == ([("a cat", False, False), ("blue", False, True)], 16)


def test_a_rescue_is_kept_as_well(guarded: Any) -> None:
    """One that a later look takes back when there is no way to another, too: its image is in the loop."""
    record = latents_of(guarded(keeping((Forget(),), Told([0.0]), AT_ONCE)))[0].records[ROW]
    assert (record.outcome, tried(record)) == ("rescued", [("forget", True, True)])
    for worth in (2.0, math.nan):
        guard = keeping((Forget(),), Told([0.0, worth]), LATER)
        assert tried(latents_of(guarded(guard))[0].records[ROW]) == [("forget", False, True)]
    blank = latents_of(guarded(keeping((Forget(),), Told([0.0, 2.0]), LATER, on_failure="blank")))[0]
    assert (blank.records[ROW].outcome, tried(blank.records[ROW])) == ("blocked", [("forget", False, False)])
    assert not blank.images[ROW].any()


def test_what_is_interrupted_is_as_it_would_have_been(guarded: Any, plain: Any) -> None:
    """The place of the image holds the flagged one until a loop of its own is over, and the record says so."""

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 4
        return {}

    guard = keeping((Say("a cat", scale=1.5),), Told([1.0]), AT_ONCE)
    output, _ = latents_of(guarded(guard), callback_on_step_end=stop)
    assert tried(output.records[ROW]) == [("a cat", False, False)]
    assert torch.equal(output.images, latents_of(plain(), callback_on_step_end=stop)[0].images)
