"""Copies of scheduler and generator state: independent, complete, and exact for some images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import SCHEDULERS, make_scheduler, seeded
from torch import Tensor

from sd_guard.noise import SUPPORTED_SCHEDULERS
from sd_guard.snapshots import (
    copy_scheduler,
    fork_generators,
    generator_states,
    replace_images,
    select_images,
    share_noise,
)

STEPS, SHAPE = 6, (3, 4, 8, 8)


def model(x: Tensor, timestep: Any) -> Tensor:
    """A rowwise stand-in for a UNet."""
    return torch.tanh(x * 0.7) + 1e-4 * float(timestep)


def walk(scheduler: Any, x: Tensor, first: int, last: int, generators: Any) -> Tensor:
    arguments = {"generator": generators} if "generator" in scheduler.step.__code__.co_varnames else {}
    for timestep in scheduler.timesteps[first:last]:
        output = model(scheduler.scale_model_input(x, timestep), timestep)
        x = scheduler.step(output, timestep, x, **arguments, return_dict=False)[0]
    return x


def begin(name: str) -> tuple[Any, Tensor]:
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(STEPS)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return scheduler, noise * scheduler.init_noise_sigma


def test_every_supported_scheduler_is_among_those() -> None:
    tested = {kind for kind, _ in SCHEDULERS.values()}
    assert tested | {"DPMSolverSDEScheduler"} == SUPPORTED_SCHEDULERS  # that one needs torchsde


@pytest.mark.parametrize("middle", range(5))
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_copy_goes_its_own_way(name: str, middle: int) -> None:
    """From any point: walking the copy leaves the original where it was, and both end alike."""
    scheduler, x = begin(name)
    generators = seeded(1, 2, 3)
    x = walk(scheduler, x, 0, middle, generators)
    twin, states = copy_scheduler(scheduler), generator_states(generators)
    end = walk(scheduler, x, middle, len(scheduler.timesteps), generators)
    share_noise(twin, scheduler)
    forks = fork_generators(seeded(1, 2, 3), states, [0, 1, 2], seed=0)
    assert torch.equal(walk(twin, x, middle, len(twin.timesteps), forks), end)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_some_images_go_their_own_way_and_come_back(name: str) -> None:
    """Rows 2 and 0 walk on alone and are put back: the batch then ends as if it had never been parted."""
    middle, further = 2, 4
    scheduler, x = begin(name)
    generators = seeded(1, 2, 3)
    x = walk(scheduler, x, 0, middle, generators)
    states = generator_states(generators)
    rows = torch.tensor([2, 0])
    part = select_images(scheduler, rows, x)
    forks = fork_generators(generators, states, rows.tolist(), seed=0)
    part_x = walk(part, x[rows], middle, further, forks)
    x = walk(scheduler, x, middle, further, generators)
    torch.testing.assert_close(part_x, x[rows], rtol=1e-5, atol=1e-5)

    end_scheduler, end_states = copy_scheduler(scheduler), generator_states(generators)
    spoiled = select_images(scheduler, torch.arange(3), x)  # all that is per image in rows 2 and 0 is wrong
    for value in per_image(spoiled, x.shape):
        value[rows] = 77.0
    other = [value[1].clone() for value in per_image(spoiled, x.shape)]
    replace_images(spoiled, part, rows, x)
    for value, kept in zip(per_image(spoiled, x.shape), other, strict=True):
        assert torch.equal(value[1], kept)
    ends = [
        walk(s, x, further, len(s.timesteps), fork_generators(generators, end_states, [0, 1, 2], 0))
        for s in (spoiled, end_scheduler)
    ]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-4)


def per_image(scheduler: Any, shape: torch.Size) -> list[Tensor]:
    found: list[Tensor] = []
    for name, value in vars(scheduler).items():
        items = value if isinstance(value, list) and name != "_internal_dict" else [value]
        found += [item for item in items if isinstance(item, Tensor) and item.shape == shape]
    return list({id(item): item for item in found}.values())


@pytest.mark.parametrize("name", ["pndm", "lms", "dpm_multistep", "unipc", "deis"])
def test_multistep_schedulers_remember_images(name: str) -> None:
    """The tests above would prove nothing where there is no state to lose."""
    scheduler, x = begin(name)
    x = walk(scheduler, x, 0, 3, seeded(1, 2, 3))
    assert per_image(scheduler, x.shape)
    part = select_images(scheduler, torch.tensor([1]), x)
    assert not per_image(part, x.shape)
    assert all(
        torch.equal(a[0], b[1])
        for a, b in zip(per_image(part, (1, 4, 8, 8)), per_image(scheduler, x.shape), strict=True)
    )


def test_generators_are_forked_not_advanced() -> None:
    generators = seeded(1, 2, 3)
    torch.randn(5, generator=generators[2])
    states = generator_states(generators)
    expected = torch.randn(4, generator=seeded(9)[0].set_state(states[2]))
    (fork,) = fork_generators(generators, states, [2], seed=0)
    assert torch.equal(torch.randn(4, generator=fork), expected)
    assert all(torch.equal(a, b) for a, b in zip(generator_states(generators), states, strict=True))


def test_one_generator_or_none() -> None:
    generator = torch.Generator().manual_seed(5)
    states = generator_states(generator)
    fork = fork_generators(generator, states, [1], seed=0)
    assert fork is not generator
    assert torch.equal(torch.randn(4, generator=fork), torch.randn(4, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(generator.get_state(), states[0])

    assert generator_states(None) == []
    state = torch.get_rng_state()
    alone = fork_generators(None, [], [0], seed=3)
    assert torch.equal(torch.randn(4, generator=alone), torch.randn(4, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(torch.get_rng_state(), state)
