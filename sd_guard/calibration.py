"""Thresholds at a stated false-positive rate, from benign prompts, for one configuration.

Split conformal (Vovk et al. 2005; Angelopoulos and Bates 2021, arXiv 2107.07511, section 1). With n benign scores and
k = ceil((n + 1)(1 - alpha)), the k-th smallest is the threshold. Where a new benign score is exchangeable with the n,

    P(new score > threshold) <= (n + 1 - k) / (n + 1) <= alpha,

the first with equality where no two scores tie. What that does and does not say:

- It is marginal: over the draw of the benign prompts and of the new one together. The rate of *one* calibration
  scatters around it, as Beta(n + 1 - k, k) where scores are continuous (ibid., section 3.2); more prompts narrow it.
- Exchangeable means: prompts of the kind that will be screened, in the same configuration. Another model, scheduler or
  guidance is refused by the fingerprint; other prompts are for `sd_guard.drift` to notice.
- It holds for the threshold of each step by itself, not for all of them at once; a guard decides by the last.
- Images of one prompt are not exchangeable with those of another. Of s images each, prompts are what is counted:
  k = ceil((n + s)(1 - alpha)) of the n scores keeps the guarantee for a random image of a new prompt (hierarchical
  conformal prediction, Lee, Barber and Willett 2023, arXiv 2306.06342, with groups of equal size).

Labelled memorized prompts choose the weight of the LID in the score. They choose it on every other benign prompt, and
the remaining ones set the threshold: what chose the score has no part in the threshold, so the guarantee is the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from sd_guard.detection import Detector, is_settled
from sd_guard.fingerprint import Fingerprint
from sd_guard.guard import Guard, GuardRecord
from sd_guard.observation import PROBED, Observation

LID_WEIGHTS = (0.0, 4.0, 8.0, 15.0, 30.0, 60.0)  # tried beside the detector's own, where memorized prompts are given

Trajectory: TypeAlias = "list[Observation]"  # of one image, in the order of its steps; empty for an unscored one


@dataclass(frozen=True, slots=True)
class Calibration:
    """Thresholds of one configuration.

    Attributes:
        fingerprint: of the configuration that they hold for.
        false_positive_rate: alpha, in (0, 1).
        images: benign images they come from.
        observe_at: as of the guard that scored them.
        look_again_at: likewise.
        probes: likewise.
        thresholds: step to threshold of the score of the observations up to that step.
        detector: settings of the detector that scored them, all but its threshold.
        benign_scores: as a guard with this threshold records them, ascending, one a prompt.
        shared_seeds: of these images, where prompts share them (`shared_seeds`); empty where each has its own. Noise
            moves all scores alike: a threshold from images that share theirs holds for images that have that noise.
    """

    fingerprint: Fingerprint
    false_positive_rate: float
    images: int
    observe_at: tuple[float, ...]
    look_again_at: tuple[float, ...]
    probes: int
    other_seeds: int
    thresholds: Mapping[int, float]
    detector: Mapping[str, Any]
    benign_scores: tuple[float, ...]
    shared_seeds: tuple[int, ...] = ()

    def apply(self, guard: Guard) -> Guard:
        """The guard with this threshold, looking where the benign images were looked at and scoring as they were.

        Raises:
            ValueError: the guard's detector is of another kind.
        """
        if scoring_of(guard.detector).keys() != self.detector.keys():
            raise ValueError(
                f"the calibration was made for another detector than {type(guard.detector).__name__} (its settings: "
                f"{', '.join(self.detector) or 'none'}): calibrate again"
            )
        threshold = self.thresholds[max(self.thresholds)]
        detector = replace(guard.detector, threshold=threshold, **self.detector)  # type: ignore[type-var]
        looks = {"observe_at": self.observe_at, "look_again_at": self.look_again_at}
        return replace(guard, **looks, probes=self.probes, other_seeds=self.other_seeds, detector=detector)

    def check(self, fingerprint: Fingerprint) -> None:
        """Raises ValueError where a call's configuration is not the calibrated one."""
        if differences := self.fingerprint.difference(fingerprint):
            raise ValueError(
                f"the calibration was made for another configuration ({'; '.join(differences)}): calibrate again, or "
                "enable the guard without a calibration"
            )

    def save(self, path: str | Path) -> None:
        """Writes JSON; whatever interrupts it, the file is as it was or complete."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads JSON.

        Raises:
            ValueError: no file, or no calibration in it.
        """
        try:
            content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            fingerprint = Fingerprint(**content.pop("fingerprint"))
            thresholds = {int(step): float(value) for step, value in content.pop("thresholds").items()}
            if not thresholds or any(map(math.isnan, thresholds.values())):  # no score exceeds a NaN: all would pass
                raise ValueError("no thresholds")
            lists: dict[str, tuple[Any, ...]] = {
                name: tuple(float(x) for x in content.pop(name))
                for name in ("observe_at", "look_again_at", "benign_scores")
            }
            lists["shared_seeds"] = tuple(map(int, content.pop("shared_seeds", ())))
            detector = {name: tuple(v) if isinstance(v, list) else v for name, v in content.pop("detector").items()}
            return cls(fingerprint=fingerprint, thresholds=thresholds, detector=detector, **lists, **content)
        except OSError as error:
            raise ValueError(f"calibration {str(path)!r} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"calibration {str(path)!r} is not a calibration file: make one with sd-guard calibrate or Calibrator"
            ) from error


