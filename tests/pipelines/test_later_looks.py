"""Later looks: at what was not flagged, and at what was rescued."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from pipelines.calls import GENERATORS, PROMPTS, STEPS, latents_of
from tiny import SCHEDULERS, CountLanes, Forget, Identity, seeded, watching

from sd_guard.detection import verdict_of
from sd_guard.guard import Guard
from sd_guard.observation import Observation
from sd_guard.pipelines.session import Session
from sd_guard.screening.calibrating import score_prompts

PLAN = (Forget(),)
AT = {"observe_at": (0.2,), "look_again_at": (0.5,)}  # steps 1 and 3 of 6


@dataclass(frozen=True)
class Late:
    """Flags one image of three, and no other, at a later look; resumed ones as often as it is told.

    Attributes:
        row: of the host's trajectory.
        at_once: its score at the deciding step.
        later: its score at each later look.
        resumed: scores of resumed trajectories: at the deciding step, and at each later look.
    """

    row: int = 1
    at_once: float = 0.0
    later: tuple[float, ...] = (1.0,)
    resumed: tuple[float, ...] = (0.0, 0.0)
    threshold: float = 0.5

    def score(self, observations: Any, later: Sequence[Observation] = ()) -> torch.Tensor:
        images = len(observations[0].values["detail"])
        if images < len(PROMPTS):
            return torch.full((images,), self.resumed[len(later)])
        scores = torch.zeros(images)
        scores[self.row] = (self.at_once, *self.later)[len(later)]
        return scores

    def in_doubt(self, observations: Any) -> torch.Tensor:
        return torch.zeros(len(observations[0].values["detail"]), dtype=torch.bool)


def looking(detector: Any, plan: Any = PLAN, **options: Any) -> Guard:
    return watching(plan=plan, detector=detector, **(AT | options))


@pytest.mark.parametrize("look", [0.5, 0.98])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_unchanged_trajectory_arrives_where_it_was(guarded: Any, plain: Any, name: str, look: float) -> None:
    """Flagged late, resumed to where the loop stands, and put back: as if nothing had happened."""
    pipe = guarded(looking(Late(), (Identity(),), look_again_at=(look,)).with_policy(budget=50), name)
    expected, state = latents_of(plain(name))
    output, own_state = latents_of(pipe)
    record = output.records[1]
    assert (record.verdict, record.outcome, record.score) == ("flag", "rescued", 1.0)
    assert torch.equal(state, own_state)
    assert torch.equal(output.images[[0, 2]], expected.images[[0, 2]])
    torch.testing.assert_close(output.images[1], expected.images[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["single", "none"])
def test_neighbours_of_a_late_rescue_share_a_generator(guarded: Any, plain: Any, mode: str) -> None:
    for name in ("ddim", "euler_ancestral", "heun"):
        expected, state = latents_of(plain(name), mode)
        output, own_state = latents_of(guarded(looking(Late()), name), mode)
        assert output.records[1].outcome == "rescued"
        assert torch.equal(state, own_state)
        assert torch.equal(output.images[[0, 2]], expected.images[[0, 2]])
        assert not torch.equal(output.images[1], expected.images[1])


def test_what_is_flagged_late_is_decided_late_and_pays_for_the_way(guarded: Any) -> None:
    pipe = guarded(looking(Late()))
    with CountLanes(pipe.unet) as count:
        output, _ = latents_of(pipe)
    assert [record.decided_at_step for record in output.records] == [3, 3, 3]  # no image has passed before
    assert [record.extra_lanes for record in output.records] == [0, 8, 0]
    assert count.rows == 2 * STEPS * len(PROMPTS) + 8
    names = {(value.step, value.name) for value in output.records[1].statistics}
    assert (3, "excess_persistence") in names


def test_what_was_flagged_and_not_changed_is_scored_to_the_end(guarded: Any) -> None:
    """Its verdict stands, and its score is that of all looks: what a calibration compares."""
    record = latents_of(guarded(looking(Late(at_once=0.75), plan=())))[0].records[1]
    assert (record.verdict, record.decided_at_step, record.score) == ("flag", 1, 1.0)


def test_an_attempt_that_fails_early_is_not_walked_on(guarded: Any) -> None:
    """The deciding step ends a poor attempt: four lanes and not eight."""
    record = latents_of(guarded(looking(Late(resumed=(1.0, 0.0)))))[0].records[1]
    assert (record.outcome, record.extra_lanes) == ("blocked", 4)
    assert [attempt.passed for attempt in record.attempts] == [False]


def test_an_attempt_that_fails_late_is_no_rescue(guarded: Any) -> None:
    record = latents_of(guarded(looking(Late(resumed=(0.0, 1.0)))))[0].records[1]
    assert (record.outcome, record.extra_lanes, record.attempts[0].score) == ("blocked", 8, 1.0)


@pytest.mark.parametrize(("again", "outcome", "attempts"), [(0.0, "rescued", 1), (1.0, "blocked", 2)])
def test_a_rescue_is_looked_at_again(guarded: Any, again: float, outcome: str, attempts: int) -> None:
    """Flagged and rescued at once; where the second look says otherwise, the plan goes on where it stood."""
    pipe = guarded(looking(Late(at_once=1.0, resumed=(0.0, again)), (Forget(), Identity())))
    record = latents_of(pipe)[0].records[1]
    assert (record.outcome, record.decided_at_step, len(record.attempts)) == (outcome, 1, attempts)
    assert [attempt.mitigation for attempt in record.attempts] == ["forget", "identity"][:attempts]
    assert all(attempt.passed is (outcome == "rescued") for attempt in record.attempts)
    assert "excess_persistence" not in {value.name for value in record.statistics}  # it is another picture's


def test_no_budget_for_the_whole_way(guarded: Any) -> None:
    """Seven lanes pay for no attempt from the first step to the second look."""
    guard = looking(Late()).with_policy(budget=7)
    record = latents_of(guarded(guard))[0].records[1]
    assert (record.outcome, record.extra_lanes, record.attempts) == ("blocked", 0, ())


@pytest.mark.parametrize(("budget", "lanes"), [(8, 8), (9, 8), (10, 10), (11, 10)])
def test_a_probe_leaves_lanes_for_the_rest_of_the_way(guarded: Any, budget: int, lanes: int) -> None:
    """Eight lanes to the second look and two for a probe at the deciding step: never more than the budget."""

    @dataclass(frozen=True)
    class Doubtful(Late):
        def in_doubt(self, observations: Any) -> torch.Tensor:
            images = len(observations[0].values["detail"])
            return torch.full((images,), images < len(PROMPTS))

    record = latents_of(guarded(looking(Doubtful()).with_policy(budget=budget)))[0].records[1]
    assert (record.outcome, record.extra_lanes) == ("rescued", lanes)


def test_a_second_look_that_is_not_finite_is_unscored(guarded: Any) -> None:
    @dataclass(frozen=True)
    class Broken(Late):
        def score(self, observations: Any, later: Any = ()) -> torch.Tensor:
            scores = Late.score(self, observations)
            return scores if not later else torch.where(torch.arange(len(scores)) == 1, math.nan, scores)

    records = latents_of(guarded(looking(Broken())))[0].records
    assert [record.outcome for record in records] == ["passed", "unscored", "passed"]


def test_without_a_second_look_nothing_is_flagged_late(guarded: Any) -> None:
    for look in ((), (0.2,)):  # none, or none that is later than the deciding step
        records = latents_of(guarded(looking(Late(), look_again_at=look)))[0].records
        assert [record.verdict for record in records] == ["pass"] * 3


def test_verdicts_do_not_depend_on_batchmates(guarded: Any) -> None:
    pipe = guarded(replace(Guard(), plan=(), observe_at=(0.2,)))
    together = latents_of(pipe)[0].records
    for row, prompt in enumerate(PROMPTS):
        alone = latents_of(pipe, prompt=[prompt], generator=[GENERATORS["list"]()[row]])[0].records[0]
        assert alone.score == pytest.approx(together[row].score, abs=1e-4)


THRICE = {"look_again_at": (0.5, 0.98)}  # steps 3 and 5


def test_what_only_the_last_step_shows(guarded: Any, plain: Any) -> None:
    """Its attempt passes both looks on its way, and ends as a call with the changed prompt would have."""
    pipe = guarded(looking(Late(later=(0.0, 1.0), resumed=(0.0, 0.0, 0.25)), **THRICE))
    output, _ = latents_of(pipe)
    record = output.records[1]
    assert (record.outcome, record.decided_at_step, record.extra_lanes) == ("rescued", 5, 2 * STEPS)
    assert record.attempts[0].score == 0.25
    assert [value.step for value in record.statistics if value.name == "excess_persistence"] == [3, 5]
    expected = latents_of(plain(), prompt=[PROMPTS[0], "", PROMPTS[2]])[0].images
    torch.testing.assert_close(output.images, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("resumed", "lanes"), [((1.0,), 4), ((0.0, 1.0), 8), ((0.0, 0.0, 1.0), 12)])
def test_an_attempt_ends_at_the_look_that_it_fails(guarded: Any, resumed: tuple[float, ...], lanes: int) -> None:
    record = latents_of(guarded(looking(Late(later=(0.0, 1.0), resumed=resumed), **THRICE)))[0].records[1]
    assert (record.outcome, record.extra_lanes, len(record.attempts)) == ("blocked", lanes, 1)


def test_a_rescue_may_be_taken_back_at_the_end(guarded: Any) -> None:
    """It passed at once and in the middle; there is nothing left to spend on another."""
    late = Late(at_once=0.75, later=(9.0, 9.0), resumed=(0.0, 0.0, 1.0))
    record = latents_of(guarded(looking(late, (Forget(), Identity()), **THRICE)))[0].records[1]
    assert (record.outcome, record.decided_at_step, record.score) == ("blocked", 1, 0.75)
    assert [(attempt.mitigation, attempt.score, attempt.passed) for attempt in record.attempts] == [
        ("forget", 1.0, False)
    ]
    assert record.extra_lanes == 4


def test_what_was_taken_back_once_is_not_judged_again(guarded: Any) -> None:
    """Its trajectory in the loop is that of an attempt that failed, and says nothing of the flagged one."""
    late = Late(at_once=0.75, later=(9.0, 9.0), resumed=(0.0, 1.0, 0.0))
    record = latents_of(guarded(looking(late, **THRICE)))[0].records[1]
    assert (record.outcome, record.score, [attempt.score for attempt in record.attempts]) == ("blocked", 0.75, [1.0])


def test_a_late_rescue_is_looked_at_with_what_its_way_has_shown(guarded: Any) -> None:
    """Flagged at the first later look, walked past it, and looked at once more in the host's loop."""
    late = Late(later=(1.0, 9.0), resumed=(0.0, 0.0, 0.25))
    record = latents_of(guarded(looking(late, **THRICE)))[0].records[1]
    assert (record.outcome, record.decided_at_step, record.score, record.extra_lanes) == ("rescued", 3, 1.0, 8)
    failed = replace(late, resumed=(0.0, 0.0, 1.0))
    assert latents_of(guarded(looking(failed, **THRICE)))[0].records[1].outcome == "blocked"


