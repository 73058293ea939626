"""Quick depth on a tiny pipeline: it measures what full depth would, for one lane, whatever is screened beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from tiny import SCHEDULERS, CountLanes, build, components
from torch._dynamo.testing import CompileCounter

from sd_guard.bench.base import EVERYBODY, NOBODY
from sd_guard.calibration import Calibrator
from sd_guard.detection import PrematureDetail
from sd_guard.evaluation.metrics import auroc
from sd_guard.fingerprint import take_fingerprint
from sd_guard.guard import Guard, GuardRecord
from sd_guard.lanes import Conditioning, evaluate_lanes
from sd_guard.noise import interpret
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.pipelines.trajectory import denoiser_of
from sd_guard.reference import checkpoint_path, load_truth
from sd_guard.screening.calibrating import score_prompts
from sd_guard.screening.jobs import Job
from sd_guard.screening.loading import load_screener
from sd_guard.screening.quick import FLAGGED, GROUND_SEEDS, KEPT_SEEDS, QuickScreener
from sd_guard.screening.settings import ModelSettings, RunSettings
from sd_guard.statistics.seed_agreement import excess_agreement, other_noise, other_places, step_down
from sd_guard.statistics.sharpness import FAINTEST_CONTROL

MODEL = ModelSettings(model="tiny/random", steps=8)
PROMPTS = [f"a {colour} {thing}" for colour in ("red", "blue", "grey") for thing in ("dog", "cat")]


def guard(detector: Any = EVERYBODY, *, at: float = 0.13, probes: int = 1, other_seeds: int = 0) -> Guard:
    return Guard(observe_at=(at,), probes=probes, other_seeds=other_seeds, detector=detector)


def values(record: GuardRecord) -> dict[tuple[int, str], float]:
    return {(seen.step, seen.name): seen.value for seen in record.statistics}


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return components()


@pytest.fixture
def pipe(parts: dict[str, Any]) -> Any:
    return build(GuardedStableDiffusionPipeline, parts)


@pytest.fixture
def make(pipe: Any) -> Callable[..., QuickScreener]:
    return lambda *own, **options: QuickScreener.make(pipe, MODEL, batch_size=4, guard=guard(*own, **options))


@pytest.fixture
def middling(make: Callable[..., QuickScreener]) -> PrematureDetail:
    """In doubt about the upper half of PROMPTS at seed 0, and flags about half of these."""
    free = sorted(record.score for record in make(NOBODY).measure(PROMPTS, [0] * len(PROMPTS)))
    doubt = (free[2] + free[3]) / 2
    probed = make(replace(EVERYBODY, doubt=doubt)).measure(PROMPTS, [0] * len(PROMPTS))
    return replace(EVERYBODY, threshold=float(np.median([r.score for r in probed])), doubt=doubt)


@pytest.mark.parametrize(
    ("scheduler", "prediction"),
    [*((name, "epsilon") for name in sorted(SCHEDULERS)), ("ddim", "v_prediction"), ("euler", "v_prediction")],
)
def test_the_first_step_is_measured_as_by_full_depth(parts: dict[str, Any], scheduler: str, prediction: str) -> None:
    made = build(GuardedStableDiffusionPipeline, parts, scheduler)
    made.scheduler.register_to_config(prediction_type=prediction)
    settings = guard(at=0.0, probes=2)
    made.enable_guard(settings)
    asked = {"num_inference_steps": 8, "guidance_scale": 7.5}
    full = score_prompts(made, PROMPTS[:2], [5, 7], **asked)
    controls = score_prompts(made, ["", ""], [5, 7], **asked)
    others = [values(each)[0, "detail"] for each in score_prompts(made, [""] * 8, GROUND_SEEDS, **asked)]
    ground = float(np.mean(np.maximum(others, FAINTEST_CONTROL)))
    quick = QuickScreener.make(made, MODEL, guard=settings).measure(PROMPTS[:2], [5, 7])
    for ours, theirs, control in zip(quick, full, controls, strict=True):
        expected = {at: value for at, value in values(theirs).items() if at[0] == 0}
        assert len(expected) == 5
        expected[0, "added_detail"] += math.log(max(values(control)[0, "detail"], FAINTEST_CONTROL) / ground) / 2
        assert values(ours) == pytest.approx(expected, rel=2e-3, abs=2e-3)


def test_other_image_sizes_have_their_own_latents(pipe: Any) -> None:
    pipe.enable_guard(guard(at=0.0))
    size = {"height": 24, "width": 32}
    full = score_prompts(pipe, PROMPTS[:1], [5], num_inference_steps=8, guidance_scale=7.5, **size)
    quick = QuickScreener.make(pipe, replace(MODEL, **size), guard=guard(at=0.0)).measure(PROMPTS[:1], [5])
    assert quick[0].dimension == full[0].dimension == 4 * 12 * 16
    assert values(quick[0])[0, "detail"] == pytest.approx(values(full[0])[0, "detail"], rel=1e-4)


def test_a_later_level_is_reached_as_the_empty_prompt_reaches_it(pipe: Any) -> None:
    pipe.enable_guard(guard(at=0.13))
    full = score_prompts(pipe, [""], [5], num_inference_steps=8, guidance_scale=7.5)[0]
    quick = QuickScreener.make(pipe, MODEL, guard=guard(at=0.13)).measure([""], [5])[0]
    assert quick.decided_at_step == 1
    assert values(quick)[1, "detail"] == pytest.approx(values(full)[1, "detail"], rel=1e-3)


def test_a_prompt_costs_one_lane_and_one_more_a_probe(
    make: Callable[..., QuickScreener], middling: PrematureDetail
) -> None:
    screener, seeds = make(middling), [0] * len(PROMPTS)
    screener.measure(PROMPTS, seeds)  # the first batch measures the ground, with seeds that are kept
    screener.cache.clear()
    with CountLanes(screener.pipe.unet) as first:
        records = screener.measure(PROMPTS, seeds)
    with CountLanes(screener.pipe.unet) as again:
        assert screener.measure(PROMPTS, seeds) == records
    probed = [(1, "trajectory_lid") in values(record) for record in records]
    assert sum(probed) == 3
    assert [record.extra_lanes for record in records] == [2 if doubtful else 1 for doubtful in probed]
    assert {shape[0] for shape in first.shapes + again.shapes} == {4}  # six prompts: two calls, and one of probes
    assert (len(first.shapes), len(again.shapes)) == (3 + 3, 3)  # the seed's control, once: first step, level, probe


def test_another_seed_costs_one_lane_and_shows_what_the_prompt_brings(
    make: Callable[..., QuickScreener], middling: PrematureDetail
) -> None:
    """From the other seeds' own noise, one step down without a prompt, and there with it."""
    screener, seeds = make(middling, probes=0, other_seeds=2), [0] * len(PROMPTS)
    records = screener.measure(PROMPTS, seeds)
    with CountLanes(screener.pipe.unet) as again:
        assert screener.measure(PROMPTS, seeds) == records
    compared = [(1, "excess_agreement") in values(record) for record in records]
    assert sum(compared) == 3
    assert [record.extra_lanes for record in records] == [3 if doubtful else 1 for doubtful in compared]
    assert len(again.shapes) == 2 + 2
    row = compared.index(True)
    model, own = denoiser_of(screener.pipe, [0]), 0x9E3779B97F4A7C15 * (screener.guard.seed + 1) % 2**64
    text = screener.pipe.encode_prompt([PROMPTS[row]], "cpu", 1, False)[0]
    (first, high), (seen, low) = other_places(model.alphas_cumprod)
    control, place = screener.cache[0], screener.observed[0]
    found = []
    for number in range(2):
        x = other_noise([own], control.x[:, 0], number)
        ahead = interpret(evaluate_lanes(model.unet, x, first, Conditioning(screener.empty)), x, high, "epsilon")
        x = step_down(ahead, low)
        found.append(interpret(evaluate_lanes(model.unet, x, seen, Conditioning(text)), x, low, "epsilon").x0_hat)
    output = evaluate_lanes(model.unet, control.x[:, 0], place.timestep, Conditioning(text))
    shown, without = (
        interpret(each, control.x[:, 0], place.level, "epsilon").x0_hat for each in (output, control.output[:, 0])
    )
    expected = torch.stack([excess_agreement(shown, without, other, place.level) for other in found]).mean()
    assert values(records[row])[1, "excess_agreement"] == pytest.approx(float(expected), rel=1e-3, abs=1e-4)


