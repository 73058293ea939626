"""What a user configures, and what comes back for each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from sd_guard.detection import Detector, PrematureDetail, Verdict
from sd_guard.mitigation import EmbeddingNoise, Mitigation, SummaryReplacement, WordAblation
from sd_guard.noise import EarlySteps
from sd_guard.observation import Question
from sd_guard.policy import Attempt, Outcome, Policy


@dataclass(frozen=True, slots=True)
class StatisticValue:
    """One measured number.

    Attributes:
        step: index into the scheduler's timesteps.
        name: a key of `sd_guard.observation.STATISTICS`.
        point: where it was taken: `noisy` is the latent of the trajectory.
        lane: of which prediction: `conditional`, `control` (without a prompt) or both.
        value: in the statistic's own unit.
    """

    step: int
    name: str
    point: str
    lane: str
    value: float


@dataclass(frozen=True, slots=True)
class GuardRecord:
    """All that is known of one image.

    Attributes:
        verdict: before any mitigation.
        outcome: where the image ended.
        score: of the deciding statistic before any mitigation, at the last look that this trajectory got; higher = more
            memorized; NaN if unscored.
        decided_at_step: that gave the verdict, an index into the scheduler's timesteps; None if unscored.
        dimension: entries of its latent.
        statistics: of the trajectory before any mitigation.
        attempts: mitigations tried, in the order in which they were given up; one that passed, or is kept although it
            did not, is the last.
        extra_lanes: lane evaluations that the guard spent on this image, beyond those of plain sampling.
        seed: initial seed of the image's generator; None without one.
        fingerprint: of model, scheduler, steps, guidance and dtype.
        reason: why it could not be scored; else None.
    """

    verdict: Verdict
    outcome: Outcome
    score: float
    decided_at_step: int | None
    dimension: int
    statistics: tuple[StatisticValue, ...]
    attempts: tuple[Attempt, ...]
    extra_lanes: int
    seed: int | None
    fingerprint: str
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Where to look, how to decide, what to do.

    Attributes:
        observe_at: shares of the schedule in [0, 1) whose steps give the free statistics; the last one decides. The
            first does not lie before the first step that shows anything (`sd_guard.noise.first_clear_step`): where it
            would, all shares are of a schedule that begins so much later. A share between two steps means the nearer
            one, but of an early and a later one (`sd_guard.noise.early_steps`) the early one.
        look_again_at: shares of the schedule, in [0, 1), whose steps look again at what may yet be flagged, and at what
            was flagged or rescued, as far as they are later than the deciding one; none decide once and for all. An
            image that no look could lift over the threshold gets none (`sd_guard.detection.is_settled`). A rescued
            image of other words that is likely to end in the flagged picture is sampled once more then, from other
            noise, if the budget allows it, and the better of both is kept.
        look_at_all: look again at every image, also where that can change no verdict: for records that a `Calibrator`
            is given.
        probes: Rademacher vectors that an image still in doubt gets at the deciding step, two lanes each.
        other_seeds: seeds that one in doubt is held against there, two lanes each: one, and if it stays in doubt, all.
        detector: scores a trajectory.
        plan: mitigations, in the order of escalation.
        policy: bounds of the escalation, and its end.
        seed: of probe vectors and mitigations, mixed with the image's own.
    """

    observe_at: tuple[float, ...] = (0.02, 0.04, 0.06)
    look_again_at: tuple[float, ...] = (0.2, 0.3, 0.5, 0.98)
    look_at_all: bool = False
    probes: int = 1
    other_seeds: int = 2
    detector: Detector = field(default_factory=PrematureDetail)
    plan: Sequence[Mitigation] = (
        WordAblation(widen=False),
        SummaryReplacement(),
        WordAblation(),
        EmbeddingNoise(strengths=(3.0,)),
    )
    policy: Policy = field(default_factory=Policy)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses settings that no run could use."""
        if not self.observe_at or not _are_shares(self.observe_at):
            raise ValueError(f"observe_at={self.observe_at} must hold shares of the schedule in [0, 1), at least one")
        if not _are_shares(self.look_again_at):
            raise ValueError(
                f"look_again_at={self.look_again_at} must hold shares of the schedule in [0, 1); () decides once and "
                "for all"
            )
        if self.probes < 0:
            raise ValueError(f"probes={self.probes} is negative; 0 measures no LID")
        if self.other_seeds < 0:
            raise ValueError(f"other_seeds={self.other_seeds} is negative; 0 compares with none")

    @property
    def lanes_in_doubt(self) -> int:
        """Lane evaluations that an image costs which stays in doubt; 0 decides by the free statistics alone."""
        return sum(question.lanes for question in self.questions)

    @property
    def questions(self) -> tuple[Question, ...]:
        """What images in doubt are asked, one after the other: another seed, which decides most; then all the rest."""
        first = min(self.other_seeds, 1)
        asked = (Question(0, range(first)), Question(self.probes, range(first, self.other_seeds)))
        return tuple(question for question in asked if question.lanes)

    def with_policy(self, **changes: Any) -> Guard:
        """The same guard with other policy settings."""
        return replace(self, policy=replace(self.policy, **changes))

    def steps(self, count: int, early: EarlySteps | None = None) -> list[int]:
        """Steps to observe, ascending, of a schedule of `count` timesteps.

        Args:
            count: of timesteps.
            early: of `sd_guard.noise.early_steps`; None for a schedule that is early throughout.
        """
        early = early if early is not None else EarlySteps(0, count)
        begin = self._begin(count, early)
        places: set[int] = set()
        for share in self.observe_at:
            nearest = begin + step_at(share, count - begin)
            past = begin + share * (count - begin) - (early.stop - 1)  # the last early step
            places.add(max(early.start, early.stop - 1 if nearest >= early.stop and past < early.order else nearest))
        return sorted(places)

    def later_steps(self, count: int, early: EarlySteps | None = None) -> list[int]:
        """Steps that look again, ascending, all after the deciding one; arguments as of `steps`."""
        early = early if early is not None else EarlySteps(0, count)
        begin, deciding = self._begin(count, early), self.steps(count, early)[-1]
        places = {begin + step_at(share, count - begin) for share in self.look_again_at}
        return sorted(step for step in places if step > deciding)

    def last_step(self, count: int, early: EarlySteps | None = None) -> int:
        """The last step that anything is looked at; arguments as of `steps`."""
        return [*self.steps(count, early), *self.later_steps(count, early)][-1]

    def _begin(self, count: int, early: EarlySteps) -> int:
        """Where the schedule begins that shares are of."""
        return max(0, early.start - step_at(min(self.observe_at), count))


def _are_shares(values: Any) -> bool:
    return isinstance(values, tuple | list) and all(
        isinstance(share, Real) and 0 <= float(share) < 1 for share in values
    )


def step_at(share: float, count: int) -> int:
    """Index of the step that `share` of a schedule of `count` steps has been walked before."""
    return min(int(share * count + 0.5), count - 1)
