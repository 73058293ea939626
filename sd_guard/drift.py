"""Have the scores of a run left those that its calibration was made from?

A calibration's false-positive rate holds for prompts like its own. Whether a run's are like them shows in the *bulk*
of the scores: memorized images sit in the upper tail, in a share that nobody knows, so nothing above the calibration's
80th percentile is looked at. Given that percentile, the calibration's scores below it and a run's benign ones below it
come from one distribution, cut off at the same place, and the two-sample Kolmogorov-Smirnov test compares them.

What it cannot see: a change above the percentile alone; and a run that lies above it nearly as a whole, which looks the
same whether every prompt is memorized or the calibration does not fit (the message says so).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BULK = 0.8  # share of the calibration's scores that is compared: the tail above it may hold memorized images
MIN_SCORES = 20  # on either side: fewer tell nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Whether a run's benign scores left the calibration's.

    Attributes:
        drifted: the p-value is below the rate of false alarms that was asked for.
        p_value: in [0, 1]; None where there was too little to compare.
        message: one line: what was found, and what to do.
    """

    drifted: bool
    p_value: float | None
    message: str


def check_drift(benign_scores: Sequence[float], scores: Sequence[float], *, false_alarms: float = 0.01) -> Drift:
    """Compares a run's scores with those of its calibration, in the benign bulk alone.

    Args:
        benign_scores: `Calibration.benign_scores`.
        scores: of a run in the calibrated configuration, one image a prompt: images of one prompt are no independent
            evidence. Those that are not finite are left out.
        false_alarms: how often a run that did not drift may be said to have, in (0, 1). Memorized images do not count
            towards it as long as they score above the calibration's 80th percentile.

    Raises:
        ValueError: a rate that is none.
    """
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms={false_alarms} must be above 0 and below 1")
    own, run = (np.sort(np.asarray(each, dtype=np.float64)) for each in (benign_scores, scores))
    run = run[np.isfinite(run)]
    if not len(own):
        return _undecided("the calibration keeps no benign scores: calibrate again to have drift checked")
    cut = own[math.ceil(BULK * len(own)) - 1]
    below, seen = own[own < cut], run[run < cut]
    if len(below) < MIN_SCORES:
        return _undecided(f"drift not checked: the calibration has {len(own)} benign scores, too few to compare with")
    if len(seen) < MIN_SCORES:
        return _undecided(
            f"drift not checked: {len(seen)} of {len(run)} images score below the calibration's {BULK:.0%} mark, where "
            f"benign ones mostly do and {MIN_SCORES} are needed; if most are not memorized, calibrate on such prompts"
        )
    p_value = _kolmogorov_smirnov(below, seen)
    if p_value >= false_alarms:
        return Drift(drifted=False, p_value=p_value, message=f"benign scores are the calibration's (p = {p_value:.2g})")
    message = (
        f"benign scores have left the calibration's (p = {p_value:.2g}): its false-positive rate does not hold for "
        "these prompts; calibrate on prompts like them"
    )
    return Drift(drifted=True, p_value=p_value, message=message)


def _undecided(message: str) -> Drift:
    return Drift(drifted=False, p_value=None, message=message)


def _kolmogorov_smirnov(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Two-sample p-value of sorted (n,) and (m,) by Smirnov's limit.

    Below 0.1 it was never found smaller than the exact one, from 20 scores a side up; ties make either cautious.
    `P(sqrt(nm / (n + m)) D > x) -> 2 sum_k (-1)^(k - 1) exp(-2 k^2 x^2)` (Smirnov 1939).
    """
    places = np.concatenate([first, second])
    shares = [np.searchsorted(each, places, side="right") / len(each) for each in (first, second)]
    distance = np.abs(shares[0] - shares[1]).max()
    x = math.sqrt(len(first) * len(second) / (len(first) + len(second))) * float(distance)
    if x < 0.2:  # the series converges slowly there, and is 1 to 12 digits
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 30)))
