"""What one step shows, against denoisers whose answers are known."""

from __future__ import annotations

import math
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
from sd_guard.observation import STATISTICS, observe
from sd_guard.statistics.base import StepCall
from sd_guard.statistics.sharpness import CONTROL_FLOOR, detail, log_detail_ratio

SCHEDULE = DDIMScheduler(**TRAINING)
SHAPE, D = (4, 6, 6), 144


class TwoLanes:
    """A UNet whose control lanes (embedding 0) see one oracle, and whose prompt's lanes (embedding 1) another."""

    def __init__(self, control: Oracle, conditional: Oracle, prediction_type: PredictionType = "epsilon") -> None:
        self.unets = [o.as_unet(SCHEDULE, prediction_type) for o in (control, conditional)]
        self.rows = 0

    def __call__(self, x: Tensor, timestep: Any, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        self.rows += len(x)
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
    seen = observe(step_call(unet, x, timestep), unet, prediction_type, probes=probes, seeds=[1, 2, 3])
    assert (seen.step, seen.dimension, seen.lanes) == (7, D, 2 * probes)
    assert set(seen.values) == set(STATISTICS)
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
    seen = observe(step_call(unet, x, 500), unet, "epsilon", probes=8, seeds=[1, 2, 3])
    assert (seen.values["trajectory_lid_control"].abs() < 0.05).all()
    assert (seen.values["trajectory_lid"] > 2).all()


def test_cost_without_a_control() -> None:
    """The missing lane is evaluated, gives the same values, and is counted."""
    subspace, memory = GaussianSubspace(D, 9, seed=2), PointMass(torch.ones(D))
    unet = TwoLanes(subspace, memory)
    x = noised(subspace, unet.level(500))
    with_control, without = (
        observe(step_call(unet, x, 500, own_control=own), unet, "epsilon", probes=1, seeds=[1, 2, 3])
        for own in (True, False)
    )
    for name, value in with_control.values.items():
        torch.testing.assert_close(without.values[name], value)
    assert (with_control.lanes, without.lanes) == (2, 3)
    call = step_call(unet, x, 500, own_control=False)
    unet.rows = 0
    assert observe(call, unet, "epsilon", probes=2, seeds=[1, 2, 3]).lanes * 3 == unet.rows


def test_free_statistics_cost_nothing() -> None:
    unet = TwoLanes(GaussianSubspace(D, 9, seed=2), PointMass(torch.ones(D)))
    call = step_call(unet, noised(unet.unets[0].oracle, unet.level(500)), 500)
    unet.rows = 0
    seen = observe(call, unet, "epsilon", probes=0, seeds=[1, 2, 3])
    assert (seen.lanes, unet.rows) == (0, 0)
    assert set(seen.values) == {"detail", "log_detail_ratio", "cfg_norm"}


def test_premature_detail_of_a_memory() -> None:
    """At a high noise level the prompt that knows its image predicts it; the control predicts a blur of many."""
    means = torch.randn(64, D, generator=torch.Generator().manual_seed(3))
    mixture = GaussianMixture(means, torch.full((64,), 1e-3))
    unet = TwoLanes(mixture, PointMass(means[5]))
    level = unet.level(900)
    seen = observe(step_call(unet, noised(mixture, level), 900), unet, "epsilon", probes=0, seeds=[1, 2, 3])
    blur = mixture.denoise(noised(mixture, level), level)
    expected = (detail(means[5].reshape(1, *SHAPE)) / detail(blur)).log()
    torch.testing.assert_close(seen.values["log_detail_ratio"], expected, rtol=1e-3, atol=2e-3)
    assert (seen.values["log_detail_ratio"] > 0.5).all()


@settings(max_examples=25)
@given(order=st.permutations(range(4)), count=st.integers(1, 4))
def test_rows_do_not_see_each_other(order: list[int], count: int) -> None:
    rows = list(order[:count])
    subspace, memory = GaussianSubspace(D, 9, seed=2, shift=2.0), PointMass(torch.ones(D))
    unet = TwoLanes(subspace, memory)
    x = noised(subspace, unet.level(500), 4)
    whole = observe(step_call(unet, x, 500), unet, "epsilon", probes=2, seeds=[1, 2, 3, 4])
    part = observe(step_call(unet, x[rows], 500), unet, "epsilon", probes=2, seeds=[row + 1 for row in rows])
    for name, value in part.values.items():
        torch.testing.assert_close(value, whole.values[name][rows], rtol=1e-4, atol=1e-3)


def test_a_broken_row_stays_alone() -> None:
    subspace = GaussianSubspace(D, 9, seed=2)
    unet = TwoLanes(subspace, PointMass(torch.ones(D)))
    x = noised(subspace, unet.level(500))
    good = observe(step_call(unet, x, 500), unet, "epsilon", probes=1, seeds=[1, 2, 3])
    x[1] = math.nan
    bad = observe(step_call(unet, x, 500), unet, "epsilon", probes=1, seeds=[1, 2, 3])
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


def test_a_featureless_control_counts_with_the_floor() -> None:
    x0, control = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    faint = log_detail_ratio(x0, 1e-2 * control)
    torch.testing.assert_close(faint, log_detail_ratio(x0, torch.zeros_like(control)))
    torch.testing.assert_close(faint, (detail(x0) / CONTROL_FLOOR).log())


def test_detail() -> None:
    """Of one step of height 2 in four columns: 2/3 along rows, 0 along columns."""
    x = torch.zeros(1, 1, 4, 4)
    x[..., 2:] = 2.0
    assert detail(x).item() == pytest.approx((2 / 3) / 2)
    assert detail(x.mT).item() == detail(x).item()
    assert detail(torch.full((2, 4, 8, 8), 3.0)).tolist() == [0.0, 0.0]
    assert torch.isfinite(log_detail_ratio(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))).all()
    assert detail(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_unet(dtype: torch.dtype) -> None:
    """A probe is one call of 2B rows, finite in half precision too."""
    unet = components()["unet"].to(dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    lanes = Conditioning(torch.randn(4, 16, 32, generator=generator).to(dtype))
    with torch.no_grad():
        both = unet(torch.cat([x, x]), 500, encoder_hidden_states=lanes.prompt_embeds, return_dict=False)[0]
    level = OracleUNet.level(PointMass(torch.zeros(256)).as_unet(SCHEDULE, "epsilon"), 500)
    call = StepCall(0, torch.tensor(500), level, x, both[2:], both[:2], lanes)
    with CountLanes(unet) as count:
        seen = observe(call, unet, "epsilon", probes=3, seeds=[1, 2])
    assert count.shapes == [(4, 4, 8, 8)] * 3
    assert all(torch.isfinite(value).all() and value.dtype == torch.float32 for value in seen.values.values())
