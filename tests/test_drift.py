"""The drift check: few false alarms whatever the share of memorized prompts, and it sees what it should."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from sd_guard.calibration import Calibration, shared_seeds
from sd_guard.drift import _kolmogorov_smirnov, check_drift
from sd_guard.fingerprint import Fingerprint
from sd_guard.screening.records import Row, unscored_row
from sd_guard.screening.summary import drift_warning

RUNS = 1000


def share_of_alarms(
    calibration: int,
    benign: int,
    memorized: int = 0,
    *,
    mean: float = 0.0,
    deviation: float = 1.0,
    runs: int = RUNS,
    false_alarms: float = 0.01,
) -> float:
    """Of runs with so many benign scores, normal, and so many memorized ones well above; calibrations are N(0, 1)."""
    rng = np.random.default_rng(0)

    def run() -> NDArray[np.float64]:
        return np.concatenate([rng.normal(mean, deviation, benign), rng.normal(4.0, 1.0, memorized)])

    alarms = [
        check_drift(list(rng.normal(size=calibration)), list(run()), false_alarms=false_alarms).drifted
        for _ in range(runs)
    ]
    return float(np.mean(alarms))


@pytest.mark.parametrize("false_alarms", [0.01, 0.05])
@pytest.mark.parametrize(
    ("calibration", "benign", "memorized"),
    [(99, 40, 0), (99, 400, 20), (216, 50, 50), (216, 200, 0), (500, 300, 900), (500, 500, 0)],
)
def test_false_alarms_stay_below_their_rate(calibration: int, benign: int, memorized: int, false_alarms: float) -> None:
    share = share_of_alarms(calibration, benign, memorized, false_alarms=false_alarms)
    assert share <= stats.binom.ppf(0.9995, RUNS, false_alarms) / RUNS


@pytest.mark.parametrize(
    ("mean", "deviation", "power"), [(0.5, 1.0, 0.9), (-0.5, 1.0, 0.95), (1.0, 1.0, 0.99), (0.0, 2.0, 0.99)]
)
def test_a_shift_or_another_spread_is_seen(mean: float, deviation: float, power: float) -> None:
    """Of half a deviation, in 500 benign images against a calibration of 500, with 100 memorized ones in between."""
    assert share_of_alarms(500, 500, 100, mean=mean, deviation=deviation, runs=200) >= power


@pytest.mark.parametrize(("n", "m"), [(20, 20), (80, 25), (79, 160), (172, 300)])
def test_small_p_values_are_those_of_the_exact_test_or_larger(n: int, m: int) -> None:
    rng = np.random.default_rng(n)
    for shift in np.linspace(0.0, 1.0, 21):
        first, second = np.sort(rng.normal(size=n)), np.sort(rng.normal(shift, size=m))
        exact = stats.ks_2samp(first, second, method="exact").pvalue
        own = _kolmogorov_smirnov(first, second)
        assert own >= exact or exact > 0.1
        assert own == pytest.approx(exact, abs=0.1)
        assert own == pytest.approx(stats.kstwobign.sf(_statistic(first, second)), rel=1e-9)


def _statistic(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    return stats.ks_2samp(first, second).statistic * math.sqrt(len(first) * len(second) / (len(first) + len(second)))


def test_scores_of_the_calibration_itself_have_not_drifted() -> None:
    scores = list(np.random.default_rng(0).normal(size=200))
    drift = check_drift(scores, scores)
    assert (drift.drifted, drift.p_value) == (False, 1.0)


def test_the_tail_is_not_looked_at() -> None:
    """Memorized scores, however many and however high, change nothing; nor does their order, nor an unscored image."""
    rng = np.random.default_rng(0)
    calibration, run = list(rng.normal(size=200)), list(rng.normal(size=200))
    plain = check_drift(calibration, run)
    assert check_drift(calibration[::-1], [9.0] * 500 + run[::-1] + [math.nan, math.inf]) == plain


def test_messages_say_what_to_do() -> None:
    rng = np.random.default_rng(0)
    calibration = list(rng.normal(size=200))
    drift = check_drift(calibration, list(rng.normal(-1.0, 1.0, size=200)))
    assert drift.drifted
    assert drift.p_value is not None
    assert f"p = {drift.p_value:.2g}" in drift.message
    assert "calibrate on prompts like them" in drift.message


@pytest.mark.parametrize(
    ("calibration", "run", "message"),
    [
        (0, 100, "keeps no benign scores: calibrate again"),
        (25, 100, "the calibration has 25 benign scores, too few"),
        (100, 5, r"of 5 images score below the calibration's 80% mark"),
        (100, 0, r"0 of 0 images"),
    ],
)
def test_too_little_to_tell_is_no_drift_and_says_so(calibration: int, run: int, message: str) -> None:
    rng = np.random.default_rng(0)
    drift = check_drift(list(rng.normal(size=calibration)), list(rng.normal(size=run)))
    assert (drift.drifted, drift.p_value) == (False, None)
    assert "\n" not in drift.message
    with pytest.raises(ValueError, match=message):
        raise ValueError(drift.message)


def test_a_run_that_lies_above_as_a_whole_is_named() -> None:
    drift = check_drift(list(np.random.default_rng(0).normal(size=200)), [5.0] * 300)
    assert drift.p_value is None
    assert "0 of 300 images score below" in drift.message


@pytest.mark.parametrize("rate", [0.0, 1.0, math.nan])
def test_a_rate_that_is_none(rate: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 and below 1"):
        check_drift([1.0], [1.0], false_alarms=rate)


FINGERPRINT = Fingerprint("m", "DDIM", 50, "7.5", "float32")
BENIGN = tuple(np.linspace(-1.0, 1.0, 200).tolist())


def warned(
    folder: Path,
    scores: Sequence[float],
    seeds: Sequence[int],
    shared: tuple[int, ...] = (),
    depths: Sequence[str] = (),
) -> str:
    """What is said of a run, one image a prompt; nothing where nothing is."""
    calibration = Calibration(FINGERPRINT, 0.1, 200, (0.1,), (), 1, 0, {5: 0.8}, {}, BENIGN, shared)
    calibration.save(folder / "c.json")
    digests = [*depths, *[FINGERPRINT.digest] * (len(scores) - len(depths))]
    rows = [
        unscored_row(prompt=str(n), family=None, seed=seed, index=n, reason="")
        | {"score": score, "fingerprint": digest}
        for n, (score, seed, digest) in enumerate(zip(scores, seeds, digests, strict=True))
    ]
    return drift_warning(cast("list[Row]", rows), folder / "c.json") or ""


@pytest.mark.parametrize(("seeds", "shared"), [(range(200), ()), ([3] * 200, (3,)), ([3, 4] * 100, (3, 4))])
def test_a_run_says_what_was_found_or_that_nothing_could_be(
    tmp_path: Path, seeds: Sequence[int], shared: tuple[int, ...]
) -> None:
    """Also of a run that lies above its calibration as a whole, which no test can tell from a memorized one."""
    assert not warned(tmp_path, BENIGN, seeds, shared)
    assert "have left the calibration's" in warned(tmp_path, [score / 9 for score in BENIGN], seeds, shared)
    assert "drift not checked: 0 of 200" in warned(tmp_path, [score + 5 for score in BENIGN], seeds, shared)


@pytest.mark.parametrize(
    ("seeds", "shared", "said"),
    [
        ([0] * 200, (), "the prompts share seed 0, those of the calibration have seeds of their own; .*; give prompts"),
        ([0, 1] * 100, (), "the prompts share 2 seeds, those of the calibration have seeds of their own"),
        (
            [5] * 200,
            (0,),
            "the prompts share seed 5, those of the calibration share seed 0; .*; calibrate with the run's",
        ),
        (range(200), (0,), "the prompts have seeds of their own, those of the calibration share seed 0"),
    ],
)
def test_noise_that_one_side_shares_is_no_drift(
    tmp_path: Path, seeds: Sequence[int], shared: tuple[int, ...], said: str
) -> None:
    """It moves the scores of all prompts alike: the same prompts would seem others."""
    said = f"drift not checked: {said}"
    message = warned(tmp_path, [score / 9 for score in BENIGN], seeds, shared)
    assert re.match(said, message)
    assert "\n" not in message


def test_scores_of_another_depth_are_no_drift(tmp_path: Path) -> None:
    message = warned(tmp_path, BENIGN, range(200), depths=["another"] * 150)
    assert message.startswith("drift not checked: 150 of 200 images are of another depth than the calibration; screen")
    assert "\n" not in message


@pytest.mark.parametrize("shared", [(), (0,)])
@pytest.mark.parametrize("count", [0, 1])
def test_a_run_of_next_to_nothing_is_too_small_whatever_its_seeds(
    tmp_path: Path, count: int, shared: tuple[int, ...]
) -> None:
    """One prompt at the seed that the calibration's share does not have one of its own."""
    message = warned(tmp_path, [-0.5] * count, [0] * count, shared)
    assert message.startswith(f"drift not checked: {count} of {count} images score below")


def test_a_calibration_knows_the_seeds_that_its_images_share() -> None:
    assert shared_seeds([0] * 9) == (0,)
    assert shared_seeds([7, 3] * 4) == (3, 7)
    assert shared_seeds(range(9)) == shared_seeds([None] * 9) == shared_seeds([]) == ()
