"""Calibrating a tiny pipeline: its scores are those of whole calls, at a fraction of them, and nothing done is lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CountLanes, build, components, seeded

from sd_guard.calibration import Calibration, Calibrator
from sd_guard.detection import PrematureDetail
from sd_guard.fingerprint import take_fingerprint
from sd_guard.guard import Guard
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.reference import checkpoint_path
from sd_guard.screening.calibrating import CalibrationSettings, calibrate, plan_calibration, score_prompts
from sd_guard.screening.quick import QuickScreener
from sd_guard.screening.settings import ModelSettings

STEPS = 8
GUARD = Guard(
    look_again_at=(0.5,),
    observe_at=(0.13, 0.25),
    probes=1,
    other_seeds=1,
    detector=PrematureDetail(threshold=-math.inf, doubt=-math.inf, undecided=(-math.inf, math.inf)),
)
BENIGN = [f"a {colour} {thing}" for colour in ("red", "blue", "grey") for thing in ("dog", "cat", "ring")]


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return components()


class Killed(GuardedStableDiffusionPipeline):
    """Is interrupted when it has made `calls` calls; counts them and what they were asked."""

    calls = 0
    left = 10**6

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.calls += 1
        return super().__call__(*args, **kwargs)


@pytest.fixture
def make(parts: dict[str, Any]) -> Callable[..., Any]:
    """Makes the pipeline, killed after so many calls."""

    def make(left: int = 10**6) -> Any:
        pipe = build(Killed, parts)
        pipe.left = left
        pipe.enable_guard(GUARD)
        return pipe

    return make


@pytest.fixture
def settings(tmp_path: Path) -> CalibrationSettings:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text("{}")
    prompts = tmp_path / "benign.txt"
    prompts.write_text("\n".join(BENIGN))
    return CalibrationSettings(
        prompts=prompts,
        out=tmp_path / "calibration.json",
        model=ModelSettings(model=str(model), steps=STEPS),
        false_positive_rate=0.1,
        batch_size=4,
    )


def with_memorized(settings: CalibrationSettings) -> CalibrationSettings:
    memorized = settings.out.parent / "memorized.txt"
    memorized.write_text("the podcast\nthe hippo\n")
    return replace(settings, memorized=memorized, false_positive_rate=0.25)


def test_scores_are_those_of_whole_calls_at_a_fraction_of_them(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, prompts = make(), BENIGN[:2]
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 5.0}
    pipe.enable_guard(GUARD.with_policy(max_attempts=0))
    whole = pipe(prompt=prompts, generator=seeded(7, 8), output_type="latent", **arguments).records
    pipe.enable_guard(GUARD)
    monkeypatch.setattr(pipe.vae, "decode", lambda *_, **__: pytest.fail("decoded"))
    with CountLanes(pipe.unet) as counted:
        records = score_prompts(pipe, prompts, [7, 8], **arguments)
    # Two lanes at steps 0 to 4, the second look; a probe and another seed in two each.
    assert counted.rows == 2 * (2 * 5 + 4)
    for record, expected in zip(records, whole, strict=True):
        assert record.statistics == expected.statistics
        assert record.score == expected.score
        assert math.isfinite(record.score)
        assert (record.outcome, record.attempts, record.seed) == ("kept", (), expected.seed)
    assert pipe.guard == GUARD


def test_who_is_probed_does_not_depend_on_the_threshold(make: Any) -> None:
    """Nor does a score: what a calibration is made from is what the calibrated guard will see."""
    pipe, prompts, seeds = make(), BENIGN[:4], range(4)

    def scored(threshold: float, doubt: float) -> Any:
        detector = PrematureDetail(threshold=threshold, doubt=doubt, undecided=(-math.inf, math.inf))
        pipe.enable_guard(replace(GUARD, detector=detector, look_again_at=()))  # doubt is of the first look
        with CountLanes(pipe.unet) as counted:
            return score_prompts(pipe, prompts, seeds, num_inference_steps=STEPS), counted.rows

    free, plain = scored(math.inf, math.inf)
    ordered = sorted(record.score for record in free)
    doubt = ordered[1]  # the two above
    inside = [record.score > doubt for record in free]
    assert sum(inside) == 2
    first, rows = scored(-math.inf, doubt)
    assert rows == plain + 2 * GUARD.lanes_in_doubt
    for threshold in (ordered[1], math.inf):
        records, _ = scored(threshold, doubt)
        assert [r.score for r in records] == [r.score for r in first]
        assert [r.statistics for r in records] == [r.statistics for r in first]
    for record, before, doubtful in zip(first, free, inside, strict=True):
        assert any("lid" in value.name for value in record.statistics) == doubtful
        assert (record.score != before.score) == doubtful
        assert record.extra_lanes == GUARD.lanes_in_doubt * doubtful


def test_a_call_after_an_early_end_is_whole_again(make: Any) -> None:
    pipe = make()
    pipe.disable_guard()
    before = pipe("x", num_inference_steps=STEPS, generator=seeded(1), output_type="latent").images
    pipe.enable_guard(GUARD)
    score_prompts(pipe, ["x"], [1], num_inference_steps=STEPS)
    pipe.disable_guard()
    after = pipe("x", num_inference_steps=STEPS, generator=seeded(1), output_type="latent").images
    assert torch.equal(before, after)


@pytest.mark.parametrize("labelled", [False, True])
def test_the_calibration_is_that_of_the_records(
    settings: CalibrationSettings, make: Any, labelled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = with_memorized(settings) if labelled else settings
    calibration = calibrate(plan_calibration(settings), lambda _: make())
    pipe = make()
    fingerprint = take_fingerprint(pipe, steps=STEPS, guidance_scale=7.5)
    calibrator = Calibrator(GUARD, fingerprint, settings.false_positive_rate)
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 7.5}
    prompts = [*BENIGN, "the podcast", "the hippo"][: 11 if labelled else 9]
    records = [
        record
        for start in range(0, len(prompts), 4)
        for batch in [prompts[start : start + 4]]
        for record in score_prompts(pipe, batch, range(start, start + len(batch)), **arguments)
    ]
    calibrator.update(records[:9])
    calibrator.update(records[9:], memorized=True)
    assert calibration == calibrator.finish() == Calibration.load(settings.out)
    assert calibration.images == (4 if labelled else 9)
    assert not settings.partial.exists()
    bar = capsys.readouterr().err
    assert "calibrating: 100%" in bar
    assert f"{len(prompts)}/{len(prompts)}" in bar
    guarded = make()
    unmitigated = guarded.guard.with_policy(max_attempts=0)  # what is changed has no second look of its own
    guarded.enable_guard(unmitigated, calibration=calibration)
    again = guarded(BENIGN, num_inference_steps=STEPS, generator=seeded(*range(9)), output_type="latent").records
    scores = sorted(record.score for record in again)
    if not labelled:  # the largest of nine is the threshold at 10 %, up to the rounding of another batch size
        assert scores == pytest.approx(calibration.benign_scores, abs=1e-3)
        assert calibration.thresholds[4] == pytest.approx(scores[-1], abs=1e-3)
    with pytest.raises(ValueError, match="made for another configuration"):
        guarded("x", num_inference_steps=STEPS + 1)


def test_of_quick_depth(settings: CalibrationSettings, make: Any) -> None:
    """The threshold is that of quick scores, at the seeds that a run has; the screening of that depth takes it."""
    settings = replace(settings, depth="quick", seed=5)
    plan = plan_calibration(settings)
    assert {job.seed for job in plan.jobs} == {5}
    pipe = make()
    calibration = calibrate(plan, lambda _: pipe)
    assert pipe.calls == 0  # nothing was sampled
    screener = QuickScreener.make(pipe, settings.model, batch_size=4, calibration=calibration)
    scores = [record.score for record in screener.measure(BENIGN, [5] * len(BENIGN))]
    assert calibration.benign_scores == pytest.approx(sorted(scores), abs=1e-3)
    assert screener.threshold == pytest.approx(max(scores), abs=1e-3)
    with pytest.raises(ValueError, match="made for another configuration"):
        calibration.check(take_fingerprint(pipe, steps=STEPS, guidance_scale=7.5))


@pytest.mark.parametrize("kill_at", [0, 1, 2])
@pytest.mark.parametrize("batch_size", [4, 2])
def test_killed_work_resumes_and_repeats_only_the_batch_in_flight(
    settings: CalibrationSettings, make: Any, kill_at: int, batch_size: int
) -> None:
    whole = calibrate(plan_calibration(replace(settings, out=settings.out.with_name("whole.json"))), lambda _: make())
    with pytest.raises(KeyboardInterrupt):
        calibrate(plan_calibration(settings), lambda _: make(kill_at))
    assert not settings.out.exists()
    with pytest.raises(ValueError, match="holds unfinished work; add --resume"):
        plan_calibration(settings)
    again = make()
    resumed = replace(settings, batch_size=batch_size)
    calibration = calibrate(plan_calibration(resumed, resume=True), lambda _: again)
    assert again.calls == math.ceil((9 - 4 * kill_at) / batch_size)
    assert calibration.benign_scores == pytest.approx(whole.benign_scores, abs=1e-3)
    if batch_size == 4:
        assert calibration == whole
    assert not settings.partial.exists()


def test_an_end_that_was_cut_off_after_the_file_was_written(settings: CalibrationSettings, make: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrate(plan_calibration(settings), lambda _: make(2))
    settings.out.write_text("of the work that was cut off")
    with pytest.raises(ValueError, match="exists already; name another file"):
        plan_calibration(settings)
    calibration = calibrate(plan_calibration(settings, resume=True), lambda _: make())
    assert Calibration.load(settings.out) == calibration


def test_resuming_refuses_other_settings_and_says_which(settings: CalibrationSettings, make: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrate(plan_calibration(settings), lambda _: make(1))
    changed = replace(settings, seeds=2, model=replace(settings.model, steps=10))
    with pytest.raises(ValueError, match=r"started otherwise \(steps was 8, now 10, seeds was 1, now 2\)"):
        plan_calibration(changed, resume=True)
    settings.prompts.write_text("\n".join([*BENIGN, "another"]))
    with pytest.raises(ValueError, match="prompts was"):
        plan_calibration(settings, resume=True)
    (settings.partial / "settings.json").write_text("[")
    with pytest.raises(ValueError, match=r"cannot be gone on with .*; remove it"):
        plan_calibration(settings, resume=True)


def test_damaged_work_is_named(settings: CalibrationSettings, make: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrate(plan_calibration(settings), lambda _: make(1))
    (shard,) = settings.partial.glob("0*.json")
    shard.write_text('{"0": {"score": 1}}')
    with pytest.raises(ValueError, match=rf"{shard.name}: is damaged .*; remove it and resume"):
        calibrate(plan_calibration(settings, resume=True), lambda _: make())
    shard.unlink()
    assert calibrate(plan_calibration(settings, resume=True), lambda _: make()).images == 9


def test_a_model_that_raises_is_one_line_and_loses_nothing(settings: CalibrationSettings, make: Any) -> None:
    pipe = make(1)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory\nsecond line")

    plan = plan_calibration(settings)
    with pytest.raises(KeyboardInterrupt):
        calibrate(plan, lambda _: pipe)
    pipe.left, pipe.encode_prompt = 9, broken
    with pytest.raises(
        ValueError, match=r"4 images could not be scored \(RuntimeError: CUDA out of memory\)"
    ) as caught:
        calibrate(plan_calibration(settings, resume=True), lambda _: pipe)
    assert "\n" not in str(caught.value)
    assert pipe.guard == GUARD
    assert len(json.loads((settings.partial / "00000000.json").read_text())) == 4


def test_images_have_seeds_of_their_own(settings: CalibrationSettings) -> None:
    prompts = settings.prompts.with_suffix(".csv")
    prompts.write_text("prompt,seed\nx,\ny,70\nz,\nx,\n")
    plan = plan_calibration(replace(settings, prompts=prompts, seeds=2, seed=5, false_positive_rate=0.25))
    jobs = [(job.index, job.prompt, job.seed) for job in plan.jobs]
    assert jobs == [(0, "x", 5), (1, "x", 6), (2, "y", 70), (3, "y", 71), (4, "z", 9), (5, "z", 10)]
    assert plan.benign == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"false_positive_rate": 0.01}, r"has 9 different prompts, .* 0\.01 needs at least 99; add prompts"),
        ({"false_positive_rate": 0.01, "memorized": True}, r"needs at least 198 with --memorized, half of them"),
        ({"false_positive_rate": 0.0}, "--false-positive-rate is 0.0; use a number above 0 and below 1"),
        ({"false_positive_rate": math.nan}, "--false-positive-rate is nan"),
        ({"depth": "auto"}, "--depth is 'auto'; use full, also for --depth auto, or quick"),
        ({"seeds": 0}, "--seeds is 0; use a whole number >= 1"),
        ({"batch_size": 0}, "--batch-size is 0; use a whole number >= 1"),
        ({"seed": -1}, "--seed is -1; use a number from 0"),
        ({"seed": 2**63 - 1}, "would exceed"),
        ({"out": Path("/none/at/all.json")}, "/none/at: no such folder; make it first"),
        ({"prompts": Path("none.txt")}, "none.txt: no such file"),
    ],
)
def test_what_cannot_be_calibrated_is_said_before_anything_is_made(
    settings: CalibrationSettings, changes: dict[str, Any], message: str
) -> None:
    if changes.get("memorized"):
        changes = changes | {"memorized": with_memorized(settings).memorized}
    with pytest.raises(ValueError, match=message) as caught:
        plan_calibration(replace(settings, **changes))
    assert "\n" not in str(caught.value)
    assert not settings.partial.exists()


def test_a_prompt_on_both_lists(settings: CalibrationSettings) -> None:
    settings = with_memorized(settings)
    settings.memorized.write_text("the podcast\na blue cat\n")
    with pytest.raises(ValueError, match=r"memorized\.txt: 'a blue cat' is also in .*benign\.txt"):
        plan_calibration(settings)


def test_a_list_whose_labels_say_otherwise(settings: CalibrationSettings) -> None:
    """A labelled list for an evaluation holds memorized prompts, too: they are no benign ones."""
    labelled = settings.prompts.with_suffix(".csv")
    labelled.write_text("prompt,family\n" + "\n".join(f"{prompt},TM" for prompt in BENIGN[:2]) + "\nthe hippo,\n")
    told = r"benign\.csv: 2 of 3 prompts are template by their family; keep benign ones alone, and give"
    with pytest.raises(ValueError, match=told):
        plan_calibration(replace(settings, prompts=labelled))
    plain = settings.prompts.with_name("known.csv")
    plain.write_text("prompt,family\nthe hippo,plain\nthe podcast,VM\nthe rose,novel\n")
    with pytest.raises(
        ValueError, match=r"known\.csv: 2 of 3 prompts are novel, plain by their family; keep memorized"
    ):
        plan_calibration(replace(settings, memorized=plain, false_positive_rate=0.25))
    assert not settings.partial.exists()


def test_labels_that_say_the_same_or_nothing_are_taken(settings: CalibrationSettings) -> None:
    labelled = settings.prompts.with_suffix(".csv")
    labelled.write_text(
        "prompt,family\n" + "\n".join(f"{prompt},{'novel' if 'd' in prompt else 'mine'}" for prompt in BENIGN)
    )
    known = settings.prompts.with_name("known.csv")
    known.write_text("prompt,family\nthe hippo,VM\nthe podcast,\n")
    settings = replace(settings, prompts=labelled, memorized=known, false_positive_rate=0.25)
    assert len(plan_calibration(settings).jobs) == len(BENIGN) + 2


def test_a_calibration_is_not_made_with_one(settings: CalibrationSettings) -> None:
    settings.out.write_bytes((checkpoint_path() / "calibration.json").read_bytes())
    with pytest.raises(ValueError, match="a calibration is made without one; leave --calibration out"):
        replace(settings, model=replace(settings.model, calibration=settings.out))


def test_a_file_that_exists_is_left_alone(settings: CalibrationSettings) -> None:
    settings.out.write_text("mine")
    for resume in (False, True):
        with pytest.raises(ValueError, match="exists already; name another file"):
            plan_calibration(settings, resume=resume)
    assert settings.out.read_text() == "mine"
