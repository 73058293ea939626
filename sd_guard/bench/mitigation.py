"""The suite `mitigation`: what one attempt of each mitigation costs, with every image flagged and every attempt taken.

How well they mitigate is another question: `benchmarks/mitigations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from sd_guard.bench.base import NOBODY, Bench, Case, compile_anew
from sd_guard.guard import Guard
from sd_guard.mitigation import MITIGATIONS, Mitigation
from sd_guard.policy import Policy

_BUDGET: Final = 10_000  # lanes: what an attempt costs is what is asked, not whether it may


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeAnything(Policy):
    """Takes the first attempt."""

    def accepts(self, score: float, threshold: float, resemblance: float) -> bool:
        """Always."""
        return True


def mitigation(bench: Bench) -> Iterator[Sequence[Case]]:
    """Flagged and not mitigated, then each mitigation by itself; `attempts` is 0 where one had nothing to propose."""
    if bench.settings.compile:
        bench.pipe.unet = compile_anew(bench.pipe.unet)
    plans: dict[str, tuple[Mitigation, ...]] = {"none": ()}
    plans |= {name: (kind(),) for name, kind in MITIGATIONS.items()}
    yield [Case(name=name, pipe=bench.pipe, run=partial(_mitigate, bench, plan)) for name, plan in plans.items()]


def _mitigate(bench: Bench, plan: Sequence[Mitigation]) -> Mapping[str, Any]:
    policy = TakeAnything(budget=_BUDGET, max_attempts=1, on_failure="keep")
    detector = replace(NOBODY, threshold=-math.inf)
    bench.pipe.enable_guard(replace(Guard(), plan=plan, policy=policy, detector=detector))
    records = bench.pipe(**bench.call()).records
    return {
        "flagged": sum(record.verdict == "flag" for record in records),
        "attempts": sum(len(record.attempts) for record in records),
        "extra_lanes": sum(record.extra_lanes for record in records) / len(records),
    }
