"""The false-positive rate that a calibration states is the one that it has."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sd_guard.calibration import Calibration, Calibrator, conformal_threshold, observations_of, prompts_needed
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


SPLITS = 200


@pytest.mark.parametrize("alpha", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("n", [99, 150, 400])
def test_false_positives_over_200_splits_lie_in_their_binomial_interval(alpha: float, n: int) -> None:
    """One fresh score a split: 200 independent trials at the stated rate."""
    rng = np.random.default_rng(n)
    exact = (n + 1 - math.ceil((n + 1) * (1 - alpha) - 1e-9)) / (n + 1)
    assert alpha - 1 / (n + 1) < exact <= alpha + 1e-12
    low, high = stats.binom.ppf([0.0005, 0.9995], SPLITS, exact)
    hits = 0
    for _ in range(SPLITS):
        *calibrating, fresh = rng.gamma(2.0, size=n + 1)
        hits += fresh > conformal_threshold(calibrating, alpha)
    assert low <= hits <= high


@pytest.mark.parametrize(("n", "alpha"), [(99, 0.01), (150, 0.02), (400, 0.05), (60, 0.05)])
def test_the_rate_of_one_calibration_is_beta_distributed(n: int, alpha: float) -> None:
    """On uniform scores a threshold q has the rate 1 - q exactly; over splits that is Beta(n + 1 - k, k)."""
    rng = np.random.default_rng(1)
    k = math.ceil((n + 1) * (1 - alpha) - 1e-9)
    rates = [1 - conformal_threshold(list(rng.random(n)), alpha) for _ in range(SPLITS)]
    assert stats.kstest(rates, stats.beta(n + 1 - k, k).cdf).pvalue > 1e-3


@pytest.mark.parametrize("levels", [1, 2, 5, 40])
def test_ties_only_make_it_cautious(levels: int) -> None:
    """The exact rate of a threshold on a die of so many sides, over splits of a pool with many ties."""
    rng = np.random.default_rng(2)
    thresholds = np.array([conformal_threshold(list(rng.integers(0, levels, 120)), 0.05) for _ in range(SPLITS)])
    rates = (levels - 1 - thresholds) / levels
    assert rates.mean() <= 0.05 + 4 * rates.std() / math.sqrt(SPLITS)


@pytest.mark.parametrize("each", [2, 4])
def test_the_rate_holds_where_a_prompt_has_several_images(each: int) -> None:
    """Images of one prompt that are nearly one another; counted as so many prompts, the rate is missed."""
    rng, prompts, alpha = np.random.default_rng(3), 40, 0.05
    exceeds = stats.norm(scale=math.hypot(1, 0.01)).sf

    def scores(count: int) -> Any:
        return (rng.normal(size=(count, 1)) + 0.01 * rng.normal(size=(count, each))).ravel()

    thresholds = [conformal_threshold(list(scores(prompts)), alpha, per_prompt=each) for _ in range(SPLITS)]
    rates = exceeds(thresholds)
    assert rates.mean() <= alpha + 4 * rates.std() / math.sqrt(SPLITS)
    naive = exceeds([conformal_threshold(list(scores(10)), alpha) for _ in range(SPLITS)])
    assert naive.mean() > alpha + 4 * naive.std() / math.sqrt(SPLITS)
    with pytest.raises(ValueError, match=f"at least {19 * each} are needed"):
        conformal_threshold(list(scores(18)), alpha, per_prompt=each)
    conformal_threshold(list(scores(19)), alpha, per_prompt=each)


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
    assert calibration.lid_weight == made.guard.detector.lid_weight
    assert calibration.benign_scores == tuple(scores[7])


def test_calibrator_of_several_images_a_prompt() -> None:
    """Thresholds by prompts; one score a prompt is kept for the drift check; an unscored image keeps its place."""
    made = calibrator(false_positive_rate=0.25, images_per_prompt=2)
    made.update(record(float(n)) for n in range(5))
    with pytest.raises(ValueError, match=r"5 benign images cannot give .* at least 6 are needed"):
        made.finish()
    made.update([record(math.nan, outcome="unscored"), *(record(float(n)) for n in range(6, 12))])
    calibration = made.finish()
    score = [float(made.guard.detector.score(observations_of(record(float(n))))[0]) for n in range(12)]
    assert calibration.benign_scores == tuple(score[::2])
    assert calibration.thresholds[7] == score[10]  # the ceil((11 + 2) * 0.75) = 10th of the eleven
    assert calibration.images == 11


def test_images_whose_trajectories_end_at_different_steps() -> None:
    """What was seen up to a step counts, so that every benign image has a score at every step."""
    made = calibrator(false_positive_rate=0.5)
    early = replace(record(9.0), statistics=record(9.0).statistics[:5])
    made.update([early, record(1.0), record(2.0)])
    assert made.finish().thresholds == {3: 1.0, 7: 1.5}
    assert made.finish().benign_scores == (0.75, 1.5, 4.5)


def labelled(rng: Any, count: int, *, memorized: bool) -> list[GuardRecord]:
    """Records in which only the LID tells, and the detail ratio is noise; without probes on every tenth."""
    records = []
    for place in range(count):
        statistics = {
            "log_detail_ratio": rng.normal(),
            "trajectory_lid": 40.0 - (40.0 if memorized else 0.0) + rng.normal(),
            "trajectory_lid_control": 40.0,
        }
        names = list(statistics)[: 1 if place % 10 == 0 else 3]
        values = tuple(StatisticValue(7, name, "noisy", "both", float(statistics[name])) for name in names)
        records.append(GuardRecord("pass", "passed", 0.0, 7, 256, values, (), 2, 0, FINGERPRINT.digest, None))
    return records


def rates(calibration: Calibration, guard: Guard, *groups: list[GuardRecord]) -> list[float]:
    """Share of each group that the calibrated guard flags."""
    detector = calibration.apply(guard).detector
    flags = [[float(detector.score(observations_of(r))[0]) > detector.threshold for r in group] for group in groups]
    return [float(np.mean(flag)) for flag in flags]


def test_memorized_prompts_raise_the_hits_and_leave_the_false_positives() -> None:
    """Over 200 calibrations: TPR with labels against without, and one fresh benign image each at the stated rate."""
    rng, alpha = np.random.default_rng(4), 0.05
    guard = Guard(observe_at=(0.14,), probe_at=(0.14,), detector=PrematureDetail(lid_weight=1.0))
    gained, false = [], 0
    for split in range(SPLITS):
        benign, memorized = labelled(rng, 40, memorized=False), labelled(rng, 10, memorized=True)
        made = Calibrator(guard, FINGERPRINT, alpha)
        made.update(benign)
        without = made.finish() if split < 20 else None
        made.update(memorized, memorized=True)
        with_labels = made.finish()
        assert with_labels.images == len(with_labels.benign_scores) == 20
        fresh = labelled(rng, 2, memorized=False)[1:]
        false += rates(with_labels, guard, fresh)[0] > 0
        if without is not None:
            test = labelled(rng, 40, memorized=True)
            gained.append(rates(with_labels, guard, test)[0] - rates(without, guard, test)[0])
    assert np.mean(gained) > 0.3
    exact = (21 - math.ceil(21 * 0.95 - 1e-9)) / 21
    assert stats.binom.ppf(0.0005, SPLITS, exact) <= false <= stats.binom.ppf(0.9995, SPLITS, exact)


def test_the_chosen_weight_never_saw_the_half_that_sets_the_threshold() -> None:
    """Every other prompt chooses: others in the remaining half move the threshold and nothing else."""
    rng = np.random.default_rng(5)
    benign, memorized = labelled(rng, 40, memorized=False), labelled(rng, 9, memorized=True)
    others = labelled(rng, 40, memorized=True)
    guard = Guard(observe_at=(0.14,), probe_at=(0.14,))
    made = [Calibrator(guard, FINGERPRINT, 0.05) for _ in range(2)]
    made[0].update(benign)
    made[1].update(others[place] if place % 2 else each for place, each in enumerate(benign))
    for each in made:
        each.update(memorized, memorized=True)
    plain, changed = (each.finish() for each in made)
    assert plain.lid_weight == changed.lid_weight
    assert plain.thresholds != changed.thresholds


def test_memorized_prompts_that_cannot_choose() -> None:
    @dataclass(frozen=True)
    class Plain:
        threshold: float = 0.0

        def score(self, observations: Any) -> Any:
            return observations[-1].values["log_detail_ratio"]

    made = Calibrator(Guard(detector=Plain()), FINGERPRINT, 0.5)
    with pytest.raises(ValueError, match="Plain has no lid_weight: memorized prompts choose it; calibrate without"):
        made.update([record(1.0)], memorized=True)
    made.update([record(1.0), record(2.0)])
    calibration = made.finish()
    assert calibration.lid_weight is None
    assert calibration.apply(made.guard).detector == Plain(threshold=2.0)
    with pytest.raises(ValueError, match="Plain has no lid_weight: the calibration was made for a detector that has"):
        replace(calibration, lid_weight=2.0).apply(made.guard)


def test_twice_as_many_benign_images_where_memorized_ones_choose() -> None:
    assert (prompts_needed(0.01), prompts_needed(0.01, choosing=True)) == (99, 198)
    made = calibrator(false_positive_rate=0.05)
    made.update([record(0.0)] * 37)
    assert made.finish().images == 37
    made.update([record(9.0)], memorized=True)
    with pytest.raises(ValueError, match=r"37 benign images .* at least 38 are needed, half of them to choose by"):
        made.finish()
    made.update([record(0.0)])
    assert made.finish().images == 19


def test_calibrated_guard() -> None:
    calibration = Calibration(FINGERPRINT, 0.1, 20, (0.1, 0.3), (0.3,), 2, {5: 1.0, 15: 0.25})
    guard = calibration.apply(Guard(detector=PrematureDetail(threshold=9.0, lid_weight=0.5), seed=3))
    assert guard.detector == PrematureDetail(threshold=0.25, lid_weight=0.5)
    assert (guard.observe_at, guard.probe_at, guard.probes, guard.seed) == ((0.1, 0.3), (0.3,), 2, 3)
    assert replace(calibration, lid_weight=4.0).apply(guard).detector == PrematureDetail(threshold=0.25, lid_weight=4.0)


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


def test_a_prompt_has_an_image() -> None:
    with pytest.raises(ValueError, match="images_per_prompt=0 is below 1"):
        calibrator(images_per_prompt=0)


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


CALIBRATION = Calibration(FINGERPRINT, 0.1, 20, (0.1, 0.3), (0.3,), 2, {5: 1.0, 15: -0.25}, 4.0, (-0.5, 0.25))


def test_round_trip(tmp_path: Any) -> None:
    CALIBRATION.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == CALIBRATION
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_a_file_from_before_the_scores_were_kept(tmp_path: Any) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(broken(lid_weight="missing", benign_scores="missing"))
    assert Calibration.load(path) == replace(CALIBRATION, lid_weight=None, benign_scores=())


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
        broken(benign_scores=[None]),
        broken(benign_scores=["high"]),
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
