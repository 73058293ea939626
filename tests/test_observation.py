"""What one step shows, against denoisers whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GaussianMixture, GaussianSubspace, Oracle, OracleUNet, PointMass
from tiny import TRAINING, CountLanes, components
from torch import Tensor

from sd_guard.lanes import Conditioning
from sd_guard.noise import PredictionType
from sd_guard.observation import (
    PROBED,
    STATISTICS,
    Observation,
    Question,
    lanes_of,
    observe,
    predicted_image,
    probe,
    with_control,
)
from sd_guard.statistics.base import Denoiser, StepCall
from sd_guard.statistics.sharpness import (
    CONTROL_FLOOR,
    FAINTEST_CONTROL,
    FINISHED,
    added_detail,
    detail,
    log_detail_ratio,
)

SCHEDULE = DDIMScheduler(**TRAINING)
AT_ONCE = set(STATISTICS) - {"excess_persistence"}  # what one step shows; the rest needs a later one
SHAPE, D = (4, 6, 6), 144


class TwoLanes:
    """A UNet whose control lanes (embedding 0) see one oracle, and whose prompt's lanes (embedding 1) another."""

    def __init__(self, control: Oracle, conditional: Oracle, prediction_type: PredictionType = "epsilon") -> None:
        self.unets = [o.as_unet(SCHEDULE, prediction_type) for o in (control, conditional)]
        self.rows = self.calls = 0

    def __call__(self, x: Tensor, timestep: Any, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        self.rows, self.calls = self.rows + len(x), self.calls + 1
        out = torch.empty_like(x)
        for value, unet in enumerate(self.unets):
            mine = encoder_hidden_states.flatten(1)[:, 0] == value
            if mine.any():
                out[mine] = unet(x[mine], timestep, return_dict=False)[0]
        return (out,)

    def level(self, timestep: int) -> Any:
        return OracleUNet.level(self.unets[0], timestep)


def embeds(images: int) -> Tensor:
    return torch.cat([torch.zeros(images, 1, 1), torch.ones(images, 1, 1)])


def step_call(unet: TwoLanes, x: Tensor, timestep: int, *, own_control: bool = True) -> StepCall:
    images, lanes = len(x), Conditioning(embeds(len(x)))
    both = unet(torch.cat([x, x]), timestep, lanes.prompt_embeds)[0]
    return StepCall(
        7,
        torch.tensor(timestep),
        unet.level(timestep),
        x,
        both[images:],
        both[:images] if own_control else None,
        lanes,
    )


def probed(
    unet: TwoLanes,
    x: Tensor,
    timestep: int,
    *,
    probes: int,
    rows: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    prediction_type: PredictionType = "epsilon",
) -> Observation:
    """All that can be seen of one step; of all rows where none are named."""
    call = step_call(unet, x, timestep)
    rows, seeds = (list(range(len(x))) if given is None else given for given in (rows, seeds))
    model = Denoiser(unet, prediction_type, SCHEDULE.alphas_cumprod, seeds)
    return probe(observe(call, prediction_type), call, model, rows, Question(probes, range(1)))


def noised(oracle: Oracle, level: Any, images: int = 3) -> Tensor:
    return oracle.noised(images, level, SHAPE, seed=1).float()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("timestep", [900, 600, 300])
@pytest.mark.parametrize("k", [3, 20])
def test_probe_recovers_the_dimensions(timestep: int, k: int, prediction_type: PredictionType) -> None:
    """The prompt knows one image (LID 0), the control a k-dimensional Gaussian: (a/s)^2 tr Cov, within its error."""
    subspace = GaussianSubspace(D, k, seed=2)
    memory = PointMass(subspace.sample(1, seed=4)[0])
    unet = TwoLanes(subspace, memory, prediction_type)
    level = unet.level(timestep)
    x = noised(memory, level)
    probes = 32
    seen = probed(unet, x, timestep, probes=probes, prediction_type=prediction_type)
    assert (seen.step, seen.dimension, seen.lanes) == (7, D, (2 * probes + 2,) * 3)
    assert seen.probed == dict.fromkeys(PROBED, (0, 1, 2))
    assert set(seen.values) == AT_ONCE
    assert all(value.shape == (3,) and value.dtype == torch.float32 for value in seen.values.values())
    torch.testing.assert_close(seen.values["trajectory_lid"], torch.zeros(3), rtol=0, atol=0.05)
    truth = subspace.trajectory_lid(x, level).float()
    stderr = truth / k * math.sqrt(2 * k / probes)
    assert ((seen.values["trajectory_lid_control"] - truth).abs() <= 4 * stderr + 0.05).all()


def test_lanes_are_not_mixed_up() -> None:
    """The other way round: the prompt is wide, the control is one image."""
    subspace, memory = GaussianSubspace(D, 20, seed=2), PointMass(torch.zeros(D))
    unet = TwoLanes(memory, subspace)
    x = noised(subspace, unet.level(500))
    seen = probed(unet, x, 500, probes=8)
    assert (seen.values["trajectory_lid_control"].abs() < 0.05).all()
    assert (seen.values["trajectory_lid"] > 2).all()


@pytest.mark.parametrize("rows", [[1], [3, 0], [2, 1, 3]])
@pytest.mark.parametrize("probes", [1, 3])
def test_some_rows_are_probed_as_all_of_them_are(rows: list[int], probes: int) -> None:
    """The same numbers from their own lanes only; the others have no LID, and their bill does not grow."""
    means = torch.randn(4, D, generator=torch.Generator().manual_seed(3))
    mixture = GaussianMixture(means, torch.tensor([0.02, 0.1, 0.3, 0.9]))  # a row of each: four widths
    unet = TwoLanes(GaussianSubspace(D, 9, seed=2, shift=2.0), mixture)
    level = unet.level(500)
    x = level.a * means.reshape(4, *SHAPE) + level.s * torch.randn(
        4, *SHAPE, generator=torch.Generator().manual_seed(4)
    )
    whole = probed(unet, x, 500, probes=probes)
    truth = mixture.trajectory_lid(x, level).float()
    torch.testing.assert_close(whole.values["trajectory_lid"], truth, rtol=0.01, atol=0.05)
    assert truth.diff().min() > 1  # none could be another's
    call = step_call(unet, x, 500)
    free, unet.rows, unet.calls = observe(call, "epsilon"), 0, 0
    model = Denoiser(unet, "epsilon", SCHEDULE.alphas_cumprod, range(4))
    part = probe(free, call, model, rows, Question(probes, range(1)))
    assert (unet.rows, unet.calls) == (2 * (probes + 1) * len(rows), math.ceil(probes * len(rows) / 4) + 2)
    assert part.probed == dict.fromkeys(PROBED, tuple(sorted(rows)))
    assert part.lanes == tuple(2 * probes + 2 if row in rows else 0 for row in range(4))
    others = [row for row in range(4) if row not in rows]
    for name in PROBED:
        torch.testing.assert_close(part.values[name][rows], whole.values[name][rows], rtol=1e-4, atol=1e-3)
        assert part.values[name][others].tolist() == [0.0] * len(others)
    for name in AT_ONCE - set(PROBED):
        assert part.values[name] is free.values[name]
    assert (free.lanes, free.probed) == ((0,) * 4, {})  # what was seen before stays what it was
    assert part.x0_hat is free.x0_hat


def test_cost_without_a_control() -> None:
    """The missing lane is evaluated, gives the same values, and is counted."""
    subspace, memory = GaussianSubspace(D, 9, seed=2), PointMass(torch.ones(D))
    unet = TwoLanes(subspace, memory)
    x = noised(subspace, unet.level(500))
    with_own, without = (step_call(unet, x, 500, own_control=own) for own in (True, False))
    assert with_control(with_own, unet, 6) is with_own
    unet.rows = 0
    completed = with_control(without, unet, 6)
    assert (unet.rows, completed.spent) == (3, 1)
    torch.testing.assert_close(completed.control, with_own.control)
    model = Denoiser(unet, "epsilon", SCHEDULE.alphas_cumprod, [1, 2, 3])
    own, evaluated = (
        probe(observe(call, "epsilon"), call, model, [0, 2], Question(2, range(1))) for call in (with_own, completed)
    )
    for name, value in own.values.items():
        torch.testing.assert_close(evaluated.values[name], value)
    assert (own.lanes, evaluated.lanes) == ((6, 0, 6), (7, 1, 7))
    assert unet.rows == sum(own.lanes) + sum(evaluated.lanes)


def test_other_seeds_that_are_asked_later_count_as_much() -> None:
    """Of images that all are asked of, and of those that only the first was: their mean, and a bill each."""
    unet = TwoLanes(GaussianSubspace(D, 9, seed=2, shift=2.0), PointMass(torch.linspace(-1, 1, D)))
    call = step_call(unet, noised(unet.unets[0].oracle, unet.level(500), 4), 500)
    model, free = Denoiser(unet, "epsilon", SCHEDULE.alphas_cumprod, range(4)), observe(call, "epsilon")
    ahead = probe(free, call, model, [0, 1, 3], Question(0, range(1)))
    seen = probe(ahead, call, model, [3, 1], Question(1, range(1, 3)))
    whole = probe(free, call, model, [0, 1, 3], Question(0, range(3)))
    name = "excess_agreement"
    torch.testing.assert_close(seen.values[name][[1, 3]], whole.values[name][[1, 3]], rtol=1e-4, atol=1e-5)
    assert seen.values[name][[0, 2]].tolist() == ahead.values[name][[0, 2]].tolist()
    assert seen.lanes == (2, 2 + 4 + 2, 0, 2 + 4 + 2)
    assert (seen.probed[name], seen.probed["trajectory_lid"]) == ((0, 1, 3), (1, 3))
    assert [seen.has("trajectory_lid", row) for row in range(4)] == [False, True, False, True]
    part = seen.select([3, 0])
    assert part.probed == {name: (0, 1), "trajectory_lid": (0,), "trajectory_lid_control": (0,)}


def test_free_statistics_cost_nothing() -> None:
    unet = TwoLanes(GaussianSubspace(D, 9, seed=2), PointMass(torch.ones(D)))
    call = step_call(unet, noised(unet.unets[0].oracle, unet.level(500)), 500)
    unet.rows = 0
    seen = observe(call, "epsilon")
    assert (seen.lanes, seen.probed, unet.rows) == ((0, 0, 0), {}, 0)
    assert set(seen.values) == {"detail", "added_detail", "cfg_norm"} == AT_ONCE - set(PROBED)
    assert all(value.shape == (3,) and value.dtype == torch.float32 for value in seen.values.values())


def test_the_predicted_image_is_that_of_the_last_step() -> None:
    memory = PointMass(torch.linspace(-1, 1, D))
    unet = TwoLanes(GaussianSubspace(D, 9, seed=2), memory)
    early, late = (observe(step_call(unet, noised(memory, unet.level(t)), t), "epsilon") for t in (900, 500))
    torch.testing.assert_close(
        predicted_image([early, late]), memory.mean.float().reshape(1, *SHAPE).expand(3, -1, -1, -1), rtol=0, atol=1e-4
    )
    assert predicted_image([late, early]) is early.x0_hat
    with pytest.raises(ValueError, match="read back from a record holds no predicted image"):
        predicted_image([late, Observation(7, D, {}, (0,))])


def test_lanes_are_billed_by_image() -> None:
    assert lanes_of([Observation(1, D, {}, (1, 1)), Observation(2, D, {}, (1, 5))]) == (2, 6)
    assert lanes_of([]) == ()


def test_premature_detail_of_a_memory() -> None:
    """At a high noise level the prompt that knows its image predicts it; the control predicts a blur of many."""
    means = torch.randn(64, D, generator=torch.Generator().manual_seed(3))
    mixture = GaussianMixture(means, torch.full((64,), 1e-3))
    unet = TwoLanes(mixture, PointMass(means[5]))
    level = unet.level(900)
    seen = observe(step_call(unet, noised(mixture, level), 900), "epsilon")
    blur = mixture.denoise(noised(mixture, level), level)
    expected = (detail(means[5].reshape(1, *SHAPE) - blur) / (FINISHED * detail(blur)).sqrt()).log()
    torch.testing.assert_close(seen.values["added_detail"], expected, rtol=1e-3, atol=2e-3)
    assert (seen.values["added_detail"] > 0.5).all()


@settings(max_examples=25)
@given(order=st.permutations(range(4)), count=st.integers(1, 4))
def test_rows_do_not_see_each_other(order: list[int], count: int) -> None:
    rows = list(order[:count])
    subspace, memory = GaussianSubspace(D, 9, seed=2, shift=2.0), PointMass(torch.ones(D))
    unet = TwoLanes(subspace, memory)
    x = noised(subspace, unet.level(500), 4)
    whole = probed(unet, x, 500, probes=2)
    part = probed(unet, x[rows], 500, probes=2, seeds=rows)
    assert set(part.values) == AT_ONCE
    for name, value in part.values.items():
        torch.testing.assert_close(value, whole.values[name][rows], rtol=1e-4, atol=1e-3)


def test_a_broken_row_stays_alone() -> None:
    subspace = GaussianSubspace(D, 9, seed=2)
    unet = TwoLanes(subspace, PointMass(torch.ones(D)))
    x = noised(subspace, unet.level(500))
    good = probed(unet, x, 500, probes=2)
    x[1] = math.nan
    bad = probed(unet, x, 500, probes=2)
    assert set(bad.values) == AT_ONCE
    for name, value in bad.values.items():
        assert value[1].isnan(), name
        torch.testing.assert_close(value[[0, 2]], good.values[name][[0, 2]])


@given(scale=st.floats(0.2, 1e3), seed=st.integers(0, 1000))
def test_log_detail_ratio_has_no_scale_above_its_floor(scale: float, seed: int) -> None:
    x0, control = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(seed))
    ratio = log_detail_ratio(x0, control)
    torch.testing.assert_close(log_detail_ratio(scale * x0, scale * control), ratio, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_detail_ratio(scale * x0, control), ratio + math.log(scale), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_detail_ratio(x0 + 5.0, control - 3.0), ratio, rtol=1e-3, atol=1e-4)


