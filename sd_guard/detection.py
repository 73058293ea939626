"""From the observations of a trajectory to one score an image, and from a score to a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sd_guard.observation import Observation

Verdict = Literal["pass", "flag", "unscored"]


class Detector(Protocol):
    """Scores a trajectory; higher is more memorized. A verdict depends on no other image of the batch."""

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
        """(B,) bool: where probes at the last step are worth their lanes. Says so by the free statistics alone."""
        ...


def verdict_of(score: float, threshold: float) -> Verdict:
    """`unscored` for a score that is not finite: what could not be measured is never a pass."""
    if not math.isfinite(score):
        return "unscored"
    return "flag" if score > threshold else "pass"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrematureDetail:
    """The default: premature detail, in doubt what other noise says, and later whether the picture has stayed.

    All but the last are relative to the model's own unconditional prediction at the same latent, so that the threshold
    needs no calibration. The free part is the mean over steps of the log of the detail that the prompt adds, over that
    of the prediction without it and of finished pictures (`added_detail`). Where it is in doubt, two more are measured:
    ``agreement_weight * excess_agreement``, whether another seed shows the same picture, and
    ``lid_weight * ((LID_u - LID_c) / D - ordinary_deficit)``, the width that the prompt takes from the posterior. No
    score in doubt falls below the range, where those lie that were not measured. Which images are in doubt depends on
    neither the threshold nor what is measured, so that scores stay exchangeable when a calibration moves the threshold.
    Later looks at the same trajectory add `persistence_weight` times each positive `excess_persistence`, all together
    `persistence_limit` at most: faint and almost plain memories add little detail, but they are settled, and stay so.
    How settled ordinary pictures are differs between models, so that nothing is flagged for that alone: it lifts no
    image over the default threshold that was not in doubt before. The numbers were chosen on `tune` rows of six
    reference checkpoints.

    Attributes:
        threshold: scores above it are flagged.
        doubt: the free part, lowest and highest, between which an image is in doubt.
        lid_weight: weight of the LID deficit, a share of the latent dimension.
        ordinary_deficit: the share that speaks for neither side.
        agreement_weight: weight of the agreement with other seeds.
        persistence_weight: weight of the excess persistence, where it is positive; at least 0.
        persistence_limit: what all later looks together may add; at least 0.

    Raises:
        ValueError: a threshold that is NaN, or a weight by which a later look could lower a score.
    """

    threshold: float = -0.15
    doubt: tuple[float, float] = (-0.6, 0.3)
    lid_weight: float = 5.0
    ordinary_deficit: float = 0.005
    agreement_weight: float = 1.5
    persistence_weight: float = 4.0
    persistence_limit: float = 0.3

    def __post_init__(self) -> None:
        """Refuses a threshold that every score would pass."""
        if math.isnan(self.threshold):
            raise ValueError(f"threshold={self.threshold} is no number, and no score exceeds it: give one")
        if not self.persistence_weight >= 0:
            raise ValueError(f"persistence_weight={self.persistence_weight} is negative; 0 takes no later look")
        if not self.persistence_limit >= 0:
            raise ValueError(f"persistence_limit={self.persistence_limit} is negative; 0 takes no later look")

    def score(self, observations: Sequence[Observation], later: Sequence[Observation] = ()) -> Tensor:
        """(B,) scores."""
        score, last = self._added(observations), observations[-1]
        if last.probed:
            rows = torch.tensor(last.probed, device=score.device)
            moved = score + self._probed(last)
            moved = moved.clamp(min=self.doubt[0]).where(moved.isfinite(), moved)  # what is not finite stays unscored
            score = score.index_copy(0, rows, moved[rows])
        if later:
            settled = torch.stack([look.values["excess_persistence"] for look in later]).clamp(min=0.0)
            score = score + (self.persistence_weight * settled.sum(0)).clamp(max=self.persistence_limit)
        return score

    def in_doubt(self, observations: Sequence[Observation]) -> Tensor:
        """(B,) whether the free part lies within `doubt`."""
        added = self._added(observations)
        return (added > self.doubt[0]) & (added < self.doubt[1])

    def _probed(self, seen: Observation) -> Tensor:
        """(B,) what was measured in doubt says beyond the free part; means nothing for images that were not."""
        values, says = seen.values, torch.zeros_like(seen.values["added_detail"])
        if "trajectory_lid" in values:
            closed = (values["trajectory_lid_control"] - values["trajectory_lid"]) / seen.dimension
            says = says + self.lid_weight * (closed - self.ordinary_deficit)
        if "excess_agreement" in values:
            says = says + self.agreement_weight * values["excess_agreement"]
        return says

    def _added(self, observations: Sequence[Observation]) -> Tensor:
        return torch.stack([seen.values["added_detail"] for seen in observations]).mean(0)


DETECTORS: dict[str, type[Detector]] = {"premature_detail": PrematureDetail}


def decide(
    detector: Detector, observations: Sequence[Observation], probe: Callable[[Sequence[int]], Observation] | None
) -> tuple[list[Observation], list[float]]:
    """Scores a trajectory, and asks for probes where the free statistics leave doubt: one host synchronisation without.

    Args:
        detector: decides.
        observations: free statistics of the trajectory's steps.
        probe: rows to the last observation with their LID; None allows no probes.

    Returns:
        The observations, probed where needed, and B scores.
    """
    scores, doubt = torch.stack([detector.score(observations), detector.in_doubt(observations).float()]).tolist()
    rows = [row for row, doubtful in enumerate(doubt) if doubtful]
    if probe is None or not rows:
        return list(observations), scores
    probed = [*observations[:-1], probe(rows)]
    return probed, detector.score(probed).tolist()
