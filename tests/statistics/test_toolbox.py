"""What every statistic of the toolbox keeps to: one value an image, from that image alone, for the lanes it names."""

import dataclasses

import pytest
import torch
from oracles import GaussianMixture, PointMass
from tiny import CountLanes

from sd_guard.pipelines.trajectory import denoiser_of
from sd_guard.statistics.complexity import DecodedPngSize, LidPerPngSize
from sd_guard.statistics.dimension import (
    FlipdStatistic,
    LidContrast,
    LidRatio,
    SteinLid,
    TrajectoryLid,
    TrajectoryLidControl,
)
from sd_guard.statistics.flipd_curve import FPRegress
from sd_guard.statistics.guidance import CfgNorm
from sd_guard.statistics.normal_bundle import NormalBundleLid
from sd_guard.statistics.norms import NoiseNorm
from sd_guard.statistics.reconstruction import ReconstructionCost
from sd_guard.statistics.sharpness import CONTROL_FLOOR, Detail, LogDetailRatio, detail
from tests.statistics.cases import PROMPTS, SEEDS, noise, on_its_own, oracle_case, tiny_calls, tiny_pipe

EVERY = [
    TrajectoryLid(),
    TrajectoryLidControl(probes=3),
    LidContrast(),
    LidRatio(),
    SteinLid(),
    FlipdStatistic(),
    FlipdStatistic(timestep=None, probes=1),
    FPRegress(),
    NormalBundleLid(perturbations=8),
    NoiseNorm(),
    CfgNorm(),
    Detail(),
    LogDetailRatio(),
    DecodedPngSize(),
    LidPerPngSize(),
    ReconstructionCost(),
]
NEED_CONTROL = (TrajectoryLidControl, LidContrast, LidRatio, CfgNorm, LogDetailRatio)


def label(statistic):
    return repr(statistic).replace(" ", "")


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipe()


@pytest.fixture(scope="module")
def calls(pipe):
    return tiny_calls(pipe)


@pytest.mark.parametrize("statistic", EVERY, ids=label)
def test_a_row_does_not_depend_on_its_batchmates(statistic, pipe, calls):
    together = statistic.measure(calls[1], denoiser_of(pipe, SEEDS))
    assert together.shape == (len(PROMPTS),) and together.isfinite().all()
    assert together.dtype in (torch.float32, torch.float64)
    for row in range(len(PROMPTS)):
        alone = statistic.measure(*on_its_own(calls[1], pipe, row))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("statistic", EVERY, ids=label)
def test_costs_the_lanes_it_says_and_no_randomness(statistic, pipe, calls):
    state = torch.get_rng_state()
    with CountLanes(pipe.unet) as counted:
        statistic.measure(calls[1], denoiser_of(pipe, SEEDS))
    assert counted.rows == statistic.lanes * len(PROMPTS)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("statistic", [s for s in EVERY if s.lanes and type(s) is not NormalBundleLid], ids=label)
def test_probes_are_those_of_seed_and_step(statistic, pipe, calls):
    """The normal bundle's whole numbers may well agree for other noise."""
    value = statistic.measure(calls[1], denoiser_of(pipe, SEEDS))
    assert torch.equal(statistic.measure(calls[1], denoiser_of(pipe, SEEDS)), value)
    assert (statistic.measure(calls[1], denoiser_of(pipe, [13, 14, 15])) != value).all()
    later = dataclasses.replace(calls[1], step=2)
    assert (statistic.measure(later, denoiser_of(pipe, SEEDS)) != value).all()


@pytest.mark.parametrize("statistic", EVERY, ids=label)
def test_asks_for_the_lane_without_a_prompt_only_where_it_compares(statistic, pipe, calls):
    call = dataclasses.replace(calls[1], control=None)
    if isinstance(statistic, NEED_CONTROL):
        with pytest.raises(ValueError, match="guidance_scale"):
            statistic.measure(call, denoiser_of(pipe, SEEDS))
    else:
        statistic_value = statistic.measure(call, denoiser_of(pipe, SEEDS))
        torch.testing.assert_close(statistic_value, statistic.measure(calls[1], denoiser_of(pipe, SEEDS)))


def test_the_free_ones_in_closed_form():
    """Of a point m: e_hat = (x - a m) / s, x0_hat = m, in each lane."""
    m, other, x = noise(1, 1), noise(1, 2), noise(3)
    call, model = oracle_case(PointMass(other), PointMass(m), 300, x)
    length = ((x - call.level.a * m) / call.level.s).flatten(1).norm(dim=1)
    torch.testing.assert_close(NoiseNorm().measure(call, model), length)
    apart = call.level.a / call.level.s * (m - other).norm()
    torch.testing.assert_close(CfgNorm().measure(call, model).double(), apart.expand(3), rtol=1e-5, atol=0)
    torch.testing.assert_close(Detail().measure(call, model), detail(m).expand(3))
    ratio = (detail(m) / detail(other).clamp(min=CONTROL_FLOOR)).log()
    torch.testing.assert_close(LogDetailRatio().measure(call, model), ratio.expand(3), rtol=1e-6, atol=1e-6)


def test_the_lanes_are_not_confused():
    """Swapping the two lanes changes the sign of a contrast, and turns a ratio over."""
    near, far = (GaussianMixture(noise(1, 1).flatten(1), torch.tensor([v])) for v in (0.1, 0.5))
    (one, model), (two, swapped) = (oracle_case(*pair, 300, noise(3)) for pair in ((far, near), (near, far)))
    torch.testing.assert_close(LidContrast().measure(one, model), -LidContrast().measure(two, swapped))
    torch.testing.assert_close(LidRatio().measure(one, model), 1 / LidRatio().measure(two, swapped))
    assert (LidContrast().measure(one, model) > 0).all()