@given(scale=st.floats(0.2, 1e3), seed=st.integers(0, 1000))
def test_added_detail_is_that_of_the_difference(scale: float, seed: int) -> None:
    """Half in units of the control, half in its own; what the control shows anyway adds little; flat colour none."""
    x0, control = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(seed))
    added, by_itself = added_detail(x0, control), detail(x0 - control).log()
    over = [by_itself - detail(control).log(), by_itself - math.log(FINISHED)]
    torch.testing.assert_close(added, (over[0] + over[1]) / 2, rtol=1e-4, atol=1e-5)
    scaled = added_detail(scale * x0, scale * control)
    torch.testing.assert_close(scaled, added + math.log(scale) / 2, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(added_detail(x0 + 5.0, control - 3.0), added, rtol=1e-3, atol=1e-4)
    twice = added_detail(2 * control, control) - added_detail(1.5 * control, control)
    torch.testing.assert_close(twice, torch.full((3,), math.log(2)))
    torch.testing.assert_close(added_detail(control, control), torch.full((3,), math.log(0.01)))


def test_an_error_that_both_predictions_share_adds_nothing() -> None:
    """As at the start of a linear schedule, where a noise prediction's image is mostly its error."""
    x0, control, error = torch.randn(3, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    rough, smooth = added_detail(x0 + 9 * error, control + 9 * error), added_detail(x0, control)
    torch.testing.assert_close(rough + (detail(control + 9 * error) / detail(control)).log() / 2, smooth)


def test_a_featureless_control_counts_with_the_floor() -> None:
    x0, control = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    faint = log_detail_ratio(x0, 1e-2 * control)
    torch.testing.assert_close(faint, log_detail_ratio(x0, torch.zeros_like(control)))
    torch.testing.assert_close(faint, (detail(x0) / CONTROL_FLOOR).log())
    unseen = (detail(x0) / math.sqrt(FAINTEST_CONTROL * FINISHED)).log()
    torch.testing.assert_close(added_detail(x0, torch.zeros_like(control)), unseen)


def test_detail() -> None:
    """Of one step of height 2 in the four columns inside: 2/3 along rows, 0 along columns."""
    x = torch.zeros(1, 1, 6, 6)
    x[..., 3:] = 2.0
    assert detail(x).item() == pytest.approx((2 / 3) / 2)
    assert detail(x.mT).item() == detail(x).item()
    assert detail(torch.full((2, 4, 8, 8), 3.0)).tolist() == [0.0, 0.0]
    assert torch.isfinite(log_detail_ratio(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))).all()
    assert detail(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("size", [(8, 8), (4, 9), (3, 3), (3, 8), (2, 2)])
def test_an_even_colour_has_no_detail_but_at_the_border(size: tuple[int, int]) -> None:
    """Where an autoencoder sees zeros beyond the image. Latents too small to have an inside count whole."""
    x = torch.zeros(1, 4, *size)
    x[..., 0, :] = x[..., -1] = 5.0
    assert (detail(x).item() == 0.0) == (min(size) >= 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_unet(dtype: torch.dtype) -> None:
    """Probes are calls of two lanes each, no larger than the guided one, finite in half precision too."""
    unet = components()["unet"].to(dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    lanes = Conditioning(torch.randn(4, 16, 32, generator=generator).to(dtype))
    with torch.no_grad():
        both = unet(torch.cat([x, x]), 500, encoder_hidden_states=lanes.prompt_embeds, return_dict=False)[0]
    level = OracleUNet.level(PointMass(torch.zeros(256)).as_unet(SCHEDULE, "epsilon"), 500)
    call = StepCall(0, torch.tensor(500), level, x, both[2:], both[:2], lanes)
    with CountLanes(unet) as count:
        model = Denoiser(unet, "epsilon", SCHEDULE.alphas_cumprod, [1, 2])
        seen = probe(observe(call, "epsilon"), call, model, [1], Question(3, range(1)))
    assert count.shapes == [(4, 4, 8, 8), (2, 4, 8, 8), (1, 4, 8, 8), (1, 4, 8, 8)]
    assert all(torch.isfinite(value).all() and value.dtype == torch.float32 for value in seen.values.values())
