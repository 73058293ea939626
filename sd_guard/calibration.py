"""Thresholds at a stated false-positive rate, from benign prompts, for one configuration.

Split conformal: with n exchangeable benign scores, the ceil((n + 1)(1 - alpha))-th smallest is exceeded by a new benign
score with probability at most alpha (Vovk et al. 2005; Angelopoulos and Bates 2021, arXiv 2107.07511, section 1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sd_guard.fingerprint import Fingerprint
from sd_guard.guard import Guard, GuardRecord
from sd_guard.observation import Observation


@dataclass(frozen=True, slots=True)
class Calibration:
    """Thresholds of one configuration.

    Attributes:
        fingerprint: of the configuration that they hold for.
        false_positive_rate: alpha, in (0, 1).
        images: benign images they come from.
        observe_at: as of the guard that scored them.
        probe_at: likewise.
        probes: likewise.
        thresholds: step to threshold of the score of the observations up to that step.
    """

    fingerprint: Fingerprint
    false_positive_rate: float
    images: int
    observe_at: tuple[float, ...]
    probe_at: tuple[float, ...]
    probes: int
    thresholds: Mapping[int, float]

    def apply(self, guard: Guard) -> Guard:
        """The guard with this threshold, and looking where the benign images were looked at."""
        watch = replace(guard, observe_at=self.observe_at, probe_at=self.probe_at, probes=self.probes)
        return replace(watch, detector=replace(guard.detector, threshold=self.thresholds[max(self.thresholds)]))  # type: ignore[type-var]

    def check(self, fingerprint: Fingerprint) -> None:
        """Raises ValueError where a call's configuration is not the calibrated one."""
        if differences := self.fingerprint.difference(fingerprint):
            raise ValueError(
                f"the calibration was made for another configuration ({'; '.join(differences)}): calibrate again, or "
                "enable the guard without a calibration"
            )

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

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
            if not thresholds:
                raise ValueError("no thresholds")
            shares = {name: tuple(content.pop(name)) for name in ("observe_at", "probe_at")}
            return cls(fingerprint=fingerprint, thresholds=thresholds, **shares, **content)
        except OSError as error:
            raise ValueError(f"calibration {str(path)!r} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"calibration {str(path)!r} is not a calibration file: make one with Calibrator"
            ) from error


@dataclass(slots=True)
class Calibrator:
    """Takes the records of benign images, and yields a calibration.

    Attributes:
        guard: that scored them.
        fingerprint: of the configuration.
        false_positive_rate: alpha, in (0, 1).
        scores: step to scores so far.
    """

    guard: Guard
    fingerprint: Fingerprint
    false_positive_rate: float = 0.01
    scores: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses a rate that no threshold can have."""
        if not 0 < self.false_positive_rate < 1:
            raise ValueError(f"false_positive_rate={self.false_positive_rate} must be above 0 and below 1")

    def update(self, records: Iterable[GuardRecord]) -> None:
        """Adds images; unscored ones are left out.

        Raises:
            ValueError: a record of another configuration.
        """
        for record in records:
            if record.fingerprint != self.fingerprint.digest:
                raise ValueError(f"record of configuration {record.fingerprint}, not {self.fingerprint.digest}")
            if record.outcome == "unscored":
                continue
            seen = observations_of(record)
            for count in range(1, len(seen) + 1):
                score = float(self.guard.detector.score(seen[:count])[0])
                self.scores.setdefault(seen[count - 1].step, []).append(score)

    def finish(self) -> Calibration:
        """The calibration.

        Raises:
            ValueError: too few images for the rate.
        """
        images = len(next(iter(self.scores.values()), []))
        thresholds = {
            step: conformal_threshold(scores, self.false_positive_rate) for step, scores in self.scores.items()
        }
        if not thresholds:
            raise ValueError("no benign images were given: update the calibrator with records first")
        guard = self.guard
        return Calibration(
            self.fingerprint,
            self.false_positive_rate,
            images,
            guard.observe_at,
            guard.probe_at,
            guard.probes,
            thresholds,
        )


def conformal_threshold(scores: Sequence[float], false_positive_rate: float) -> float:
    """The score that a new exchangeable benign one exceeds with probability at most `false_positive_rate`.

    Raises:
        ValueError: fewer than 1 / alpha - 1 scores.
    """
    rank = math.ceil((len(scores) + 1) * (1 - false_positive_rate) - 1e-9)
    if rank > len(scores):
        needed = math.ceil(1 / false_positive_rate - 1 - 1e-9)
        raise ValueError(
            f"{len(scores)} benign images cannot give a false-positive rate of {false_positive_rate:g}: "
            f"at least {needed} are needed"
        )
    return sorted(scores)[rank - 1]


def observations_of(record: GuardRecord) -> list[Observation]:
    """The observations of one image, from its record; each value has shape (1,)."""
    steps: dict[int, dict[str, torch.Tensor]] = {}
    for statistic in record.statistics:
        steps.setdefault(statistic.step, {})[statistic.name] = torch.tensor([statistic.value])
    return [Observation(step, record.dimension, values, 0) for step, values in sorted(steps.items())]
