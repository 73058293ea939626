"""One guarded call: what it scores, what it cannot score, and what it pays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import EVERYBODY, NOBODY, CountLanes, build, seeded, watching

from sd_guard.detection import PrematureDetail
from sd_guard.mitigation import DelayedGuidance
from sd_guard.observation import PROBED
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline

STEPS = 6
PROMPTS = ["a dog on the moon", "blue"]


def call(pipe: Any, prompts: Any = None, **arguments: Any) -> Any:
    arguments = {"generator": seeded(1, 2), "num_inference_steps": STEPS, "output_type": "latent"} | arguments
    return pipe(PROMPTS if prompts is None else prompts, **arguments)


def values(record: Any) -> dict[tuple[int, str], float]:
    return {(value.step, value.name): value.value for value in record.statistics}


def asked(record: Any) -> set[tuple[int, str]]:
    return {key for key in values(record) if key[1] in PROBED}


def test_record(guarded: Any) -> None:
    pipe = guarded(watching(doubt=EVERYBODY))
    output = call(pipe)
    for row, record in enumerate(output.records):
        assert (record.verdict, record.outcome, record.reason) == ("pass", "passed", None)
        assert (record.decided_at_step, record.dimension, record.extra_lanes) == (3, 256, 2)
        assert record.seed == row + 1
        assert record.attempts == ()
        assert {(v.step, v.name, v.point, v.lane) for v in record.statistics} >= {
            (1, "added_detail", "noisy", "conditional-control"),
            (3, "added_detail", "noisy", "conditional-control"),
            (3, "trajectory_lid", "noisy", "conditional"),
            (3, "trajectory_lid_control", "noisy", "control"),
        }
        assert {step for step, _ in asked(record)} == {3}
        assert all(math.isfinite(value.value) for value in record.statistics)
    assert call(pipe, generator=None).records[0].seed is None
    assert [r.seed for r in call(pipe, generator=torch.Generator().manual_seed(8)).records] == [8, 8]


def test_without_doubt_a_call_costs_nothing(guarded: Any) -> None:
    """Not a UNet call more than plain sampling makes; an image that was not probed has no LID in its record."""
    pipe = guarded(watching(probes=5))
    with CountLanes(pipe.unet) as count:
        output = call(pipe)
    assert count.shapes == [(4, 4, 8, 8)] * STEPS
    for record in output.records:
        assert record.extra_lanes == 0
        assert {step for step, _ in values(record)} == {1, 3}
        assert asked(record) == set()


@pytest.mark.parametrize(("probes", "other_seeds"), [(0, 0), (1, 0), (3, 0), (0, 1), (1, 2)])
def test_only_images_in_doubt_are_probed_and_billed(guarded: Any, probes: int, other_seeds: int) -> None:
    """And with no probes and no other seeds allowed, none is."""
    options = {"probes": probes, "other_seeds": other_seeds}
    pipe = guarded(watching(doubt=EVERYBODY, **options))
    scores = [record.score for record in call(pipe).records]
    doubtful = int(scores[1] > scores[0])
    pipe.enable_guard(watching(doubt=(min(scores), math.inf), **options))
    with CountLanes(pipe.unet) as count:
        output = call(pipe)
    assert count.rows == 2 * 2 * STEPS + 2 * (probes + other_seeds)
    assert len(count.shapes) == STEPS + math.ceil(probes / 2) + 2 * other_seeds
    for row, record in enumerate(output.records):
        own = row == doubtful and probes + other_seeds > 0
        assert record.extra_lanes == 2 * (probes + other_seeds) * own
        assert bool(asked(record)) == own
        assert record.score == scores[row]


def test_probes_do_not_depend_on_batchmates(guarded: Any) -> None:
    """An image with its own generator is scored alike alone, in company, and at another place of the batch."""
    pipe = guarded(watching(doubt=EVERYBODY, other_seeds=1))
    together = call(pipe)
    assert [len(asked(record)) for record in together.records] == [3, 3]
    for row in range(2):
        alone = call(pipe, PROMPTS[row], generator=seeded(row + 1))
        assert values(alone.records[0]).keys() == values(together.records[row]).keys()
        for key, value in values(alone.records[0]).items():
            assert value == pytest.approx(values(together.records[row])[key], rel=2e-3, abs=2e-3), key
    swapped = call(pipe, PROMPTS[::-1], generator=seeded(2, 1))
    assert swapped.records[0].score == pytest.approx(together.records[1].score, abs=1e-4)
    for key in asked(together.records[1]):
        assert values(swapped.records[0])[key] == pytest.approx(values(together.records[1])[key], rel=2e-3, abs=2e-3)


def test_an_image_is_probed_alike_whoever_else_is_in_doubt(guarded: Any) -> None:
    pipe = guarded(watching(doubt=EVERYBODY))
    together = call(pipe).records
    low, high = sorted(range(2), key=lambda row: together[row].score)
    for doubt, row in (((together[low].score, math.inf), high), ((-math.inf, together[high].score), low)):
        pipe.enable_guard(watching(doubt=doubt))
        records = call(pipe).records
        assert [bool(asked(record)) for record in records] == [index == row for index in range(2)]
        for key in asked(together[row]):
            assert values(records[row])[key] == pytest.approx(values(together[row])[key], rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("given", ["text", "embeddings"])
def test_a_negative_prompt_buys_no_pass(guarded: Any, given: str) -> None:
    """The prompt as its own negative prompt: guidance has no effect, and the score stays that of the empty control."""
    pipe = guarded(watching(observe_at=(0.0,), other_seeds=1, doubt=EVERYBODY))  # later the trajectories differ
    expected = call(pipe)
    if given == "text":
        output = call(pipe, negative_prompt=PROMPTS)
    else:
        embeds = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
        output = call(pipe, negative_prompt_embeds=embeds)
    for with_negative, without in zip(output.records, expected.records, strict=True):
        assert abs(without.score) > 1e-3
        assert len(asked(with_negative)) == len(asked(without)) == 3
        assert with_negative.score == pytest.approx(without.score, abs=1e-5)
        for key, value in values(without).items():  # whatever a detector makes of them
            assert values(with_negative)[key] == pytest.approx(value, rel=1e-3, abs=0.02), key
        assert with_negative.extra_lanes == without.extra_lanes + 1  # the control is the guard's to pay


@pytest.mark.parametrize("call_arguments", [{}, {"guidance_scale": 1.0}, {"negative_prompt": ["a cat", ""]}])
def test_control_lane_is_evaluated_and_counted(guarded: Any, call_arguments: dict[str, Any]) -> None:
    pipe = guarded(watching(observe_at=(0.0, 0.2, 0.5), doubt=EVERYBODY, probes=2))
    with CountLanes(pipe.unet) as count:
        output = call(pipe, **call_arguments)
    own = STEPS * (1 if call_arguments.get("guidance_scale") else 2)
    assert count.rows == 2 * own + sum(record.extra_lanes for record in output.records)
    assert [record.extra_lanes for record in output.records] == [4 + (3 if call_arguments else 0)] * 2
    first = call(guarded(watching(observe_at=(0.0,))))
    for record, expected in zip(output.records, first.records, strict=True):
        for name in ("detail", "added_detail", "cfg_norm"):  # before the first step all calls are at one latent
            assert values(record)[0, name] == pytest.approx(values(expected)[0, name], rel=1e-4, abs=1e-5)


def test_a_probe_of_all_images_has_the_shape_of_the_guided_call(guarded: Any) -> None:
    pipe = guarded(watching(doubt=EVERYBODY))
    with CountLanes(pipe.unet) as count:
        call(pipe)
    assert set(count.shapes) == {(4, 4, 8, 8)}
    assert len(count.shapes) == STEPS + 1


@contextmanager
def broken(
    unet: torch.nn.Module, images: int, row: int, value: float, *, rows: int, calls: Sequence[int] | None = None
) -> Iterator[None]:
    """Makes the UNet return `value` for one image of `images`, in every call of so many rows, or only in `calls`."""
    number = itertools.count()

    def spoil(_module: Any, _inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        sample, own = output[0].clone(), next(number)
        if sample.shape[0] == rows and (calls is None or own in calls):
            sample[row::images] = value
        return (sample,)

    hook = unet.register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("doubt", [NOBODY, EVERYBODY])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 1])
def test_what_is_not_finite_is_unscored(
    guarded: Any, row: int, value: float, doubt: tuple[float, float], caplog: pytest.LogCaptureFixture
) -> None:
    """It is not worth a probe either; its neighbour is scored, and probed, as without it."""
    pipe = guarded(watching(doubt=doubt))
    expected = call(pipe)
    with broken(pipe.unet, 2, row, value, rows=4), caplog.at_level("WARNING"):
        from diffusers.utils import logging

        logging.enable_propagation()
        try:
            output = call(pipe)
        finally:
            logging.disable_propagation()
    bad, good, as_before = output.records[row], output.records[1 - row], expected.records[1 - row]
    assert (bad.verdict, bad.outcome, bad.extra_lanes) == ("unscored", "unscored", 0)
    assert bad.reason == "the UNet's output was not finite"
    assert bad.decided_at_step is None
    assert math.isnan(bad.score)
    assert asked(bad) == set()
    if doubt is NOBODY:
        assert good == as_before
    assert replace(good, statistics=()) == replace(as_before, statistics=())
    assert values(good) == pytest.approx(values(as_before), rel=2e-3, abs=2e-3)
    assert torch.equal(output.images[1 - row], expected.images[1 - row])
    logged = caplog.text + str(bad.reason)
    assert "None" not in logged


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 1])
def test_a_probe_that_is_not_finite_is_unscored(guarded: Any, row: int, value: float) -> None:
    """Though the free statistics would have passed the image; it costs all the same, and its neighbour is scored."""
    guard = watching(detector=PrematureDetail(threshold=math.inf, doubt=-math.inf), probes=2)
    pipe = guarded(guard)
    expected = call(pipe)
    probing = (guard.steps(STEPS)[-1] + 1, guard.steps(STEPS)[-1] + 2)  # two calls, after that of the deciding step
    with broken(pipe.unet, 2, row, value, rows=4, calls=probing):
        output = call(pipe)
    bad, good = output.records[row], output.records[1 - row]
    assert expected.records[row].verdict == "pass"
    assert (bad.verdict, bad.outcome, bad.extra_lanes) == ("unscored", "unscored", 4)
    assert (bad.reason, bad.decided_at_step) == ("the UNet's output was not finite", None)
    assert math.isnan(bad.score)
    assert good == expected.records[1 - row]
    assert torch.equal(output.images, expected.images)


def test_an_unscored_neighbour_of_a_flagged_image(guarded: Any) -> None:
    pipe = guarded(watching())
    threshold = call(pipe).records[0].score - 0.1
    pipe.enable_guard(watching(threshold))
    with broken(pipe.unet, 2, 1, math.nan, rows=4):
        output = call(pipe)
    assert [record.outcome for record in output.records][1] == "unscored"
    assert output.records[0].verdict == "flag"
    assert torch.isfinite(output.images[0]).all()


def test_interrupted(guarded: Any, plain: Any) -> None:
    """Ended before the deciding step: unscored, with the reason; after it, the verdict stands."""

    def stop_at(last: int) -> Any:
        def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = step >= last
            return {}

        return stop

    early = call(guarded(watching()), callback_on_step_end=stop_at(0))
    assert [record.outcome for record in early.records] == ["unscored"] * 2
    assert {record.reason for record in early.records} == {"sampling ended before the deciding step"}
    assert torch.equal(early.images, call(plain(), callback_on_step_end=stop_at(0)).images)
    pipe = guarded(watching())
    with CountLanes(pipe.unet) as count:
        between = call(pipe, callback_on_step_end=stop_at(2), negative_prompt=["a cat"] * 2)
    assert [(record.outcome, record.extra_lanes) for record in between.records] == [("unscored", 1)] * 2
    assert count.rows == 3 * 4 + 2  # the control of step 1 was paid
    late = call(guarded(watching(doubt=EVERYBODY)), callback_on_step_end=stop_at(3))
    assert [(record.outcome, record.extra_lanes) for record in late.records] == [("passed", 2)] * 2


@pytest.mark.parametrize("until", [0.25, 0.75])
def test_delayed_guidance_goes_on_in_the_hosts_loop(plain: Any, guarded: Any, until: float) -> None:
    """A delay that outlasts the deciding step is kept up by the host's loop, and ends where it should."""
    mitigation = DelayedGuidance(until=(until,))
    pipe = guarded(watching())
    (passed,) = call(pipe, "a dog", generator=seeded(1)).records
    # A short delay leaves a score of its own: anything below the flagged score but above that one rescues.
    pipe.enable_guard(watching(-math.inf, (mitigation,)))
    (tried,) = call(pipe, "a dog", generator=seeded(1)).records
    threshold = (passed.score + tried.attempts[0].score) / 2
    assert tried.attempts[0].score < threshold < passed.score
    pipe.enable_guard(watching(threshold, (mitigation,)))
    output = call(pipe, "a dog", generator=seeded(1))
    assert output.records[0].outcome == "rescued"

    host = plain()
    embeds = [host.encode_prompt([text], "cpu", 1, True)[i] for text, i in (("", 0), ("a dog", 0))]

    def switch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        share = (step + 1) / STEPS
        return {"prompt_embeds": torch.cat([embeds[0], embeds[0] if share < until else embeds[1]])}

    expected = host(
        "", generator=seeded(1), num_inference_steps=STEPS, output_type="latent", callback_on_step_end=switch
    )
    torch.testing.assert_close(output.images, expected.images, rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_on_the_pipeline(parts: dict[str, Any]) -> None:
    pipe = build(GuardedStableDiffusionPipeline, parts)
    pipe.enable_guard(watching())
    call(pipe)
    before = set(vars(pipe))
    call(pipe)
    assert set(vars(pipe)) == before
    assert not any("session" in name for name in before)