def test_levels_are_averaged_and_no_probe_is_spent_where_none_is_allowed(pipe: Any) -> None:
    settings = Guard(observe_at=(0.0, 0.25), look_again_at=(), probes=0, other_seeds=0, detector=EVERYBODY)
    record = QuickScreener.make(pipe, MODEL, guard=settings).measure(PROMPTS[:1], [0])[0]
    added = [values(record)[step, "added_detail"] for step in (0, 2)]
    assert record.score == pytest.approx(np.mean(added), rel=1e-5)
    assert (record.extra_lanes, len(values(record))) == (2, 6)


def test_a_row_has_the_same_bits_whatever_is_beside_it(
    make: Callable[..., QuickScreener], middling: PrematureDetail
) -> None:
    prompts, seeds = PROMPTS + PROMPTS[:3], [0] * len(PROMPTS) + [1, 2, 1]
    together = make(middling).measure(prompts, seeds)
    assert {record.extra_lanes for record in together} == {1, 2}
    backwards = make(middling).measure(prompts[::-1], seeds[::-1])[::-1]
    screener = make(middling)
    alone = [screener.measure([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert together == backwards == alone


def test_a_seed_whose_control_is_not_finite_harms_no_other(make: Callable[..., QuickScreener]) -> None:
    """Not even where it is one of those that the ground is measured by."""
    screener = make(NOBODY)
    evaluate = QuickScreener._evaluate_controls

    def broken(self: QuickScreener, seeds: Any) -> Any:
        control = evaluate(self, seeds)
        for row, seed in enumerate(seeds):
            if seed == GROUND_SEEDS[3]:
                control.output[row] = math.nan
        return control

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuickScreener, "_evaluate_controls", broken)
        records = screener.measure(PROMPTS[:2], [GROUND_SEEDS[3], 40])
    assert [record.verdict for record in records] == ["unscored", "pass"]


def test_nothing_is_evaluated_before_the_first_batch(make: Callable[..., QuickScreener]) -> None:
    """So that a model that fails fails as on any batch, with a reason in the row."""
    with CountLanes(make(NOBODY).pipe.unet) as lanes:
        make(NOBODY)
    assert lanes.rows == 0


def test_more_seeds_than_are_kept_give_the_same_records(make: Callable[..., QuickScreener]) -> None:
    screener, seeds = make(), list(range(KEPT_SEEDS + 3))
    prompts = ["a red dog"] * len(seeds)
    records = screener.measure(prompts, seeds)
    assert len({record.score for record in records}) == len(seeds)
    assert list(screener.cache) == seeds[3:]
    assert screener.measure(prompts[::-1], seeds[::-1])[::-1] == records


def test_flagged_rows_are_neither_mitigated_nor_blocked(
    make: Callable[..., QuickScreener], middling: PrematureDetail
) -> None:
    screener = make(middling)
    jobs = [Job(10 + place, prompt, "f", 0) for place, prompt in enumerate(PROMPTS)]
    screened = screener.screen(jobs)
    assert not screened.images
    assert [(row["index"], row["prompt"], row["family"]) for row in screened.rows] == [
        (job.index, job.prompt, "f") for job in jobs
    ]
    assert {row["flagged"] for row in screened.rows} == {True, False}
    for row in screened.rows:
        assert row["score"] is not None
        assert row["flagged"] == (row["score"] > middling.threshold)
        assert row["outcome"] == (FLAGGED if row["flagged"] else "passed")
        assert (row["image"], row["decided_at_step"], row["attempts"]) == (None, 1, [])
    assert screener.threshold == middling.threshold


def test_an_output_that_is_not_finite_is_unscored_and_harms_no_other_row(
    make: Callable[..., QuickScreener], parts: dict[str, Any]
) -> None:
    clean = make(NOBODY)
    expected = clean.measure(PROMPTS[:4], [0] * 4)

    def spoil(module: Any, arguments: Any, output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        output[0][2] = math.nan
        return output

    hook = parts["unet"].register_forward_hook(spoil)
    try:
        rows = clean.screen([Job(place, prompt, None, 0) for place, prompt in enumerate(PROMPTS[:4])]).rows
    finally:
        hook.remove()
    assert [row["outcome"] for row in rows] == ["passed", "passed", "unscored", "passed"]
    assert (rows[2]["score"], rows[2]["flagged"], rows[2]["decided_at_step"]) == (None, False, None)
    assert rows[2]["reason"] == "the UNet's output was not finite"
    assert [row["score"] for row in rows if row["score"] is not None] == [expected[place].score for place in (0, 1, 3)]


def test_a_calibration_of_quick_depth_sets_the_threshold_and_one_of_full_depth_is_refused(pipe: Any) -> None:
    screener = QuickScreener.make(pipe, MODEL, guard=guard())
    calibrator = Calibrator(screener.guard, screener.fingerprint, false_positive_rate=0.2)
    calibrator.update(screener.measure(PROMPTS, [0] * len(PROMPTS)))
    calibration = calibrator.finish()
    calibrated = QuickScreener.make(pipe, MODEL, guard=guard(), calibration=calibration)
    scores = sorted(record.score for record in screener.measure(PROMPTS, [0] * len(PROMPTS)))
    assert calibrated.threshold == pytest.approx(scores[-1])
    full = take_fingerprint(pipe, steps=MODEL.steps, guidance_scale=MODEL.guidance_scale)
    with pytest.raises(ValueError, match="another configuration"):
        QuickScreener.make(pipe, MODEL, calibration=replace(calibration, fingerprint=full))


def test_a_model_that_was_distilled_for_guidance_is_refused() -> None:
    distilled = build(GuardedStableDiffusionPipeline, components(time_cond_proj_dim=8))
    with pytest.raises(ValueError, match="quick depth has none; use --depth full"):
        QuickScreener.make(distilled, MODEL)


def test_the_default_tells_memorized_prompts_of_the_bundled_checkpoint() -> None:
    pipe = GuardedStableDiffusionPipeline.from_pretrained(
        checkpoint_path(), local_files_only=True, use_safetensors=True
    )
    rows = [row for row in load_truth() if row["split"] == "tune"]
    rows = [row for row in rows if row["family"] != "novel"] + [row for row in rows if row["family"] == "novel"][:32]
    records = QuickScreener.make(pipe, ModelSettings(model=str(checkpoint_path()))).measure(
        [row["prompt"] for row in rows], [0] * len(rows)
    )
    memorized = np.array([row["family"] in ("verbatim", "template") for row in rows])
    flagged = np.array([record.verdict == "flag" for record in records])
    assert auroc(np.array([record.score for record in records]), memorized) > 0.99
    assert flagged[memorized].mean() > 0.9
    assert flagged[~memorized].mean() < 0.1


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_a_compiled_unet_has_one_graph_whoever_is_in_doubt(scheduler: str) -> None:
    torch._dynamo.reset()
    counter, pipe = CompileCounter(), build(GuardedStableDiffusionPipeline, components(), scheduler)
    pipe.unet.compile(backend=counter)
    for doubtful, seeds in ((NOBODY, [0]), (EVERYBODY, [1, 2])):
        screener = QuickScreener.make(pipe, MODEL, batch_size=4, guard=guard(doubtful, other_seeds=2))
        screener.measure(PROMPTS, (seeds * len(PROMPTS))[: len(PROMPTS)])
        screener.measure(PROMPTS[:3], [3] * 3)
    assert counter.frame_count == 1


@pytest.mark.parametrize("offloaded", [False, True])
def test_weights_can_be_differentiated_through_afterwards(offloaded: bool) -> None:
    """In inference mode nothing is kept for that; weights that are moved by turns would stay so."""
    pipe = build(GuardedStableDiffusionPipeline, components())
    if offloaded:
        cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    QuickScreener.make(pipe, MODEL, batch_size=4, guard=guard(EVERYBODY, other_seeds=1)).measure(PROMPTS, [0] * 6)
    x = torch.zeros(1, 4, 8, 8, requires_grad=True)
    pipe.unet(x, 500, torch.zeros(1, 16, 32)).sample.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("compiled", [False, True])
def test_quick_depth_loads_a_unet_in_the_layout_of_convolutions(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counter, compile_module = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend=counter))
    jobs = [Job(index, prompt, "-", 0) for index, prompt in enumerate(PROMPTS)]
    found = {}
    for depth in ("quick", "full"):
        model = ModelSettings(model=str(checkpoint_path()), steps=8, device="cpu")
        own = compiled and depth == "quick"
        settings = RunSettings(prompts="-", out=tmp_path / "run", model=model, depth=depth, compile=own)
        screener = load_screener(settings)
        weight = screener.pipe.unet.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == (depth == "quick")
        found[depth] = screener
    plain = QuickScreener.make(found["full"].pipe, MODEL)
    scores = [row["score"] for row in found["quick"].screen(jobs).rows]
    expected = [row["score"] for row in plain.screen(jobs).rows]
    assert scores == pytest.approx(expected, abs=1e-3)
    assert counter.frame_count == compiled


def test_the_texts_of_the_next_batch_are_encoded_beside_this_one_and_its_rows_are_the_same(
    make: Callable[..., QuickScreener], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (
        [Job(place, prompt, None, 0) for place, prompt in enumerate(part)] for part in (PROMPTS, PROMPTS[:4])
    )
    screener = make()
    expected = [screener.screen(batch).rows for batch in (first, second)]
    asked: list[list[str]] = []
    encode_prompt = screener.pipe.encode_prompt
    monkeypatch.setattr(
        screener.pipe, "encode_prompt", lambda prompts, *a: asked.append(list(prompts)) or encode_prompt(prompts, *a)
    )
    screener.expect(second)
    found = [screener.screen(first).rows]
    known = len(asked)
    found.append(screener.screen(second).rows)
    assert found == expected
    assert PROMPTS[:4] in asked[:known]
    assert len(asked) == known
