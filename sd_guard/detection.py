"""From the observations of a trajectory to one score an image, and from a score to a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sd_guard.observation import Observation, Question
from sd_guard.transfers import send

Verdict = Literal["pass", "flag", "unscored"]
_ROUNDING = 1e-4  # of scores, which are sums in float32


class Detector(Protocol):
    """Scores a trajectory; higher is more memorized. A verdict depends on no other image of the batch.

    One with a number `highest_rise` says what later looks can add to a score at most, all of them together; images that
    this cannot lift over the threshold are not looked at again. Without it, every image is.
    """

    @property
    def threshold(self) -> float:
        """Scores above it are flagged."""
        ...

    def score(self, observations: Sequence[Observation], later: Sequence[Observation] = ()) -> Tensor:
        """(B,) scores from the observations of a trajectory's steps, in their order, and from later looks.

        A later look may raise a score and never lowers it: an image that was flagged is not waiting to be acquitted,
        and one threshold bounds the false positives of all looks together.
        """
        ...

    def in_doubt(self, observations: Sequence[Observation]) -> Tensor:
        """(B,) bool: where the next question about the last step is worth its lanes, after the answers so far."""
        ...


def verdict_of(score: float, threshold: float) -> Verdict:
    """`unscored` for a score that is not finite: what could not be measured is never a pass."""
    if not math.isfinite(score):
        return "unscored"
    return "flag" if score > threshold else "pass"


def is_settled(detector: Detector, score: float) -> bool:
    """Whether no later look can change what an image's score says: it passes, and cannot rise above the threshold.

    So is one that is not finite. A flagged image is not: it is looked at for its score, and for what becomes of it.

    Args:
        detector: that gave the score.
        score: of the observations, without later looks.
    """
    rise = float(getattr(detector, "highest_rise", math.inf))
    return not math.isfinite(score) or score + rise < detector.threshold - _ROUNDING


@dataclass(frozen=True, slots=True, kw_only=True)
class PrematureDetail:
    """The default: premature detail, in doubt what other noise says, and later whether the picture has stayed.

    All but the last are relative to the model's own unconditional prediction at the same latent, so that the threshold
    needs no calibration. The free part is the mean over steps of the log of the detail that the prompt adds, over that
    of the prediction without it and of finished pictures (`added_detail`). Above `doubt` it proves nothing yet: a
    sequential test asks whether another seed shows the same picture, ``agreement_weight * excess_agreement``, and where
    the score is then still `undecided`, a further seed, and for the width that the prompt takes from the posterior,
    ``lid_weight * ((LID_u - LID_c) / D - ordinary_deficit)``. No score that was asked for falls below `doubt`, where
    those lie that were not. Which images are asked depends on no threshold, so that scores stay exchangeable when a
    calibration moves it. Later looks at the same trajectory add `persistence_weight` times each positive
    `excess_persistence`, all together `persistence_limit` at most: faint and almost plain memories add little detail,
    but they are settled, and stay so. How settled ordinary pictures are differs between models, so that nothing is
    flagged for that alone: it lifts no image over the default threshold that was not in doubt before. The numbers were
    chosen on `tune` rows of seven reference checkpoints.

    Attributes:
        threshold: scores above it are flagged.
        doubt: the free part above which an image is in doubt.
        undecided: the score, lowest and highest, between which one answer does not decide.
        lid_weight: weight of the LID deficit, a share of the latent dimension.
        ordinary_deficit: the share that speaks for neither side.
        agreement_weight: weight of the agreement with other seeds.
        persistence_weight: weight of the excess persistence, where it is positive; at least 0.
        persistence_limit: what all later looks together may add; at least 0.

    Raises:
        ValueError: a threshold or doubt that is NaN, no range, or a weight by which a later look could lower a score.
    """

    threshold: float = -0.05
    doubt: float = -0.7
    undecided: tuple[float, float] = (-0.3, 0.6)
    lid_weight: float = 5.0
    ordinary_deficit: float = 0.005
    agreement_weight: float = 2.5
    persistence_weight: float = 4.0
    persistence_limit: float = 0.3

    def __post_init__(self) -> None:
        """Refuses a threshold that every score would pass."""
        if math.isnan(self.threshold):
            raise ValueError(f"threshold={self.threshold} is no number, and no score exceeds it: give one")
        if math.isnan(self.doubt):
            raise ValueError(f"doubt={self.doubt} is no number: give the score above which to ask; inf asks nothing")
        if not self.undecided[0] <= self.undecided[1]:
            raise ValueError(f"undecided={self.undecided} is no range: give lowest and highest; equal ones ask no more")
        if not self.persistence_weight >= 0:
            raise ValueError(f"persistence_weight={self.persistence_weight} is negative; 0 takes no later look")
        if not self.persistence_limit >= 0:
            raise ValueError(f"persistence_limit={self.persistence_limit} is negative; 0 takes no later look")

    @property
    def highest_rise(self) -> float:
        """`persistence_limit`, where later looks have a weight."""
        return self.persistence_limit if self.persistence_weight else 0.0

    def score(self, observations: Sequence[Observation], later: Sequence[Observation] = ()) -> Tensor:
        """(B,) scores."""
        score, last = self._added(observations), observations[-1]
        if last.probed:
            moved = score + self._probed(last)
            moved = moved.clamp(min=self.doubt).where(moved.isfinite(), moved)  # what is not finite stays unscored
            score = moved.where(_asked(last), score)
        if later:
            settled = torch.stack([look.values["excess_persistence"] for look in later]).clamp(min=0.0)
            score = score + (self.persistence_weight * settled.sum(0)).clamp(max=self.persistence_limit)
        return score

    def in_doubt(self, observations: Sequence[Observation]) -> Tensor:
        """(B,) whether the free part lies above `doubt`, or with an answer, whether the score is still `undecided`."""
        if not observations[-1].probed:
            added = self._added(observations)
            return (added > self.doubt) & added.isfinite()  # nothing can be said of what is not finite
        score, (lowest, highest) = self.score(observations), self.undecided
        return _asked(observations[-1]) & (score > lowest) & (score < highest)

    def _probed(self, seen: Observation) -> Tensor:
        """(B,) what the answers say beyond the free part: 0 for images that were not asked."""
        values, says = seen.values, torch.zeros_like(seen.values["added_detail"])
        if "trajectory_lid" in values:
            closed = (values["trajectory_lid_control"] - values["trajectory_lid"]) / seen.dimension
            deficit = self.lid_weight * (closed - self.ordinary_deficit)
            says = says + deficit.where(_rows(seen, "trajectory_lid"), 0.0)
        if "excess_agreement" in values:
            says = says + self.agreement_weight * values["excess_agreement"]
        return says

    def _added(self, observations: Sequence[Observation]) -> Tensor:
        return torch.stack([seen.values["added_detail"] for seen in observations]).mean(0)


def _rows(seen: Observation, *names: str) -> Tensor:
    """(B,) bool: the images that any of these was measured of."""
    rows = {row for name in names for row in seen.probed.get(name, ())}
    mask = [row in rows for row in range(len(seen.lanes))]
    return send(torch.tensor(mask), seen.values["added_detail"].device)


def _asked(seen: Observation) -> Tensor:
    return _rows(seen, *seen.probed)


DETECTORS: dict[str, type[Detector]] = {"premature_detail": PrematureDetail}


def decide(
    detector: Detector,
    observations: Sequence[Observation],
    questions: Sequence[Question],
    ask: Callable[[Observation, Sequence[int], Question], Observation],
) -> tuple[list[Observation], list[float]]:
    """Scores a trajectory, and asks one question after the other about those images that stay in doubt.

    One host synchronisation where none is in doubt, and one more a question where some are.

    Args:
        detector: decides.
        observations: free statistics of the trajectory's steps.
        questions: in their order; none decides by the free statistics.
        ask: the last observation, rows and a question to the observation with the answers.

    Returns:
        The observations, with the answers, and B scores.
    """
    seen = list(observations)
    for question in questions:
        scores, doubt = torch.stack([detector.score(seen), detector.in_doubt(seen).float()]).tolist()
        rows = [row for row, doubtful in enumerate(doubt) if doubtful]
        if not rows:
            return seen, scores
        seen[-1] = ask(seen[-1], rows, question)
    return seen, detector.score(seen).tolist()
