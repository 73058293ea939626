from dataclasses import replace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import seeded

from sd_guard.pipelines.inputs import CallInputs


def inputs(generator: Any, seed: int = 0) -> CallInputs:
    def nothing(*_: Any) -> Any:
        raise AssertionError("not asked for")

    return CallInputs(None, generator, seed, True, True, 7.5, 0.0, 0.0, nothing, nothing)


def test_seeds() -> None:
    assert [inputs(seeded(3, 5)).seed_of(row) for row in range(2)] == [3, 5]
    assert inputs(torch.Generator().manual_seed(4)).seed_of(1) == 4
    assert inputs(None).seed_of(0) is None


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40))
def test_probe_seeds(own: int, seed: int) -> None:
    """In range; the image's own wherever it stands in the batch; another with another guard seed."""
    first, second = inputs(seeded(own, 1), seed), inputs(seeded(1, own), seed)
    assert 0 <= first.probe_seed_of(0) < 2**64
    assert first.probe_seed_of(0) == second.probe_seed_of(1)
    assert first.probe_seed_of(0) != replace(first, seed=seed + 1).probe_seed_of(0)


def test_probe_seeds_without_generators_of_their_own() -> None:
    for generator in (None, torch.Generator().manual_seed(4)):
        seeds = [inputs(generator).probe_seed_of(row) for row in range(4)]
        assert len(set(seeds)) == 4
