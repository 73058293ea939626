"""What a calibration is made from, what it changes of a guard, and the rate that this guard then has."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from sd_guard.calibration import Calibration, Calibrator, observations_of, prompts_needed
from sd_guard.detection import PrematureDetail, decide
from sd_guard.fingerprint import Fingerprint
from sd_guard.guard import Guard, GuardRecord, StatisticValue
from sd_guard.observation import PROBED, Observation, Question, add_probed
from sd_guard.policy import Attempt

FINGERPRINT = Fingerprint("m", "DDIM", 50, "7.5", "float32")


SPLITS = 200


def record(score: float, *, outcome: str = "passed", fingerprint: Fingerprint = FINGERPRINT) -> GuardRecord:
    """A record whose ratio grows with its steps, the last one deciding."""
    values = tuple(
        StatisticValue(step, name, "noisy", lane, value)
        for step, factor in ((3, 0.5), (7, 1.0))
        for name, lane, value in (
            ("added_detail", "conditional-control", score * factor),
            ("trajectory_lid", "conditional", 40.0),
            ("trajectory_lid_control", "control", 40.0),
            ("detail", "conditional", 1.0),
            ("cfg_norm", "conditional-control", 1.0),
        )
    )
    return GuardRecord("pass", outcome, score, 7, 256, values, (), 2, 0, fingerprint.digest, None)


def calibrator(**options: Any) -> Calibrator:
    detector = PrematureDetail(ordinary_deficit=0.0)
    return Calibrator(
        Guard(observe_at=(0.06, 0.14), look_again_at=(), probes=3, detector=detector), FINGERPRINT, **options
    )


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
    assert (calibration.images, calibration.observe_at, calibration.probes) == (10, (0.06, 0.14), 3)
    assert calibration.fingerprint == FINGERPRINT
    assert calibration.detector == {name: getattr(made.guard.detector, name) for name in SCORING}
    assert calibration.benign_scores == tuple(scores[7])
    assert calibration.shared_seeds == (0,)  # as of all these records


def looked_at(score: float, *looks: float) -> GuardRecord:
    """A record with later looks."""
    looks_at = ((20 + place, look) for place, look in enumerate(looks))
    values = [StatisticValue(step, "excess_persistence", "noisy", "conditional", look) for step, look in looks_at]
    return replace(record(score), statistics=(*record(score).statistics, *values))


def looking() -> Calibrator:
    detector = PrematureDetail(ordinary_deficit=0.0, persistence_weight=1.0, persistence_limit=2.0)
    return Calibrator(Guard(observe_at=(0.06, 0.14), detector=detector), FINGERPRINT, 0.2)


def test_benign_scores_are_kept_as_the_guard_records_them() -> None:
    """It looks at no image again that cannot rise above the threshold: a drift check compares like with like."""
    made = looking()
    made.update(looked_at(float(n), 0.5) for n in range(10))
    calibration = made.finish()
    at_once = [0.75 * n for n in range(10)]
    threshold = calibration.thresholds[20]
    assert threshold == pytest.approx(at_once[8] + 0.5)
    recorded = [score + 0.5 * (score + 2.0 >= threshold) for score in at_once]
    assert calibration.benign_scores == pytest.approx(recorded)
    assert recorded[0] == 0.0 < recorded[9] == at_once[9] + 0.5


def test_records_without_the_looks_are_refused() -> None:
    """Their scores would be too low, and so the threshold; one that was changed before them is another matter."""
    made = looking()
    with pytest.raises(ValueError, match=r"record without later looks, .* a guard with look_at_all=True"):
        made.update([record(1.0)])
    attempt = Attempt("forget", 1.0, 0, 0.0, 0.0, True, None)
    made.update([looked_at(1.0, 0.5), replace(record(1.0), attempts=(attempt,), outcome="rescued")])


def test_an_image_that_one_look_could_not_score_counts_for_nothing() -> None:
    made = looking()
    made.update([*(looked_at(float(n), 0.5) for n in range(10)), replace(looked_at(1.0, math.nan), verdict="flag")])
    assert made.finish().images == 10


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
            "added_detail": rng.normal(),
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
    guard = Guard(observe_at=(0.14,), look_again_at=(), detector=PrematureDetail(lid_weight=1.0))
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


def seen_by(detector: PrematureDetail, ratio: float, deficit: float) -> GuardRecord:
    """The record of an image that `detector` decides on: with the LID only where it asks for probes."""
    names = ("added_detail", *PROBED)
    free = Observation(7, 256, {names[0]: torch.tensor([ratio])}, (0,))

    def ask(seen: Observation, rows: Any, question: Question) -> Observation:
        lids = {PROBED[1]: torch.tensor([40.0]), PROBED[0]: torch.tensor([40.0 - 256 * deficit])}
        return add_probed(seen, lids, rows, question.lanes)

    (seen,), (score,) = decide(detector, [free], [Question(1, range(0))], ask)
    values = tuple(
        StatisticValue(7, name, "noisy", "both", seen.values[name].item()) for name in names if name in seen.values
    )
    return GuardRecord("pass", "passed", score, 7, 256, values, (), 0, 0, FINGERPRINT.digest, None)


@pytest.mark.parametrize("threshold", [-math.inf, 0.0, math.inf])
def test_the_line_that_benign_images_were_scored_under_does_not_matter(threshold: float) -> None:
    """Who is probed depends on no threshold: scores stay as they were when the calibration moves it.

    And so the rate is the stated one, over many calibrations, though a probe raises every score that it is asked for.
    """
    rng, alpha, n = np.random.default_rng(6), 0.05, 39
    detector = PrematureDetail(threshold=threshold, doubt=0.2, lid_weight=5.0, ordinary_deficit=0.0)
    guard, false = Guard(observe_at=(0.14,), look_again_at=(), detector=detector), 0
    for _ in range(SPLITS):
        ratios, deficits = rng.normal(0.2, 0.3, n + 1).tolist(), rng.gamma(2.0, 0.05, n + 1).tolist()
        *records, fresh = (seen_by(detector, *pair) for pair in zip(ratios, deficits, strict=True))
        made = Calibrator(guard, FINGERPRINT, alpha)
        made.update(records)
        calibrated = made.finish().apply(guard).detector
        again = [seen_by(calibrated, *pair) for pair in zip(ratios, deficits, strict=True)]
        assert again == [*records, fresh]
        probed = [len(record.statistics) == 3 for record in again]
        assert probed == [ratio > 0.2 for ratio in ratios]
        assert [float(calibrated.score(observations_of(record))[0]) for record in again] == [r.score for r in again]
        false += again[-1].score > calibrated.threshold
    exact = (n + 1 - math.ceil((n + 1) * (1 - alpha) - 1e-9)) / (n + 1)
    assert stats.binom.ppf(0.0005, SPLITS, exact) <= false <= stats.binom.ppf(0.9995, SPLITS, exact)


def test_observations_of_a_record() -> None:
    """By step, in their order, probed where the record holds an LID."""
    first, last = observations_of(record(1.0))
    assert (first.step, last.step, first.dimension) == (3, 7, 256)
    assert first.values["added_detail"].tolist() == [0.5]
    assert first.probed == last.probed == dict.fromkeys(PROBED[:2], (0,))
    free = replace(record(1.0), statistics=tuple(v for v in record(1.0).statistics if v.name not in PROBED))
    assert [seen.probed for seen in observations_of(free)] == [{}, {}]


def test_the_chosen_weight_never_saw_the_half_that_sets_the_threshold() -> None:
    """Every other prompt chooses: others in the remaining half move the threshold and nothing else."""
    rng = np.random.default_rng(5)
    benign, memorized = labelled(rng, 40, memorized=False), labelled(rng, 9, memorized=True)
    others = labelled(rng, 40, memorized=True)
    guard = Guard(observe_at=(0.14,), look_again_at=())
    made = [Calibrator(guard, FINGERPRINT, 0.05) for _ in range(2)]
    made[0].update(benign)
    made[1].update(others[place] if place % 2 else each for place, each in enumerate(benign))
    for each in made:
        each.update(memorized, memorized=True)
    plain, changed = (each.finish() for each in made)
    assert plain.detector == changed.detector
    assert plain.thresholds != changed.thresholds


def test_memorized_prompts_that_cannot_choose() -> None:
    @dataclass(frozen=True)
    class Plain:
        threshold: float = 0.0

        def score(self, observations: Any, later: Any = None) -> Any:
            return observations[-1].values["added_detail"]

        def in_doubt(self, observations: Any) -> Any:
            return torch.zeros(len(self.score(observations)), dtype=torch.bool)

    made = Calibrator(Guard(look_again_at=(), detector=Plain()), FINGERPRINT, 0.5)
    with pytest.raises(ValueError, match="Plain has no lid_weight: memorized prompts choose it; calibrate without"):
        made.update([record(1.0)], memorized=True)
    made.update([record(1.0), record(2.0)])
    calibration = made.finish()
    assert calibration.detector == {}
    assert calibration.apply(made.guard).detector == Plain(threshold=2.0)
    with pytest.raises(ValueError, match=r"made for another detector than Plain \(its settings: lid_weight"):
        replace(calibration, detector={"lid_weight": 2.0}).apply(made.guard)


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


SCORING = {
    **{"doubt": 0.2, "undecided": (-0.1, 0.4), "lid_weight": 4.0, "ordinary_deficit": 0.009},
    "agreement_weight": 3.0,
    "persistence_weight": 5.0,
    "persistence_limit": 0.5,
}
CALIBRATION = Calibration(
    fingerprint=FINGERPRINT,
    false_positive_rate=0.1,
    images=20,
    observe_at=(0.1, 0.3),
    look_again_at=(0.4,),
    probes=2,
    other_seeds=3,
    thresholds={5: 1.0, 15: -0.25},
    detector=SCORING,
    benign_scores=(-0.5, 0.25),
    shared_seeds=(2, 2**62),
)


def test_calibrated_guard() -> None:
    """The threshold of the deciding step, and scores as they were; nothing else of the guard is touched."""
    own = Guard(detector=PrematureDetail(threshold=9.0, lid_weight=0.5, doubt=0.1), probes=7, seed=3)
    guard = CALIBRATION.apply(own)
    assert guard.detector == PrematureDetail(threshold=-0.25, **SCORING)
    assert (guard.observe_at, guard.look_again_at) == ((0.1, 0.3), (0.4,))
    assert (guard.probes, guard.other_seeds, guard.seed) == (2, 3, 3)


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
    CALIBRATION.check(FINGERPRINT)
    with pytest.raises(ValueError, match=r"\(steps: 50, not 20; dtype: float32, not float16\)") as caught:
        CALIBRATION.check(replace(FINGERPRINT, steps=20, dtype="float16"))
    assert "\n" not in str(caught.value)


def test_round_trip(tmp_path: Any) -> None:
    CALIBRATION.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == CALIBRATION
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
    bare = replace(CALIBRATION, detector={}, benign_scores=())
    bare.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == bare


def broken(**changes: Any) -> bytes:
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
        broken(thresholds={"5": math.nan}),
        broken(images="missing"),
        broken(probes="missing"),
        broken(detector="missing"),
        broken(detector=3),
        broken(benign_scores="missing"),
        broken(colour="red"),
        broken(observe_at=3),
        broken(observe_at=["late"]),
        broken(probe_at=[0.1]),
        broken(benign_scores=[None]),
        broken(benign_scores=["high"]),
    ],
)
def test_what_is_no_calibration(tmp_path: Any, content: bytes) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"c\.json' is not a calibration file: make one with sd-guard calibrate"
    ) as caught:
        Calibration.load(path)
    assert "\n" not in str(caught.value)


def test_a_threshold_that_is_no_number() -> None:
    with pytest.raises(ValueError, match="threshold=nan"):
        PrematureDetail(threshold=math.nan)


def test_no_such_file(tmp_path: Any) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match="cannot be read: ") as caught:
            Calibration.load(path)
        assert "\n" not in str(caught.value)
