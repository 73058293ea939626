"""Flagged images: bounded attempts, and every lane they cost on the bill."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import EVERYBODY, NOBODY, CountLanes, Forget, Identity, seeded, watching

from sd_guard.mitigation import Change, EmbeddingNoise, Subject, WordAblation

STEPS = 6
PROMPTS = ["a dog on the moon", "x", "blue"]
SEARCH = (WordAblation(), EmbeddingNoise(strengths=(0.5, 1.0)), Forget())
CALLS: dict[str, dict[str, Any]] = {
    "guided": {},
    "unguided": {"guidance_scale": 1.0},
    "negative": {"negative_prompt": ["a cat", "", ""]},
}


@dataclass(frozen=True)
class Rewrite:
    """One prompt, always the same."""

    def propose(self, subject: Subject) -> Iterator[Change]:
        yield Change("rewrite", 1.0, subject.encode(["another"])[0], "another")


def call(pipe: Any, **arguments: Any) -> Any:
    arguments = {"prompt": PROMPTS, "generator": seeded(1, 2, 3)} | arguments
    return pipe(**arguments, num_inference_steps=STEPS, output_type="latent")


@pytest.mark.parametrize("doubt", [NOBODY, EVERYBODY])
@pytest.mark.parametrize("call_name", CALLS)
@pytest.mark.parametrize("budget", [0, 3, 8, 10, 12, 13, 14, 21, 40, None])
def test_the_bill(guarded: Any, call_name: str, budget: int | None, doubt: tuple[float, float]) -> None:
    """UNet rows in all = those of plain sampling + every record's extra lanes; attempts and probes stop at the budget.

    Detection is paid whatever the budget is.
    """
    pipe = guarded(watching(-math.inf, SEARCH, doubt=doubt), budget=budget)
    with CountLanes(pipe.unet) as count:
        output = call(pipe, **CALLS[call_name])
    lanes = 1 if call_name == "unguided" else 2
    assert count.rows == lanes * STEPS * len(PROMPTS) + sum(record.extra_lanes for record in output.records)
    controls = 0 if call_name == "guided" else 2
    detection = controls + (0 if doubt is NOBODY else 2)
    allowed = lanes * STEPS if budget is None else budget
    attempt = 4 * lanes + controls
    for record in output.records:
        assert record.extra_lanes <= max(allowed, detection)
        assert record.extra_lanes >= detection + attempt * len(record.attempts)
        assert bool(record.attempts) == (allowed >= detection + attempt)
        assert record.outcome == "blocked"


@pytest.mark.parametrize(("doubt", "lanes"), [(NOBODY, 0), (EVERYBODY, 2)])
def test_no_budget(guarded: Any, doubt: tuple[float, float], lanes: int) -> None:
    output = call(guarded(watching(-math.inf, SEARCH, doubt=doubt), budget=0))
    assert [(r.verdict, r.outcome, r.attempts, r.extra_lanes) for r in output.records] == [
        ("flag", "blocked", (), lanes)
    ] * 3


@pytest.mark.parametrize("attempts", [0, 1, 2])
def test_attempts_are_bounded(guarded: Any, attempts: int) -> None:
    guard = watching(-math.inf, (Identity(), Identity(), Identity())).with_policy(max_attempts=attempts, budget=10_000)
    output = call(guarded(guard))
    assert [len(record.attempts) for record in output.records] == [attempts] * 3


@dataclass(frozen=True)
class Endless:
    """Never runs out."""

    def propose(self, subject: Subject) -> Iterator[Change]:
        while True:
            yield Change("endless", 0.0, subject.prompt_embeds)


@pytest.mark.parametrize(("doubt", "attempts", "lanes"), [(NOBODY, 50 // 8, 48), (EVERYBODY, 5, 2 + 4 * 10 + 8)])
def test_an_endless_mitigation_ends(guarded: Any, doubt: tuple[float, float], attempts: int, lanes: int) -> None:
    """Eight lanes an attempt, and two more for its probe: all of the 50 that can be spent, and none beyond."""
    guard = watching(-math.inf, (Endless(),), doubt=doubt).with_policy(max_attempts=1000, budget=50)
    output = call(guarded(guard))
    assert [(len(record.attempts), record.extra_lanes) for record in output.records] == [(attempts, lanes)] * 3


def test_a_prompt_that_was_tried_is_not_tried_again(guarded: Any) -> None:
    """A second search with nothing new ends; what comes after it is tried."""
    plan = (Rewrite(), Rewrite(), EmbeddingNoise(strengths=(0.5,)))
    output = call(guarded(watching(-math.inf, plan), budget=100))
    assert [[attempt.mitigation for attempt in record.attempts] for record in output.records] == [
        ["rewrite", "embedding_noise"]
    ] * 3


def test_escalates_until_it_passes(guarded: Any) -> None:
    """The first change that passes is taken, and what comes after it is not tried."""
    pipe = guarded(watching())
    scores = [record.score for record in call(pipe).records]
    pipe.enable_guard(watching(min(scores) - 0.1, (Identity(), Forget(), Identity()), probes=0), budget=1000)
    output = call(pipe)
    for record in output.records:
        assert [(a.mitigation, a.passed) for a in record.attempts] == [("identity", False), ("forget", True)]
        assert record.attempts[-1].prompt == ""
        assert record.attempts[-1].score < min(scores) - 0.1 < record.score
        assert record.outcome == "rescued"


@dataclass(frozen=True)
class ForgetOne:
    """Forgets one prompt only."""

    prompt: str

    def propose(self, subject: Subject) -> Iterator[Change]:
        keep = subject.prompt != self.prompt
        yield Change("one", 0.0, subject.prompt_embeds if keep else subject.empty_embeds)


def test_images_pass_in_different_rounds(guarded: Any) -> None:
    """Sub-batches shrink as images pass, and every image gets the trajectory that is its own."""
    pipe = guarded(watching())
    scores = [record.score for record in call(pipe).records]
    alone = {}
    for row, prompt in enumerate(PROMPTS):
        pipe.enable_guard(
            watching(min(scores) - 0.1, (ForgetOne(PROMPTS[2]), ForgetOne(PROMPTS[0]), Forget())), budget=1000
        )
        alone[row] = call(pipe, prompt=[prompt], generator=seeded(row + 1)).images[0]
    output = call(pipe)
    assert [len(record.attempts) for record in output.records] == [2, 3, 1]
    assert [record.outcome for record in output.records] == ["rescued"] * 3
    for row in range(3):
        torch.testing.assert_close(output.images[row], alone[row], rtol=1e-3, atol=1e-3)


@dataclass(frozen=True)
class Ask:
    """Keeps what it was given."""

    subjects: list[Subject]

    def propose(self, subject: Subject) -> Iterator[Change]:
        self.subjects.append(subject)
        yield from ()


@pytest.mark.parametrize("call_name", CALLS)
def test_subject(guarded: Any, call_name: str) -> None:
    """A mitigation sees its own image, and pays for what it asks."""
    subjects: list[Subject] = []
    pipe = guarded(watching(-math.inf, (Ask(subjects),)), budget=40)
    call(pipe, **CALLS[call_name])
    assert [subject.prompt for subject in subjects] == PROMPTS
    for row, subject in enumerate(subjects):
        torch.testing.assert_close(subject.prompt_embeds, pipe.encode_prompt([PROMPTS[row]], "cpu", 1, False)[0][0])
        torch.testing.assert_close(subject.empty_embeds, pipe.encode_prompt([""], "cpu", 1, False)[0][0])
        before = subject.lanes_left()
        with CountLanes(pipe.unet) as count:
            pictures = subject.predict(subject.encode(["", PROMPTS[row]]))
        assert (count.rows, before - subject.lanes_left()) == (2, 2)
        whole = torch.stack([subject.empty_embeds, subject.prompt_embeds])
        torch.testing.assert_close(subject.predict(whole), pictures, rtol=1e-3, atol=1e-3)
        assert before - subject.lanes_left() == 4
        assert (pictures[0] - pictures[1]).abs().max() > 1e-3


def test_embeddings_have_no_text_to_rewrite(guarded: Any) -> None:
    pipe = guarded(watching(-math.inf, (WordAblation(), Forget())))
    embeds = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    output = call(pipe, prompt=None, prompt_embeds=embeds)
    assert [[a.mitigation for a in record.attempts] for record in output.records] == [["forget"]] * 3
