"""What every statistic from the literature has to keep: shape, cost, one row from one image, nothing left behind."""

from __future__ import annotations

import pytest
import torch
from tiny import CountLanes

from sd_guard.pipelines.trajectory import denoiser_of
from sd_guard.statistics.anisotropy import Anisotropy
from sd_guard.statistics.attention_entropy import AttentionEntropy
from sd_guard.statistics.bright_ending import BrightEnding, LocalGuidanceNorm
from sd_guard.statistics.curvature import CurvatureDifference
from sd_guard.statistics.hessian import HessianScoreNorm
from sd_guard.statistics.noise_similarity import NoiseSimilarity
from sd_guard.statistics.one_step import OneStepEdges
from sd_guard.statistics.tiled import TiledDistance
from sd_guard.statistics.update_norm import LatentUpdateNorm
from sd_guard.trace import FiniteDifference
from tests.statistics.cases import PROMPTS, SEEDS, on_its_own, tiny_calls, tiny_pipe

SINGLE = [
    LatentUpdateNorm(),
    HessianScoreNorm(),
    HessianScoreNorm(product=FiniteDifference("central")),
    CurvatureDifference(probes=3),
    Anisotropy(),
    AttentionEntropy(),
    BrightEnding(),
    LocalGuidanceNorm(),
]
SEEDED = [NoiseSimilarity(), OneStepEdges(threshold=5.0), TiledDistance()]


def label(statistic):
    return repr(statistic).replace(" ", "")


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipe()


@pytest.fixture(scope="module")
def calls(pipe):
    return tiny_calls(pipe)


def measured(statistic, call, model):
    return statistic.measure(call, model) if hasattr(statistic, "measure") else statistic.feature(call, model)


@pytest.mark.parametrize("statistic", SINGLE + SEEDED, ids=label)
def test_a_row_does_not_depend_on_its_batchmates(statistic, pipe, calls):
    together = measured(statistic, calls[1], denoiser_of(pipe, SEEDS))
    for row in range(len(PROMPTS)):
        alone = measured(statistic, *on_its_own(calls[1], pipe, row))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("statistic", SINGLE, ids=label)
def test_one_finite_value_an_image(statistic, pipe, calls):
    value = statistic.measure(calls[0], denoiser_of(pipe, SEEDS))
    assert value.shape == (len(PROMPTS),) and value.dtype == torch.float64 and value.isfinite().all()
    assert value.unique().numel() == len(PROMPTS)


@pytest.mark.parametrize("statistic", SINGLE + SEEDED, ids=label)
def test_costs_the_lanes_it_says(statistic, pipe, calls):
    with CountLanes(pipe.unet) as counted:
        measured(statistic, calls[0], denoiser_of(pipe, SEEDS))
    assert counted.rows == statistic.lanes * len(PROMPTS)


@pytest.mark.parametrize("statistic", SINGLE + SEEDED, ids=label)
def test_leaves_the_unet_as_it_was(statistic, pipe, calls):
    before = dict(pipe.unet.attn_processors)
    measured(statistic, calls[0], denoiser_of(pipe, SEEDS))
    after = pipe.unet.attn_processors
    assert all(after[name] is before[name] for name in before) and after.keys() == before.keys()
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


@pytest.mark.parametrize("statistic", SEEDED, ids=label)
def test_equal_seeds_are_as_alike_as_can_be(statistic, pipe, calls):
    features = statistic.feature(calls[0], denoiser_of(pipe, SEEDS))
    same, others = features[:1].expand(4, *[-1] * (features.ndim - 1)), features
    assert features.is_floating_point() and len(features) == len(PROMPTS)
    assert isinstance(statistic.compare(others), float)
    sign = 1 if statistic.higher_is_memorized else -1
    assert sign * statistic.compare(same) > sign * statistic.compare(others)


@pytest.mark.parametrize("statistic", SEEDED, ids=label)
def test_one_seed_is_refused(statistic, pipe, calls):
    features = statistic.feature(calls[0], denoiser_of(pipe, SEEDS))
    with pytest.raises(ValueError, match="1 seeds"):
        statistic.compare(features[:1])


@pytest.mark.parametrize("statistic", SINGLE + SEEDED, ids=label)
def test_says_where_its_authors_take_it(statistic):
    assert statistic.at is None or all(0 <= share <= 1 for share in statistic.at)
    assert statistic.name and isinstance(statistic.higher_is_memorized, bool)
    assert hash(statistic) == hash(type(statistic)(**{n: getattr(statistic, n) for n in _given(statistic)}))


def _given(statistic):
    return [name for name, field in type(statistic).__dataclass_fields__.items() if field.init]
