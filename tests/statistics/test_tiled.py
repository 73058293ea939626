"""Tiled distance against the one for files, and cliques against all subsets."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from sd_guard.pipelines.trajectory import denoiser_of
from sd_guard.similarity import tiled_l2
from sd_guard.statistics.tiled import TiledDistance, tiled_distances
from tests.statistics.cases import SEEDS, tiny_calls, tiny_pipe


def images(n, height=18, width=21, seed=0):
    """Of 8 bits, as files have."""
    levels = np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    return levels, torch.from_numpy(levels).permute(0, 3, 1, 2).double() / 255


def test_equals_the_distance_of_files():
    levels, tensors = images(4)
    distances = tiled_distances(tensors)
    for i, j in itertools.product(range(4), repeat=2):
        expected = tiled_l2(Image.fromarray(levels[i]), Image.fromarray(levels[j]))
        assert distances[i, j].item() == pytest.approx(expected, abs=1e-12)


def test_one_tile_that_differs_is_enough():
    pair = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    pair[1, :, 4:8, 8:12] = 0.7
    assert TiledDistance().compare(pair) == pytest.approx(0.7)


@pytest.mark.parametrize("clique", [2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(3))
def test_least_radius_of_a_clique_by_all_subsets(clique, seed):
    features = images(7, 8, 8, seed)[1]
    distances = tiled_distances(features)
    radii = [
        max(distances[i, j] for i, j in itertools.combinations(s, 2)) for s in itertools.combinations(range(7), clique)
    ]
    assert TiledDistance(clique=clique).compare(features) == pytest.approx(float(min(radii)), abs=1e-12)


def test_two_copies_among_others():
    features = images(5)[1]
    features[4] = features[1]
    assert TiledDistance().compare(features) == 0
    assert TiledDistance(clique=3).compare(features) > 0.1


def test_decodes_where_the_step_leads():
    pipe = tiny_pipe()
    call, model = tiny_calls(pipe, steps=2)[-1], denoiser_of(pipe, SEEDS)
    assert torch.equal(TiledDistance().feature(call, model), model.decode(call.next_latents))
    with pytest.raises(ValueError, match="next_latents is None"):
        TiledDistance().feature(dataclasses.replace(call, next_latents=None), model)
    with pytest.raises(ValueError, match="decode is None"):
        TiledDistance().feature(call, dataclasses.replace(model, decode=None))


def test_refuses_no_clique_and_too_few_images():
    with pytest.raises(ValueError, match="clique=1"):
        TiledDistance(clique=1)
    with pytest.raises(ValueError, match="2 seeds hold no clique of 3"):
        TiledDistance(clique=3).compare(images(2)[1])