LOOKED = Guard(plan=(), observe_at=(0.2,), look_again_at=(0.5, 0.98), probes=0, other_seeds=0)


def looked_at(record: Any) -> bool:
    return "excess_persistence" in {value.name for value in record.statistics}


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_looks_are_left_out_where_they_could_change_no_verdict(guarded: Any, quantile: float) -> None:
    """Verdicts are those of a guard that always looks, image by image, wherever the threshold lies."""
    pipe = guarded(LOOKED)
    arguments = {"prompt": [*PROMPTS, "a red cat", "noise", "the moon"], "generator": seeded(*range(6))}
    scored = score_prompts(pipe, arguments["prompt"], range(6), num_inference_steps=STEPS)
    assert all(looked_at(record) for record in scored)
    at_once = [value.value for record in scored for value in record.statistics if value.name == "added_detail"]
    rise = 0.1
    threshold = float(torch.tensor(at_once).quantile(quantile)) + rise / 2
    detector = replace(LOOKED.detector, threshold=threshold, persistence_limit=rise, persistence_weight=50.0)
    pipe.enable_guard(replace(LOOKED, detector=detector))
    full = score_prompts(pipe, arguments["prompt"], range(6), num_inference_steps=STEPS)
    records = latents_of(pipe, **arguments)[0].records
    assert [record.verdict for record in records] == [verdict_of(record.score, threshold) for record in full]
    for record, own, other in zip(records, at_once, full, strict=True):
        assert looked_at(record) is (own + rise >= threshold - 1e-4)
        assert record.score == pytest.approx(other.score if looked_at(record) else own, abs=1e-5)


