"""What happens to a flagged image: detect, mitigate, verify, accept or block. A pure state machine, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from sd_guard.detection import Verdict

_SETTLING = 0.15  # of a predicted picture's likeness to the flagged one, what it tends to lose on its whole way

OnFailure = Literal["blank", "keep", "raise"]
Outcome = Literal["passed", "rescued", "blocked", "unscored", "kept"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One mitigation and its verification.

    Attributes:
        mitigation: its name; with `+new_seed` where the same change was sampled once more from other noise.
        strength: in the mitigation's own unit.
        resumed_from_step: the step that sampling was resumed from.
        score: of the resumed trajectory, by the statistic that flagged the image, at the last look it got.
        resemblance: in [-1, 1], of its predicted image and the one that was flagged, by their edges: 1 is the picture
            itself, 0 no more than the prediction without a prompt had of it, or with other noise, none; likewise.
        passed: whether that was no longer suspicious at any look, and no other attempt was preferred.
        prompt: the rewritten prompt; None where the words were kept.
        kept: whether the image that is handed out is this attempt's; it may have been the best of those that failed.
    """

    mitigation: str
    strength: float
    resumed_from_step: int
    score: float
    resemblance: float
    passed: bool
    prompt: str | None
    kept: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Bounds of the escalation, and its end.

    Attributes:
        budget: extra lane evaluations that one image may cost, detection included; None allows as many as the image
            itself costs. Detection is always paid: where it alone costs as much, a flagged image gets no attempt.
        max_attempts: resumed trajectories an image.
        margin: how far a resumed trajectory's bar is moved, at least 0: so much below the threshold where its picture
            resembles the flagged one as much as is allowed, as much above it where nothing of that picture is left.
        max_resemblance: in (0, 1], up to which a mitigated image counts as another picture than the flagged one: by its
            edges (`what_is_left`) at each look, by edges and colours (`survival`) when sampling is over.
        on_failure: an image that no attempt rescued is made `blank`, kept (`keep`: that of the attempt which came
            nearest to passing, as `excess` orders them, and that the budget pays for; as it would have been without
            the guard where there is none), or raised as an error when the call is over (`raise`).
    """

    budget: int | None = None
    max_attempts: int = 4
    margin: float = 0.2
    max_resemblance: float = 0.6
    on_failure: OnFailure = "blank"

    def __post_init__(self) -> None:
        """Refuses settings that no run could use."""
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"budget={self.budget} is negative; give the extra lane evaluations an image may cost")
        if self.max_attempts < 0:
            raise ValueError(f"max_attempts={self.max_attempts} is negative; 0 flags without mitigating")
        if not self.margin >= 0:
            raise ValueError(f"margin={self.margin} is negative; 0 asks no more of a mitigated image than of any other")
        if not 0 < self.max_resemblance <= 1:
            raise ValueError(f"max_resemblance={self.max_resemblance} is not above 0 and up to 1; 1 asks nothing")
        if self.on_failure not in ("blank", "keep", "raise"):
            raise ValueError(f"on_failure={self.on_failure!r} is not one of 'blank', 'keep', 'raise'")

    def accepts(self, score: float, threshold: float, resemblance: float) -> bool:
        """Whether a resumed trajectory passes: both kinds of evidence together, and neither where it is not finite.

        A score says that *some* picture is known too early, resemblance that it is *that* one. A picture with nothing
        of the flagged one in it has to clear the threshold by less than one that might still be a faint copy.
        """
        refused, above = self.excess(score, threshold, resemblance)
        return not refused and above <= 0

    def excess(self, score: float, threshold: float, resemblance: float) -> tuple[bool, float]:
        """How far a resumed trajectory is from passing, to be ordered by.

        Returns:
            Whether no score helps it, and how far it is off: where it has more of the flagged picture than is allowed,
            by how much it has; else by how far its score is above its bar.
        """
        share = max(resemblance, 0.0) / self.max_resemblance
        if not math.isfinite(score) or math.isnan(share):
            return True, math.inf
        return (True, share) if share > 1 else (False, score - (threshold + self.margin * (1 - 2 * share)))

    def may_relapse(self, survival: float, share: float) -> bool:
        """Whether a rescued image, `share` of whose steps are made, is likely to end in the flagged picture after all.

        Early predictions have more in common than the pictures they become.

        Args:
            survival: in [-1, 1], of the flagged picture in the one that is predicted now
                (`sd_guard.statistics.sharpness.survival`); where it is NaN, it is likely.
            share: in [0, 1].
        """
        return not survival <= self.max_resemblance + _SETTLING * (1 - share)


@dataclass(slots=True)
class Case:
    """One image's way through the policy.

    Attributes:
        verdict: of the trajectory before any mitigation, so far.
        score: likewise, of its last look.
        decided_at: the step that said so.
        budget: extra lanes allowed.
        lanes: extra lanes spent so far.
        attempts: in the order in which they were given up; one that passed, or is to be kept though none did, is last.
        closed: no further attempt is to be made.
        relapsed: the attempt that passed ended in the flagged picture all the same.
    """

    verdict: Verdict
    score: float
    decided_at: int
    budget: int
    lanes: int = 0
    attempts: list[Attempt] = field(default_factory=list)
    closed: bool = False
    relapsed: bool = False

    @property
    def rescued(self) -> bool:
        """Whether the last attempt passed, to the end."""
        return bool(self.attempts) and self.attempts[-1].passed and not self.relapsed

    @property
    def open(self) -> bool:
        """Whether the image is flagged, and something may still be tried."""
        return self.verdict == "flag" and not self.closed

    def may_attempt(self, policy: Policy, cost: int) -> bool:
        """Whether another attempt of `cost` lanes is allowed."""
        return self.open and self.affords(policy, cost)

    def affords(self, policy: Policy, cost: int) -> bool:
        """Whether the image's bounds leave room for another attempt of `cost` lanes."""
        return self.lanes + cost <= self.budget and len(self.attempts) < policy.max_attempts

    def look_again(self, verdict: Verdict, score: float, step: int) -> None:
        """Takes the score of a later look at the same trajectory, and its verdict where the image had passed."""
        if self.verdict == "pass":
            self.verdict, self.score, self.decided_at = verdict, score, step
        elif self.verdict == "flag" and not self.rescued and math.isfinite(score):
            self.score = score

    def finish(self, *, finite: bool) -> None:
        """Takes whether the finished latents are numbers: what is none has passed nothing."""
        if self.verdict == "pass" and not finite:
            self.verdict = "unscored"

    def reopen(self, score: float, resemblance: float) -> None:
        """Takes back that the last attempt passed: a later look says otherwise."""
        self.attempts[-1] = replace(self.attempts[-1], score=score, resemblance=resemblance, passed=False)
        self.closed = False

    def close(self, attempt: Attempt | None = None) -> None:
        """Ends the case where `attempt` passed, or where there is nothing left to try (None)."""
        if attempt is not None:
            self.attempts.append(attempt)
        self.closed = attempt is None or attempt.passed

    def prefer(self, kept: Attempt, given_up: Attempt) -> None:
        """Ends the case where the last attempt was another try at what had passed before: one of both is kept."""
        self.attempts[-2:] = [replace(given_up, passed=False), kept]
        self.closed = True

    def keep(self, attempt: Attempt, score: float, resemblance: float) -> None:
        """Of the attempts, none of which passed, this one's image is to be kept; a look since may have seen it."""
        place = [replace(other, kept=attempt.kept) for other in self.attempts].index(attempt)
        self.attempts.append(replace(self.attempts.pop(place), score=score, resemblance=resemblance))

    def place(self) -> None:
        """The image of the last attempt is in the place of the flagged one."""
        *others, last = self.attempts
        self.attempts[:] = [*(replace(other, kept=False) for other in others), replace(last, kept=True)]

    def told(self, policy: Policy) -> tuple[Attempt, ...]:
        """Its attempts for the record: that whose image is handed out is the last; where none is, none is kept."""
        blank = self.outcome(policy) == "blocked"
        return tuple(sorted((replace(a, kept=a.kept and not blank) for a in self.attempts), key=lambda a: a.kept))

    def outcome(self, policy: Policy) -> Outcome:
        """Where the image ended."""
        if self.verdict == "unscored" or not math.isfinite(self.score):
            return "unscored"
        if self.verdict == "pass":
            return "passed"
        if self.rescued:
            return "rescued"
        return "kept" if policy.on_failure == "keep" else "blocked"
