"""A mitigation that keeps the beginning of the trajectory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from mitigation.mixtures import KNOWN, call, mixture_pipeline
from tiny import subject_of

from sd_guard.guard import Guard
from sd_guard.mitigation import (
    Later,
    LowerGuidance,
    NewSeed,
    NoiseOptimisation,
    OppositeGuidance,
    PromptReanchoring,
    Renoise,
)
from sd_guard.settings import guard_from_json, guard_to_json


def test_the_others_changes_from_another_step_on() -> None:
    subject, other = subject_of(steps=50), LowerGuidance()
    changes = list(Later(mitigation=other, at=0.06).propose(subject))
    assert [change.resume_from for change in changes] == [3, 3]
    expected = list(other.propose(subject))
    assert [(c.mitigation, c.strength, c.guidance) for c in changes] == [
        (c.mitigation, c.strength, c.guidance) for c in expected
    ]


def test_latents_of_their_own_start_where_they_belong() -> None:
    subject = subject_of(level=lambda _step: type("Level", (), {"s": 1.0}), renoise=lambda clean, noise, _step: noise)
    assert [change.resume_from for change in Later(mitigation=NewSeed(), at=0.06).propose(subject)] == [0, 0]


def test_opposite_guidance_from_the_deciding_step_on_leaves_the_memory(parts: dict[str, Any]) -> None:
    """Three steps are made again up to the deciding one, and the other 13 where that passes."""
    pipe = mixture_pipeline(parts, Later(mitigation=OppositeGuidance(before=-9.0, until=(0.5,)), at=0.2))
    for record in call(pipe, *KNOWN).records:
        (attempt,) = record.attempts
        assert (attempt.mitigation, attempt.resumed_from_step) == ("opposite_guidance", 4)
        assert attempt.score < record.score - 0.1
        assert record.extra_lanes in (2 * 3, 2 * 16)


@dataclass(frozen=True)
class Picky:
    asked: list[Any] = field(default_factory=list)

    def check(self, pipe: Any) -> None:
        self.asked.append(pipe)


def test_the_other_is_asked_whether_it_can_run() -> None:
    pipe, picky = object(), Picky()
    Later(mitigation=picky).check(pipe)  # type: ignore[arg-type]
    assert picky.asked == [pipe]


@pytest.mark.parametrize("other", [LowerGuidance(scales=(2.0,)), NoiseOptimisation(steps=(3,)), PromptReanchoring()])
def test_it_is_saved_with_the_other_inside(other: Any) -> None:
    guard = Guard(plan=(Later(mitigation=other, at=0.3), Later(mitigation=Later(mitigation=other))))
    text = guard_to_json(guard)
    assert guard_from_json(text) == guard
    assert json.loads(text)["plan"][0]["name"] == "later"


@pytest.mark.parametrize("at", [-0.1, 1.0, float("nan")])
def test_a_share_of_the_steps(at: float) -> None:
    with pytest.raises(ValueError, match=r"is no share of the steps in \[0, 1\); 0 restarts"):
        Later(at=at)


def test_nothing_of_the_subject_is_kept() -> None:
    """The same object serves another image."""
    later = Later(mitigation=LowerGuidance(scales=(1.0,)), at=0.5)
    first, second = (subject_of(prompt_embeds=torch.full((3, 4), value)) for value in (1.0, 2.0))
    assert [next(later.propose(s)).prompt_embeds.mean().item() for s in (first, second)] == [1.0, 2.0]


@pytest.mark.parametrize("late", [Later(mitigation=LowerGuidance(scales=(1.0,)), at=0.5), Renoise(to=(0.1, 0.5))])
def test_what_no_snapshot_is_kept_for_is_refused_when_it_is_configured(parts: dict[str, Any], late: Any) -> None:
    """It would be resumed from an earlier step than it says."""
    pipe = mixture_pipeline(parts)
    before = pipe.guard
    said = rf"{type(late).__name__} resumes at 0\.5 of the steps, .* the last at observe_at=0\.3: observe later"
    with pytest.raises(ValueError, match=said):
        pipe.enable_guard(replace(before, plan=(late,)))
    assert pipe.guard == before
    pipe.enable_guard(replace(before, plan=(late,), observe_at=(0.1, 0.2, 0.5)))
    record = call(pipe, KNOWN[0]).records[0]
    assert {attempt.resumed_from_step for attempt in record.attempts} <= {2, 10}
