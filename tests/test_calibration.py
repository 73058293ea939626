"""The false-positive rate that a calibration states is the one that it has."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_guard.calibration import Calibration, Calibrator, conformal_threshold, observations_of
from sd_guard.detection import PrematureDetail
from sd_guard.fingerprint import Fingerprint
from sd_guard.guard import Guard, GuardRecord, StatisticValue

FINGERPRINT = Fingerprint("m", "DDIM", 50, "7.5", "float32")


@pytest.mark.parametrize("draw", ["normal", "standard_cauchy", "ties"])
@pytest.mark.parametrize(("n", "alpha"), [(19, 0.05), (40, 0.1), (99, 0.01), (150, 0.02)])
def test_false_positive_rate_over_many_splits(draw: str, n: int, alpha: float) -> None:
    """Mean over 400 splits of 200 fresh scores: at most alpha within four standard errors, and not idle either."""
    rng = np.random.default_rng(0)
    sample = (lambda size: rng.integers(0, 5, size).astype(float)) if draw == "ties" else getattr(rng, draw)
    splits = 400
    rates = [float((sample(size=200) > conformal_threshold(list(sample(size=n)), alpha)).mean()) for _ in range(splits)]
    mean, error = float(np.mean(rates)), float(np.std(rates)) / math.sqrt(splits)
    assert mean <= alpha + 4 * error
    if draw != "ties":  # without ties the rate is (n + 1 - rank) / (n + 1) in expectation, not just below alpha
        rank = math.ceil((n + 1) * (1 - alpha) - 1e-9)
        assert abs(mean - (n + 1 - rank) / (n + 1)) <= 4 * error


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(0.02, 0.9))
def test_threshold_is_the_conformal_quantile(scores: list[float], alpha: float) -> None:
    needed = math.ceil(1 / alpha - 1 - 1e-9)
    if len(scores) < needed:
        with pytest.raises(ValueError, match=f"{len(scores)} benign images .* at least {needed} are needed"):
            conformal_threshold(scores, alpha)
        return
    threshold = conformal_threshold(scores, alpha)
    assert threshold in scores
    assert sum(score > threshold for score in scores) <= alpha * (len(scores) + 1) + 1e-6


@pytest.mark.parametrize(("alpha", "needed"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.5, 1), (1 / 3, 2)])
def test_too_few_images_names_how_many(alpha: float, needed: int) -> None:
    with pytest.raises(ValueError, match=f"at least {needed} are needed"):
        conformal_threshold([0.0] * (needed - 1), alpha)
    assert conformal_threshold([*range(needed)], alpha) == needed - 1


def record(score: float, *, outcome: str = "passed", fingerprint: Fingerprint = FINGERPRINT) -> GuardRecord:
    """A record whose ratio grows with its steps, the last one deciding."""
    values = tuple(
        StatisticValue(step, name, "noisy", lane, value)
        for step, factor in ((3, 0.5), (7, 1.0))
        for name, lane, value in (
            ("log_detail_ratio", "conditional/control", score * factor),
            ("trajectory_lid", "conditional", 40.0),
            ("trajectory_lid_control", "control", 40.0),
            ("detail", "conditional", 1.0),
            ("cfg_norm", "conditional-control", 1.0),
        )
    )
    return GuardRecord("pass", outcome, score, 7, 256, values, (), 2, 0, fingerprint.digest, None)


def calibrator(**options: Any) -> Calibrator:
    return Calibrator(Guard(observe_at=(0.06, 0.14), probe_at=(0.14,)), FINGERPRINT, **options)


def test_calibrator() -> None:
    """A threshold a step, of the score up to that step, as the detector of the guard gives it."""
    made = calibrator(false_positive_rate=0.2)
    records = [record(float(n)) for n in range(10)]
    made.update(records[:4])
    made.update([*records[4:], record(math.nan, outcome="unscored")])
    calibration = made.finish()
    detector = made.guard.detector
    scores = {
        step: sorted(float(detector.score(observations_of(r)[:count])[0]) for r in records)
        for step, count in ((3, 1), (7, 2))
    }
    rank = math.ceil(11 * 0.8)
    assert calibration.thresholds == {step: ordered[rank - 1] for step, ordered in scores.items()}
    assert (calibration.images, calibration.observe_at, calibration.probe_at) == (10, (0.06, 0.14), (0.14,))
    assert calibration.fingerprint == FINGERPRINT


def test_calibrated_guard() -> None:
    calibration = Calibration(FINGERPRINT, 0.1, 20, (0.1, 0.3), (0.3,), 2, {5: 1.0, 15: 0.25})
    guard = calibration.apply(Guard(detector=PrematureDetail(threshold=9.0, lid_weight=0.5), seed=3))
    assert guard.detector == PrematureDetail(threshold=0.25, lid_weight=0.5)
    assert (guard.observe_at, guard.probe_at, guard.probes, guard.seed) == ((0.1, 0.3), (0.3,), 2, 3)


def test_records_of_another_configuration() -> None:
    other = replace(FINGERPRINT, steps=20)
    with pytest.raises(ValueError, match=f"record of configuration {other.digest}, not {FINGERPRINT.digest}"):
        calibrator().update([record(0.0, fingerprint=other)])


def test_no_records() -> None:
    with pytest.raises(ValueError, match="no benign images were given"):
        calibrator().finish()


def test_too_few_records() -> None:
    made = calibrator(false_positive_rate=0.01)
    made.update([record(0.0)] * 98)
    with pytest.raises(ValueError, match=r"98 benign images cannot give .* 0\.01: at least 99 are needed"):
        made.finish()
    made.update([record(0.0)])
    assert made.finish().images == 99


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_rates_that_no_threshold_has(rate: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 and below 1"):
        calibrator(false_positive_rate=rate)


def test_check_names_what_differs() -> None:
    calibration = Calibration(FINGERPRINT, 0.1, 20, (0.1,), (), 0, {5: 1.0})
    calibration.check(FINGERPRINT)
    with pytest.raises(ValueError, match=r"\(steps: 50, not 20; dtype: float32, not float16\)") as caught:
        calibration.check(replace(FINGERPRINT, steps=20, dtype="float16"))
    assert "\n" not in str(caught.value)


CALIBRATION = Calibration(FINGERPRINT, 0.1, 20, (0.1, 0.3), (0.3,), 2, {5: 1.0, 15: -0.25})


def test_round_trip(tmp_path: Any) -> None:
    CALIBRATION.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == CALIBRATION


def broken(**changes: Any) -> bytes:
    from dataclasses import asdict

    content = json.loads(json.dumps(asdict(CALIBRATION))) | changes
    return json.dumps({key: value for key, value in content.items() if value != "missing"}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b"\n{\n",
        broken(fingerprint="missing"),
        broken(fingerprint={"model": "m"}),
        broken(thresholds="missing"),
        broken(thresholds={}),
        broken(thresholds={"five": 1.0}),
        broken(thresholds={"5": None}),
        broken(images="missing"),
        broken(colour="red"),
        broken(observe_at=3),
    ],
)
def test_what_is_no_calibration(tmp_path: Any, content: bytes) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.json' is not a calibration file: make one with Calibrator") as caught:
        Calibration.load(path)
    assert "\n" not in str(caught.value)


def test_no_such_file(tmp_path: Any) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match="cannot be read: ") as caught:
            Calibration.load(path)
        assert "\n" not in str(caught.value)
