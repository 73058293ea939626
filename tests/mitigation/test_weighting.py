"""Words of less weight: as much less is remembered, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from mitigation.worlds import WIDTH, Remembering
from torch import Tensor

from sd_guard.guard import Guard
from sd_guard.mitigation import Subject, WordAblation, WordWeighting
from sd_guard.settings import guard_from_json, guard_to_json

PROMPT = "a red house by zyx"


def encode(prompts: Sequence[str]) -> Tensor:
    """All that is remembered hangs on one word."""
    text = torch.zeros(len(prompts), 2, WIDTH)
    text[:, 1, 0] = torch.tensor([float("zyx" in prompt.split()) for prompt in prompts])
    return text


def subject_in(world: Remembering, prompt: str | None = PROMPT, **fields: Any) -> Subject:
    subject = world.subject(prompt)

    def predict(embeds: Tensor) -> Tensor:
        return world.denoise(embeds.float(), subject.latents.expand(len(embeds), -1, -1, -1)).x0_hat

    own = {"prompt_embeds": encode([prompt or ""])[0], "empty_embeds": encode([""])[0]}
    return world.subject(prompt, **(own | {"encode": encode, "predict": predict} | fields))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_weight_leaves_less_of_the_memory_and_more_dimensions(dtype: torch.dtype) -> None:
    world = Remembering(weights=(1.0,))
    subject = subject_in(world, prompt_embeds=encode([PROMPT])[0].to(dtype))
    changes = list(WordWeighting(weights=(0.75, 0.25)).propose(subject))
    assert [(change.mitigation, change.strength, change.prompt) for change in changes] == [
        ("word_weighting", 0.25, None),
        ("word_weighting", 0.75, None),
    ]
    assert all(change.prompt_embeds.dtype == dtype for change in changes)
    left = [float(world.memory(change.prompt_embeds[None].float())) for change in changes]
    assert left == [0.75, 0.25]
    assert world.trajectory_lid(1.0) < world.trajectory_lid(left[0]) < world.trajectory_lid(left[1])


def test_it_costs_what_the_search_does() -> None:
    world, other = Remembering(weights=(1.0,)), Remembering(weights=(1.0,))
    list(WordWeighting().propose(subject_in(world)))
    next(WordAblation().propose(subject_in(other)))
    assert world.budget == other.budget < 10_000


@pytest.mark.parametrize(("prompt", "budget"), [(None, 10_000), ("", 10_000), ("zyx", 10_000), (PROMPT, 1)])
def test_without_a_removal_there_is_nothing_to_weigh(prompt: str | None, budget: int) -> None:
    world = Remembering(weights=(1.0,), budget=budget)
    assert list(WordWeighting().propose(subject_in(world, prompt))) == []
    assert world.budget == budget


@pytest.mark.parametrize("weights", [(), (0.0,), (1.0,), (0.5, 1.5), (float("nan"),)])
def test_weights_that_change_nothing_or_more_than_a_removal_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must hold numbers between 0 and 1, at least one"):
        WordWeighting(weights=weights)


def test_it_is_saved_with_its_search() -> None:
    guard = Guard(plan=(WordWeighting(weights=(0.3,), search=WordAblation(max_words=2)),))
    assert guard_from_json(guard_to_json(guard)) == guard
