"""Guidance away from the memorized prompt: the search for another one, and the trajectory that follows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mitigation.worlds import WIDTH, Remembering
from tiny import CountLanes, build, byte_tokenizer, seeded, watching
from torch import Tensor

from sd_guard.guard import Guard
from sd_guard.mitigation import Deletion, PromptReanchoring, Subject
from sd_guard.mitigation.rewriters import Lexicon
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.settings import guard_from_json, guard_to_json

WEIGHTS = {"a": 0.1, "b": 0.6, "c": 0.3, "d": 0.0}


def encode(prompts: Sequence[str]) -> Tensor:
    """Of the closed form: a place a word, which holds one where the word is there."""
    kept = [[1, *(word in prompt.split() for word in WEIGHTS)] for prompt in prompts]
    return torch.tensor(kept).float()[..., None].expand(-1, -1, WIDTH)


def subject_of(world: Remembering, **fields: Any) -> Subject:
    return world.subject("a b c d", **({"encode": encode, "tokenizer": byte_tokenizer()} | fields))


def remembering(budget: float = 10_000.0) -> Remembering:
    return Remembering(weights=tuple(WEIGHTS.values()), budget=budget)


def test_the_prompt_that_is_remembered_least_goes_first() -> None:
    """Of prompts without one word, then without two: the CFG norm falls with the weight of what is gone."""
    world = remembering()
    subject = subject_of(world)
    changes = list(PromptReanchoring(rewriter=Deletion()).propose(subject))
    prompts = [change.prompt for change in changes]
    assert len(set(prompts)) == len(prompts) == 4 + 6
    left = [float(world.memory(change.prompt_embeds[None])) for change in changes]
    assert left == sorted(left)
    assert changes[0].prompt == "a d"
    assert all(torch.equal(change.anchor_embeds, subject.prompt_embeds) for change in changes)
    assert all(change.own_loop for change in changes)
    assert [change.strength for change in changes] == sorted(change.strength for change in changes)
    assert 0 < changes[0].strength < 0.3
    assert 10_000 - world.budget == 2 + len(changes)


def test_what_meets_the_target_first_is_taken() -> None:
    """As the paper's search, which ends there; what is remembered least comes after it."""
    world = remembering()
    subject = subject_of(world)
    texts = torch.stack([subject.empty_embeds, encode(["a c d"])[0]])
    without, left = world.denoise(texts, subject.latents.expand(2, -1, -1, -1)).e_hat
    just_above = 1.01 * float((left - without).norm())
    changes = list(PromptReanchoring(rewriter=Deletion(), target=just_above).propose(subject))
    assert [change.prompt for change in changes][:2] == ["a c d", "a d"]
    assert len({change.prompt for change in changes}) == len(changes)


@pytest.mark.parametrize("fields", [{"prompt": None}, {"prompt": " "}, {"tokenizer": None}, {"guidance_scale": None}])
def test_nothing_to_lead_away_from(fields: dict[str, Any]) -> None:
    world = remembering()
    assert list(PromptReanchoring(rewriter=Deletion()).propose(replace(subject_of(world), **fields))) == []
    assert world.budget == 10_000


@given(st.integers(0, 12), st.integers(1, 12))
def test_lanes_bound_the_search(budget: int, candidates: int) -> None:
    world = remembering(budget)
    changes = list(PromptReanchoring(rewriter=Deletion(), candidates=candidates).propose(subject_of(world)))
    assert world.budget >= 0
    assert len(changes) <= candidates
    assert budget - world.budget == (2 + len(changes) if changes else 0)
    assert bool(changes) == (budget >= 3)


@dataclass
class Parrot:
    asked: int = 0
    name: str = "parrot"

    def rewrite(self, words: Sequence[str], chosen: Collection[int], lexicon: Lexicon) -> str | None:
        self.asked += 1
        return " ".join(words)


def test_a_rewriter_with_nothing_to_say_is_not_asked_for_ever() -> None:
    parrot, world = Parrot(), remembering()
    prompt = " ".join(f"w{i}" for i in range(200))
    assert list(PromptReanchoring(rewriter=parrot).propose(replace(subject_of(world), prompt=prompt))) == []
    assert parrot.asked == 50
    assert world.budget == 10_000


def test_settings() -> None:
    guard = Guard(plan=(PromptReanchoring(rewriter=Deletion(), candidates=5, target=3.0),))
    assert guard_from_json(guard_to_json(guard)) == guard
    with pytest.raises(ValueError, match="candidates=0 leaves nothing to look at"):
        PromptReanchoring(candidates=0)


@dataclass(frozen=True)
class FlagsTwo:
    """Flags the first of two images; what is resumed passes."""

    threshold: float = 0.5

    def score(self, observations: Any, later: Any = ()) -> Tensor:
        return torch.tensor([1.0, 0.0])[2 - len(observations[0].values["detail"]) :]

    def in_doubt(self, observations: Any) -> Tensor:
        return torch.zeros(len(observations[0].values["detail"]), dtype=torch.bool)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm_multistep"])
def test_it_samples_as_with_the_memorized_prompt_for_a_negative_one(parts: dict[str, Any], scheduler: str) -> None:
    """``e_p + g (e_new - e_p)``; a control is evaluated apart at the two looks, the neighbour keeps its bits."""
    prompts, arguments = ["a dog", "blue"], {"num_inference_steps": 6, "output_type": "latent"}
    pipe: Any = build(GuardedStableDiffusionPipeline, parts, scheduler)
    pipe.disable_guard()
    plain = pipe(prompts, **arguments, generator=seeded(1, 2)).images
    plan = (PromptReanchoring(rewriter=Deletion()),)
    pipe.enable_guard(watching(plan=plan, detector=FlagsTwo(), look_again_at=()), budget=100)
    with CountLanes(pipe.unet) as count:
        output = pipe(prompts, **arguments, generator=seeded(1, 2))
    record = output.records[0]
    (attempt,) = record.attempts
    assert (record.outcome, attempt.mitigation) == ("rescued", "prompt_reanchoring")
    assert attempt.prompt in ("a", "dog")
    assert record.extra_lanes == (2 + 2) + 2 * 6 + 2, "the search, the way, the controls"
    assert count.rows == 2 * 6 * 2 + record.extra_lanes
    assert torch.equal(output.images[1], plain[1])
    pipe.disable_guard()
    expected = pipe([attempt.prompt], negative_prompt=["a dog"], **arguments, generator=seeded(1)).images
    torch.testing.assert_close(output.images[:1], expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(output.images[0], plain[0], atol=0.1)
