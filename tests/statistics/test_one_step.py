"""Edges of one-step images against SciPy's Sobel filter, and what agreeing means."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage

from sd_guard.pipelines.trajectory import denoiser_of
from sd_guard.statistics.one_step import OneStepEdges, edge_strength
from tests.statistics.cases import PROMPTS, SEEDS, tiny_calls, tiny_pipe


def in_scipy(image):
    """(H, W) of an (H, W, 3) image: the filter smooths over every axis but its own, the channels among them."""
    return np.hypot(ndimage.sobel(image, axis=0), ndimage.sobel(image, axis=1)).sum(2)


def test_strength_equals_scipys():
    images = torch.rand(2, 3, 17, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for image, strength in zip(images, edge_strength(images), strict=True):
        np.testing.assert_allclose(strength, in_scipy(image.permute(1, 2, 0).numpy()))


def stripe(side, column):
    """Black left of a column, white from it on: an edge two pixels wide."""
    image = torch.zeros(3, side, side, dtype=torch.float64)
    image[:, :, column:] = 1
    return image


def with_images(images):
    """A call and a model whose one-step images are given."""
    pipe = tiny_pipe()
    call = tiny_calls(pipe, steps=1)[0]
    return call, dataclasses.replace(denoiser_of(pipe, SEEDS), decode=lambda _: images)


def test_a_seed_counts_where_more_than_half_agree():
    call, model = with_images(torch.stack([stripe(20, 5), stripe(20, 5), stripe(20, 12)]))
    features = OneStepEdges().feature(call, model)
    assert features.sum((1, 2)).tolist() == [40.0] * 3
    assert OneStepEdges().compare(features) == pytest.approx(40 / 400)
    assert OneStepEdges().compare(features[1:]) == 0  # half is not more than half
    assert OneStepEdges(agreement=0.2).compare(features) == pytest.approx(80 / 400)


def test_large_images_are_shrunk():
    call, model = with_images(stripe(512, 256).expand(len(PROMPTS), -1, -1, -1))
    features = OneStepEdges().feature(call, model)
    assert features.shape == (len(PROMPTS), 256, 256)
    assert OneStepEdges().compare(features) == pytest.approx(2 / 256, abs=2 / 256)
    assert features[0, :, 120:136].sum() == features[0].sum() > 0


def test_decodes_the_guided_prediction():
    pipe = tiny_pipe()
    call, model = tiny_calls(pipe, steps=2)[0], denoiser_of(pipe, SEEDS)
    guided = call.control + 7.5 * (call.conditional - call.control)
    image = model.decode((call.x - call.level.s * guided) / call.level.a)
    expected = [in_scipy(item.permute(1, 2, 0).double().numpy()) > 5 for item in image]
    assert 0 < np.mean(expected) < 1
    assert (OneStepEdges(threshold=5).feature(call, model).numpy() == np.stack(expected)).mean() > 0.999


def test_needs_an_autoencoder():
    call, model = with_images(None)
    with pytest.raises(ValueError, match="decode is None"):
        OneStepEdges().feature(call, dataclasses.replace(model, decode=None))


def test_an_image_that_is_not_finite_has_no_edges_to_count():
    image = stripe(20, 5)
    broken = image.clone()
    broken[0, 3, 4] = torch.nan
    call, model = with_images(torch.stack([image, broken, image]))
    features = OneStepEdges().feature(call, model)
    assert np.isnan(OneStepEdges().compare(features))
    assert OneStepEdges().compare(features[::2]) == pytest.approx(40 / 400)
