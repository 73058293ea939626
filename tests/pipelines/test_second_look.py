"""The second look: at what was not flagged, and at what was rescued."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from pipelines.calls import GENERATORS, PROMPTS, STEPS, latents_of
from tiny import SCHEDULERS, CountLanes, Forget, Identity, watching

from sd_guard.guard import Guard
from sd_guard.observation import Observation

PLAN = (Forget(),)
AT = {"observe_at": (0.2,), "look_again_at": 0.5}  # steps 1 and 3 of 6


@dataclass(frozen=True)
class Late:
    """Flags one image of three, and no other, at the second look; resumed ones as often as it is told.

    Attributes:
        row: of the host's trajectory.
        at_once: its score at the deciding step.
        resumed: scores of resumed trajectories: at the deciding step, and at the second look.
    """

    row: int = 1
    at_once: float = 0.0
    resumed: tuple[float, float] = (0.0, 0.0)
    threshold: float = 0.5

    def score(self, observations: Any, later: Observation | None = None) -> torch.Tensor:
        images = len(observations[0].values["detail"])
        if images < len(PROMPTS):
            return torch.full((images,), self.resumed[later is not None])
        scores = torch.zeros(images)
        scores[self.row] = self.at_once if later is None else 1.0
        return scores

    def in_doubt(self, observations: Any) -> torch.Tensor:
        return torch.zeros(len(observations[0].values["detail"]), dtype=torch.bool)


def looking(detector: Any, plan: Any = PLAN, **options: Any) -> Guard:
    return watching(plan=plan, detector=detector, **(AT | options))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_unchanged_trajectory_arrives_where_it_was(guarded: Any, plain: Any, name: str) -> None:
    """Flagged late, resumed to where the loop stands, and put back: as if nothing had happened."""
    pipe = guarded(looking(Late(), (Identity(),)), name)
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
    assert (3, "persistence") in names


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
    assert "persistence" not in {value.name for value in record.statistics}  # it is another picture's


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
        def score(self, observations: Any, later: Any = None) -> torch.Tensor:
            scores = Late.score(self, observations)
            return scores if later is None else torch.where(torch.arange(len(scores)) == 1, math.nan, scores)

    records = latents_of(guarded(looking(Broken())))[0].records
    assert [record.outcome for record in records] == ["passed", "unscored", "passed"]


def test_without_a_second_look_nothing_is_flagged_late(guarded: Any) -> None:
    for look in (None, 0.2):  # none, or none that is later than the deciding step
        records = latents_of(guarded(looking(Late(), look_again_at=look)))[0].records
        assert [record.verdict for record in records] == ["pass"] * 3


def test_verdicts_do_not_depend_on_batchmates(guarded: Any) -> None:
    pipe = guarded(replace(Guard(), plan=(), observe_at=(0.2,)))
    together = latents_of(pipe)[0].records
    for row, prompt in enumerate(PROMPTS):
        alone = latents_of(pipe, prompt=[prompt], generator=[GENERATORS["list"]()[row]])[0].records[0]
        assert alone.score == pytest.approx(together[row].score, abs=1e-4)