@dataclass(slots=True)
class Calibrator:
    """Takes the records of benign images, and of memorized ones where some are known, and yields a calibration.

    Records of `sd-guard calibrate`, or of a guard with `look_at_all=True` and `max_attempts=0`, have all looks of every
    image. An image that was changed before the last look counts with the score it was flagged by.

    Attributes:
        guard: that scored them.
        fingerprint: of the configuration.
        false_positive_rate: alpha, in (0, 1).
        images_per_prompt: each prompt's, its records side by side.
        benign: what was seen of each image so far.
        memorized: likewise.
        seeds: of the benign images.
    """

    guard: Guard
    fingerprint: Fingerprint
    false_positive_rate: float = 0.01
    images_per_prompt: int = 1
    benign: list[Trajectory] = field(default_factory=list)
    memorized: list[Trajectory] = field(default_factory=list)
    seeds: list[int | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuses a rate that no threshold can have."""
        check_rate("false_positive_rate", self.false_positive_rate)
        if self.images_per_prompt < 1:
            raise ValueError(f"images_per_prompt={self.images_per_prompt} is below 1: give each prompt's images")

    def update(self, records: Iterable[GuardRecord], *, memorized: bool = False) -> None:
        """Adds images, benign ones or labelled memorized ones; those that a look could not score count for nothing.

        Raises:
            ValueError: a record of another configuration, or without looks that its guard had no need of; a detector
                that has nothing to be chosen.
        """
        if memorized:
            _check_lid_weight(self.guard.detector, "memorized prompts choose it; calibrate without them")
        for record in records:
            if record.fingerprint != self.fingerprint.digest:
                raise ValueError(f"record of configuration {record.fingerprint}, not {self.fingerprint.digest}")
            scored = record.outcome != "unscored" and all(math.isfinite(each.value) for each in record.statistics)
            seen = observations_of(record) if scored else []
            if seen and not record.attempts and not any(map(_is_later, seen)) and self._looks_after(seen[-1].step):
                raise ValueError(
                    "record without later looks, which a guard leaves out where they could change no verdict: take "
                    "those of sd-guard calibrate, or of a guard with look_at_all=True"
                )
            (self.memorized if memorized else self.benign).append(seen)
            if not memorized:
                self.seeds.append(record.seed)

    def finish(self) -> Calibration:
        """The calibration.

        Raises:
            ValueError: too few images for the rate.
        """
        self._check_enough()
        guard, alpha, each = self.guard, self.false_positive_rate, self.images_per_prompt
        choosing = any(self.memorized)
        detector = self._choose() if choosing else guard.detector
        benign = self._half(1) if choosing else self.benign
        scores = {step: _scores(detector, benign, step) for step in sorted({seen.step for t in benign for seen in t})}
        thresholds = {step: conformal_threshold(own, alpha, per_prompt=each) for step, own in scores.items()}
        judge = replace(detector, threshold=thresholds[max(thresholds)])  # type: ignore[type-var]
        return Calibration(
            fingerprint=self.fingerprint,
            false_positive_rate=alpha,
            images=sum(map(bool, benign)),
            observe_at=guard.observe_at,
            look_again_at=guard.look_again_at,
            probes=guard.probes,
            other_seeds=guard.other_seeds,
            thresholds=thresholds,
            detector=scoring_of(detector),
            benign_scores=tuple(sorted(_recorded(judge, seen) for seen in benign[::each] if seen)),
            shared_seeds=shared_seeds(self.seeds[::each]),
        )

    def _looks_after(self, step: int) -> bool:
        return max(self.guard.later_steps(self.fingerprint.steps), default=step) > step

    def _check_enough(self) -> None:
        scored = sum(map(bool, self.benign))
        if not scored:
            raise ValueError("no benign images were given: update the calibrator with records first")
        choosing = any(self.memorized)
        needed = prompts_needed(self.false_positive_rate, choosing=choosing) * self.images_per_prompt
        if scored < needed:
            halves = ", half of them to choose by the memorized ones" if choosing else ""
            raise ValueError(
                f"{scored} benign images cannot give a false-positive rate of {self.false_positive_rate:g}: "
                f"at least {needed} are needed{halves}"
            )

    def _half(self, which: int) -> list[Trajectory]:
        """Every other prompt with all its images: the place in the list decides, never a score."""
        return [seen for place, seen in enumerate(self.benign) if place // self.images_per_prompt % 2 == which]

    def _choose(self) -> Detector:
        """The detector whose weight of the LID flags most memorized images at the rate; in doubt, as it was."""
        own, benign = self.guard.detector, self._half(0)
        step = max(seen.step for t in self.benign for seen in t)

        def true_positives(detector: Detector) -> int:
            scores = _scores(detector, benign, step)
            line = conformal_threshold(scores, self.false_positive_rate, per_prompt=self.images_per_prompt)
            return sum(score > line for score in _scores(detector, self.memorized, step))

        others = [replace(own, lid_weight=weight) for weight in LID_WEIGHTS]  # type: ignore[type-var]
        return max((own, *others), key=true_positives)


def conformal_threshold(scores: Sequence[float], false_positive_rate: float, *, per_prompt: int = 1) -> float:
    """The score that a new exchangeable benign one exceeds with probability at most `false_positive_rate`.

    Args:
        scores: n benign ones.
        false_positive_rate: alpha, in (0, 1).
        per_prompt: how many of them each prompt has.

    Raises:
        ValueError: scores of fewer than 1 / alpha - 1 prompts.
    """
    rank = math.ceil((len(scores) + per_prompt) * (1 - false_positive_rate) - 1e-9)
    if rank > len(scores):
        needed = prompts_needed(false_positive_rate) * per_prompt
        raise ValueError(
            f"{len(scores)} benign images cannot give a false-positive rate of {false_positive_rate:g}: "
            f"at least {needed} are needed"
        )
    return sorted(scores)[rank - 1]


def prompts_needed(false_positive_rate: float, *, choosing: bool = False) -> int:
    """Benign prompts that the rate needs at least; twice as many where memorized ones are to choose by half of them."""
    return math.ceil(1 / false_positive_rate - 1 - 1e-9) * (2 if choosing else 1)


def shared_seeds(seeds: Sequence[int | None]) -> tuple[int, ...]:
    """The seeds that images of different prompts share, ascending; empty where most have one of their own, or none.

    Args:
        seeds: one a prompt.
    """
    known = {seed for seed in seeds if seed is not None}
    return tuple(sorted(known)) if 2 * len(known) <= len(seeds) else ()


def check_rate(name: str, rate: float) -> None:
    """Raises ValueError unless the false-positive rate, called `name`, is in (0, 1)."""
    if not 0 < rate < 1:
        raise ValueError(f"{name}={rate} must be above 0 and below 1")


def observations_of(record: GuardRecord) -> list[Observation]:
    """The observations of one image, from its record; each value has shape (1,)."""
    steps: dict[int, dict[str, torch.Tensor]] = {}
    for statistic in record.statistics:
        steps.setdefault(statistic.step, {})[statistic.name] = torch.tensor([statistic.value])
    return [
        Observation(step, record.dimension, values, (0,), probed={name: (0,) for name in PROBED if name in values})
        for step, values in sorted(steps.items())
    ]


def _scores(detector: Detector, trajectories: Iterable[Trajectory], step: int) -> list[float]:
    """Of what was seen of each scored image up to a step."""
    return [_score(detector, [seen for seen in t if seen.step <= step]) for t in trajectories if t]


def _score(detector: Detector, seen: Trajectory) -> float:
    """Of one image; later looks, which one that was changed before has none of, are told by what they hold."""
    return float(detector.score([look for look in seen if not _is_later(look)], [*filter(_is_later, seen)])[0])


def _recorded(detector: Detector, seen: Trajectory) -> float:
    """What a guard records of one image: its score at once, where no later look can change the verdict."""
    at_once = _score(detector, [look for look in seen if not _is_later(look)])
    return at_once if is_settled(detector, at_once) else _score(detector, seen)


def _is_later(look: Observation) -> bool:
    return "excess_persistence" in look.values


def scoring_of(detector: Detector) -> dict[str, Any]:
    """Settings that scores depend on: all of a detector's but its threshold."""
    settings = asdict(detector)  # type: ignore[call-overload]
    return {name: value for name, value in settings.items() if name != "threshold"}


def _check_lid_weight(detector: Detector, why: str) -> None:
    if not hasattr(detector, "lid_weight"):
        raise ValueError(f"{type(detector).__name__} has no lid_weight: {why}")