def test_a_settled_image_is_not_judged_by_looks_at_its_batchmates(guarded: Any) -> None:
    pipe = guarded(LOOKED)
    scores = [record.score for record in latents_of(pipe)[0].records]
    threshold = sorted(scores)[1] - 0.01  # flags two of three
    detector = replace(LOOKED.detector, threshold=threshold, persistence_limit=1e-3)
    pipe.enable_guard(replace(LOOKED, detector=detector))
    together = latents_of(pipe)[0].records
    assert sorted(map(looked_at, together)) == [False, True, True]
    for row, prompt in enumerate(PROMPTS):
        alone = latents_of(pipe, prompt=[prompt], generator=[GENERATORS["list"]()[row]])[0].records[0]
        assert [(v.step, v.name) for v in alone.statistics] == [(v.step, v.name) for v in together[row].statistics]
        assert alone.score == pytest.approx(together[row].score, abs=1e-4)


@pytest.mark.parametrize("look_at_all", [False, True])
@pytest.mark.parametrize("broken_at", [2, STEPS - 1])
def test_what_ends_as_no_number_has_not_passed(guarded: Any, broken_at: int, look_at_all: bool) -> None:
    """Half precision may overflow after the decision: whoever was settled then, and no batchmate."""
    pipe = guarded(replace(LOOKED, look_at_all=look_at_all, detector=replace(LOOKED.detector, threshold=9.0)))

    def overflow(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == broken_at - 1:
            tensors["latents"][1, 0, 0, 0] = math.inf
        return tensors

    records = latents_of(pipe, callback_on_step_end=overflow)[0].records
    assert [record.outcome for record in records] == ["passed", "unscored", "passed"]
    assert (records[1].reason, records[1].decided_at_step) == ("the UNet's output was not finite", None)
    assert math.isnan(records[1].score)


def test_where_all_are_settled_nothing_is_looked_at_or_kept(guarded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_again(*_: Any) -> Any:
        raise AssertionError("no verdict can change")

    sessions: list[Session] = []
    begin = Session.begin
    monkeypatch.setattr("sd_guard.pipelines.session.look_again", look_again)
    monkeypatch.setattr(Session, "begin", lambda self, *args: (sessions.append(self), begin(self, *args))[1])
    kept: list[int] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        kept.append(len(sessions[0].snapshots))
        return tensors

    pipe = guarded(replace(LOOKED, detector=replace(LOOKED.detector, threshold=9.0)))
    records = latents_of(pipe, callback_on_step_end=callback)[0].records
    assert [record.verdict for record in records] == ["pass"] * 3
    assert kept[1:] == [0] * (STEPS - 1)
    assert kept[0] > 0  # step 1 decides
