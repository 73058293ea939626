"""What every registered statistic has to keep to, by its own word: name, lanes, places, one value an image."""

import copy
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import CountLanes, build, components

from sd_guard.guard import step_at
from sd_guard.pipelines.trajectory import denoiser_of, walk
from sd_guard.statistics import SEED_STATISTICS, STATISTICS

STEPS, PROMPTS, SEEDS = 8, ["a cat", "a red dog", "blue"], [3, 4, 5]
EVERY = {**STATISTICS, **SEED_STATISTICS}


@pytest.fixture(scope="module")
def pipe():
    """In float64, so that a batch of another size differs by next to nothing."""
    return build(StableDiffusionPipeline, copy.deepcopy(components())).to(torch.float64)


@pytest.fixture(scope="module")
def calls(pipe):
    """Each step of three images sampled together."""
    return list(walk(pipe, PROMPTS, SEEDS, steps=STEPS, guidance_scale=4.0))


def places(statistic):
    """Steps at which a statistic is taken: its own, or an early and a late one."""
    return sorted({step_at(share, STEPS) for share in (statistic.at or (0.2, 1.0))})


def alone(call, row):
    """The call as it would be for one image of the batch."""
    lanes = call.lanes.select(torch.tensor([row, len(call.x) + row]))
    tensors = ("x", "conditional", "control", "latents", "next_latents")
    return replace(call, lanes=lanes, **{name: getattr(call, name)[row : row + 1] for name in tensors})


def ask(statistic, call, model):
    """(B, ...) what it says of each image."""
    with torch.no_grad():
        return statistic.measure(call, model) if hasattr(statistic, "measure") else statistic.feature(call, model)


def test_no_name_stands_for_two():
    assert not STATISTICS.keys() & SEED_STATISTICS.keys()
    assert STATISTICS and SEED_STATISTICS


@pytest.mark.parametrize("name", EVERY)
def test_is_a_frozen_dataclass_of_its_own_name(name):
    statistic = EVERY[name]()
    assert statistic.name == name
    assert isinstance(statistic.higher_is_memorized, bool)
    assert statistic.lanes >= 0
    assert statistic.at is None or (statistic.at and all(0 <= share <= 1 for share in statistic.at))
    assert is_dataclass(statistic)
    for field in fields(statistic):
        with pytest.raises(FrozenInstanceError):
            setattr(statistic, field.name, None)
    assert EVERY[name].__doc__


@pytest.mark.parametrize("name", EVERY)
def test_gives_each_image_its_own_value_for_the_lanes_that_it_declares(pipe, calls, name):
    few = {"perturbations": 16} if name == "normal_bundle_lid" else {}  # of 512, which take half a minute
    statistic = EVERY[name](**few)
    for step in places(statistic):
        processors, state = dict(pipe.unet.attn_processors), torch.get_rng_state()
        with CountLanes(pipe.unet) as counted:
            values = ask(statistic, calls[step], denoiser_of(pipe, SEEDS))
        assert counted.rows == statistic.lanes * len(PROMPTS), "lanes"
        after = pipe.unet.attn_processors
        assert after.keys() == processors.keys() and all(after[key] is processors[key] for key in after)
        assert torch.equal(torch.get_rng_state(), state), "the sampler's randomness was used"
        assert len(values) == len(PROMPTS)
        assert values.dtype in (torch.float32, torch.float64)
        assert values.isfinite().all()
        if name in STATISTICS:
            assert values.shape == (len(PROMPTS),)
        again = ask(statistic, calls[step], denoiser_of(pipe, SEEDS))
        torch.testing.assert_close(again, values, rtol=0, atol=0)
        for row, seed in enumerate(SEEDS):
            own = ask(statistic, alone(calls[step], row), denoiser_of(pipe, [seed]))
            torch.testing.assert_close(own, values[row : row + 1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SEED_STATISTICS)
def test_compares_seeds_whatever_their_order(pipe, calls, name):
    statistic = SEED_STATISTICS[name]()
    call = calls[places(statistic)[0]]
    features = statistic.feature(call, denoiser_of(pipe, SEEDS))
    value = statistic.compare(features)
    assert isinstance(value, float)
    assert statistic.compare(features.flip(0)) == pytest.approx(value, rel=1e-6)
