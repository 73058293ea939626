"""What a resumed trajectory has to show before its image is handed out, and what asking it may cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import EVERYBODY, CountLanes, Forget, Identity, seeded, watching

from sd_guard.detection import PrematureDetail
from sd_guard.mitigation import Change, Subject
from sd_guard.observation import predicted_image
from sd_guard.pipelines.session import Session
from sd_guard.policy import Attempt

STEPS = 6
PROMPTS = ["a dog on the moon", "x", "blue"]


def call(pipe: Any) -> Any:
    return pipe(PROMPTS, generator=seeded(1, 2, 3), num_inference_steps=STEPS, output_type="latent")


@dataclass(frozen=True)
class Fixed:
    """One score for the host's trajectory of three images, another for resumed ones."""

    threshold: float
    before: float = 9.0
    after: float = 0.0

    def score(self, observations: Any, later: Any = ()) -> torch.Tensor:
        count = len(observations[0].values["added_detail"])
        if count == len(PROMPTS):
            return torch.tensor([self.before, -99.0, -99.0])
        return torch.full((count,), self.after)

    def in_doubt(self, observations: Any) -> torch.Tensor:
        return torch.zeros(len(self.score(observations)), dtype=torch.bool)


def test_a_picture_that_is_still_there_is_not_a_pass(guarded: Any) -> None:
    """A score that passes is not enough: an unchanged trajectory resembles itself fully."""
    score = call(guarded(watching())).records[0].score
    guard = watching(score - 1e-3, (Identity(),))
    generous = call(guarded(replace(guard, detector=Fixed(score - 1e-3, after=-9.0)))).records[0]
    assert (generous.outcome, generous.attempts[0].passed) == ("rescued", True)
    assert generous.attempts[0].resemblance == pytest.approx(1.0, abs=1e-4)
    strict = replace(guard, detector=Fixed(score - 1e-3, after=-9.0)).with_policy(max_resemblance=0.9)
    record = call(guarded(strict)).records[0]
    assert (record.outcome, record.attempts[0].passed) == ("blocked", False)


def test_a_relapse_at_the_end_is_blocked(guarded: Any) -> None:
    """Whatever the deciding step said, an image that ends in the flagged picture is not handed out."""
    pipe = guarded(watching(-math.inf))
    session_of: list[Any] = []
    begin = Session.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "begin", lambda self, *a: (session_of.append(self), begin(self, *a))[1])
        call(pipe)
    (session,) = session_of
    memory = predicted_image(session.observations)
    session.guard = session.guard.with_policy(max_resemblance=0.5)
    attempt = Attempt("forget", 1.0, 0, -9.0, 0.0, True, "")
    session.cases[1].attempts[:] = [attempt]
    session.replaced[1] = SimpleNamespace(row=1)
    session._verify(torch.randn_like(memory))
    assert [record.outcome for record in session.records(pipe, 3)][1] == "rescued"
    session._verify(0.3 * memory + 5.0)  # a faint copy on another ground
    assert [record.outcome for record in session.records(pipe, 3)][1] == "blocked"


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_a_margin_asks_more_of_a_picture_that_resembles_the_flagged_one(guarded: Any, margin: float) -> None:
    guard = replace(watching(0.0, (Identity(),)), detector=Fixed(0.0, before=1.0, after=-0.25))
    record = call(guarded(guard.with_policy(margin=margin))).records[0]
    assert record.outcome == ("rescued" if margin == 0.0 else "blocked")


@dataclass(frozen=True)
class Scramble:
    """Samples with a loud text of its own: another picture."""

    def propose(self, subject: Subject) -> Iterator[Change]:
        noise = torch.randn(subject.prompt_embeds.shape, generator=torch.Generator().manual_seed(1))
        yield Change("scramble", 1.0, 9.0 * noise)


