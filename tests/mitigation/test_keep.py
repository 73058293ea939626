"""An image that nothing rescued and that is kept all the same: the picture that is remembered is not in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from mitigation.mixtures import KNOWN, OTHER, PICTURE, DetailThere, call, mixture_pipeline
from tiny import Forget, Identity

from sd_guard.mitigation import Change, Subject
from sd_guard.statistics.sharpness import resemblance


@dataclass(frozen=True)
class Shout:
    """Still a prompt, so still the memory."""

    def propose(self, subject: Subject) -> Iterator[Change]:
        yield Change("shout", 1.0, 1.5 * subject.prompt_embeds)


@pytest.mark.parametrize("plan", [(Identity(), Forget(), Shout()), (Forget(), Identity()), (Shout(), Forget())])
def test_the_attempt_without_the_memory_is_kept(parts: dict[str, Any], plan: Any) -> None:
    """A bar that nothing passes, at which the scores say little: of ordinary detail all have more than that."""
    pipe = mixture_pipeline(parts, *plan)
    policy = replace(pipe.guard.policy, on_failure="keep", margin=0.0)
    pipe.enable_guard(replace(pipe.guard, detector=DetailThere(threshold=-1.0), policy=policy))
    output = call(pipe, *KNOWN, OTHER)
    for record in output.records[: len(KNOWN)]:
        assert (record.verdict, record.outcome, len(record.attempts)) == ("flag", "kept", len(plan))
        assert [(a.mitigation, a.kept) for a in record.attempts][-1] == ("forget", True)
        assert sum(attempt.kept for attempt in record.attempts) == 1
    shown = PICTURE[None].expand_as(output.images)
    assert (resemblance(output.images, shown)[: len(KNOWN)].abs() < 0.3).all()


def test_where_all_attempts_are_the_memory_so_is_the_image(parts: dict[str, Any]) -> None:
    """And nothing is called rescued."""
    pipe = mixture_pipeline(parts, Identity(), Shout())
    pipe.enable_guard(pipe.guard.with_policy(on_failure="keep"))
    output = call(pipe, *KNOWN)
    assert [record.outcome for record in output.records] == ["kept"] * 2
    assert (resemblance(output.images, PICTURE[None].expand_as(output.images)) > 0.9).all()
    assert torch.isfinite(output.images).all()
