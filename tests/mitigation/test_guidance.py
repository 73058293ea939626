"""Mitigations of the guidance: which scale they ask for when, and what that does to a memory in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from mitigation.mixtures import assert_forgets
from tiny import subject_of

from sd_guard.mitigation import DelayedGuidance, DynamicTransition, LowerGuidance, OppositeGuidance
from sd_guard.mitigation.guidance import FirstMinimum, Transition


def test_delayed_guidance_keeps_the_prompt() -> None:
    subject = subject_of()
    changes = list(DelayedGuidance(until=(0.1, 0.4)).propose(subject))
    assert [(change.strength, change.guidance_from, change.prompt) for change in changes] == [
        (0.1, 0.1, None),
        (0.4, 0.4, None),
    ]
    assert all(change.prompt_embeds is subject.prompt_embeds for change in changes)


# 20 steps in a loop of its own; a delay goes on in the host's: seven steps up to the deciding one.
@pytest.mark.parametrize(
    ("mitigation", "lanes"),
    [
        (LowerGuidance(scales=(1.0,)), 40),
        (DelayedGuidance(until=(0.2,)), 14),
        (DynamicTransition(), 40),
        (DynamicTransition(before=-2.0), 40),
        (OppositeGuidance(), 40),
    ],
)
def test_a_memory_is_left_alone(parts: dict[str, Any], mitigation: Any, lanes: int) -> None:
    assert_forgets(parts, mitigation, lanes)


def scales(mitigation: Any, guidance_scale: float | None, norms: Sequence[float]) -> list[list[float]]:
    """Of each change, at each step of a trajectory with these CFG norms."""
    count = len(norms)
    changes = mitigation.propose(subject_of(guidance_scale=guidance_scale))
    return [
        [change.guidance.scale(step / count, norms[: step + 1]) for step in range(count)]
        for change in changes
        if change.own_loop
    ]


def test_lower_guidance_is_lower_at_every_step() -> None:
    assert scales(LowerGuidance(scales=(9.0, 7.5, 3.0, 1.0)), 7.5, (1, 2)) == [[3.0, 3.0], [1.0, 1.0]]


def test_the_transition_is_one_step_behind_the_first_minimum() -> None:
    """What is a minimum is known by the step after it; later ones, and none, change nothing."""
    norms = (5, 4, 3, 3.5, 2, 6)
    assert scales(DynamicTransition(), 7.5, norms) == [[1, 1, 1, 7.5, 7.5, 7.5]]
    assert scales(DynamicTransition(before=-2.0), 7.5, (1, 2, 3, 2, 1)) == [[-2.0] * 5]
    assert FirstMinimum(0.0, 5.0).scale(0.9, (2, 2, 2)) == 0.0


def test_opposite_until_the_transition() -> None:
    assert scales(OppositeGuidance(until=(0.3, 0.5)), 7.5, range(10)) == [
        [-2.0] * 3 + [7.5] * 7,
        [-2.0] * 5 + [7.5] * 5,
    ]
    assert 3 / 10 < 0.1 + 0.2
    assert Transition(-1.0, 2.0, 0.1 + 0.2).scale(3 / 10, ()) == 2.0


@pytest.mark.parametrize("mitigation", [LowerGuidance(), DynamicTransition(), OppositeGuidance()])
def test_a_call_without_guidance_has_none_to_change(mitigation: Any) -> None:
    assert list(mitigation.propose(subject_of(guidance_scale=None))) == []
    assert len(list(mitigation.propose(subject_of()))) > 0


def test_opposite_guidance_leads_away() -> None:
    with pytest.raises(ValueError, match=r"before=0.5 is not below 0; use DynamicTransition"):
        OppositeGuidance(before=0.5)


@pytest.mark.parametrize("until", [(), (0.0,), (0.2, 1.1), (float("nan"),)])
@pytest.mark.parametrize("mitigation", [DelayedGuidance, OppositeGuidance])
def test_a_transition_that_is_no_share_of_the_steps_is_refused(
    mitigation: type[DelayedGuidance | OppositeGuidance], until: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match=r"until=\(.*\) must hold shares of the steps in \(0, 1\], at least one"):
        mitigation(until=until)


@pytest.mark.parametrize("scales", [(), (float("nan"),)])
def test_scales_that_no_sampler_takes_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"scales=\(.*\) must hold guidance scales, at least one"):
        LowerGuidance(scales=scales)