def test_a_margin_asks_less_of_another_picture(guarded: Any) -> None:
    """The same score passes it, and does not pass the flagged picture itself; the bar is the policy's."""
    outcomes = []
    for change in (Scramble(), Identity()):
        guard = replace(watching(0.0, (change,)), detector=Fixed(0.0, before=1.0, after=-1.0))
        guard = guard.with_policy(margin=4.0)
        record = call(guarded(guard)).records[0]
        (attempt,) = record.attempts
        assert attempt.passed == guard.policy.accepts(attempt.score, 0.0, attempt.resemblance)
        outcomes.append((attempt.resemblance < 0.62, attempt.passed, record.outcome))
    assert outcomes == [(True, True, "rescued"), (False, False, "blocked")]


@pytest.mark.parametrize(("budget", "lanes"), [(10, 10), (11, 10), (12, 12), (13, 12)])
def test_a_resumed_trajectory_is_probed_where_the_budget_still_affords_it(
    guarded: Any, budget: int, lanes: int
) -> None:
    """Two lanes of detection, eight of the attempt, two of its probe; where it cannot, the free statistics decide."""
    pipe = guarded(watching(-math.inf, (Identity(),), doubt=EVERYBODY), budget=budget)
    with CountLanes(pipe.unet) as count:
        output = call(pipe)
    assert [(record.extra_lanes, len(record.attempts)) for record in output.records] == [(lanes, 1)] * 3
    assert count.rows == 3 * (2 * STEPS + lanes)
    for record in output.records:
        assert record.attempts[0].score == record.score


@dataclass(frozen=True)
class Search:
    """Asks a question before it changes nothing, about one prompt only."""

    prompt: str

    def propose(self, subject: Subject) -> Iterator[Change]:
        if subject.prompt == self.prompt:
            subject.predict(subject.prompt_embeds[None])
        yield Change("search", 0.0, subject.prompt_embeds)


def test_an_image_that_spent_more_is_not_probed_beside_those_that_are(guarded: Any) -> None:
    """Budgets are each image's own; a probe is paid by those who got it, and is the one they would get alone."""
    detector = PrematureDetail(threshold=-math.inf, doubt=-math.inf)
    guard = watching(plan=(Search(PROMPTS[1]),), detector=detector)
    pipe = guarded(guard, budget=12)
    with CountLanes(pipe.unet) as count:
        output = call(pipe)
    assert [record.extra_lanes for record in output.records] == [12, 11, 12]
    assert count.rows == 3 * 2 * STEPS + 12 + 11 + 12
    pipe.enable_guard(replace(guard, probes=0))
    free = [record.score for record in call(pipe).records]
    for row, record in enumerate(output.records):
        expected = free[row] if row == 1 else record.score
        assert record.attempts[0].score == pytest.approx(expected, abs=1e-3)
        assert abs(record.score - free[row]) > 0.01


@contextmanager
def broken_calls(unet: torch.nn.Module, numbers: range, value: float) -> Iterator[None]:
    """Makes the UNet return `value` in these calls, counted from 0."""
    number = itertools.count()

    def spoil(_module: Any, _inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (torch.full_like(output[0], value),) if next(number) in numbers else output

    hook = unet.register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_resumed_trajectory_whose_probe_is_not_finite_is_not_handed_out(guarded: Any, value: float) -> None:
    """Without a prompt the free statistics are ordinary and in doubt: the LID decides, and has to be a number."""
    pipe = guarded(watching())
    threshold = min(record.score for record in call(pipe).records) - 0.1
    detector = PrematureDetail(threshold=threshold, doubt=-9.0, lid_weight=1e-4)
    guard = watching(plan=(Forget(),), detector=detector, probes=3).with_policy(budget=50)
    pipe.enable_guard(guard)
    healthy = call(pipe)
    assert [(record.outcome, record.extra_lanes) for record in healthy.records] == [("rescued", 6 + 8 + 6)] * 3
    walked = guard.steps(STEPS)[-1] + 1  # calls up to the decision, and again of the resumed trajectory
    with broken_calls(pipe.unet, range(2 * walked + 3, 2 * walked + 6), value):
        output = call(pipe)
    for record in output.records:
        (attempt,) = record.attempts
        assert math.isnan(attempt.score)
        assert (attempt.passed, record.outcome, record.extra_lanes) == (False, "blocked", 20)
    assert not output.images.any()
