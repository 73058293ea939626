"""PNG sizes against files that Pillow wrote, and a LID over them."""

import dataclasses

import numpy as np
import pytest
import torch
from oracles import GaussianMixture, PointMass
from PIL import Image

from sd_guard.statistics.complexity import (
    DecodedPngSize,
    LidPerPngSize,
    png_bytes,
    png_bytes_per_pixel,
    to_images,
)
from tests.statistics.cases import oracle_case

SIDE = 32


def decode(latents):
    """A flat image for latents below zero on average, the same noise for the others."""
    busy = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=latents.dtype)
    return torch.stack([busy if row.mean() > 0 else torch.full_like(busy, 0.5) for row in latents])


@pytest.fixture
def case():
    """The prompt's lane predicts a flat image, a busy one, a flat one."""
    x = torch.stack([-torch.ones(4, 2, 2), torch.ones(4, 2, 2), -2 * torch.ones(4, 2, 2)]).double()
    wide = GaussianMixture(torch.zeros(1, 16), torch.tensor([1.0]))
    call, model = oracle_case(PointMass(torch.zeros(16)), wide, 300, x)
    return call, dataclasses.replace(model, decode=decode)


def size_on_disk(array, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(array).save(path)
    return path.stat().st_size


def test_sizes_are_those_of_files(tmp_path):
    rng = np.random.default_rng(0)
    for array in (np.full((20, 30, 3), 77, np.uint8), rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)):
        size = size_on_disk(array, tmp_path)
        assert png_bytes(Image.fromarray(array)) == size
        assert png_bytes_per_pixel(Image.fromarray(array)) == size / 600


def test_images_are_rounded_not_cut():
    values = (
        torch.tensor([-1.0, 0.0, 0.499 / 255, 0.501 / 255, 254.6 / 255, 2.0]).reshape(1, 1, 2, 3).expand(2, 3, 2, 3)
    )
    first, second = to_images(values)
    assert first.mode == "RGB" and first.size == (3, 2)
    assert np.asarray(second)[..., 0].ravel().tolist() == [0, 0, 0, 1, 255, 255]


def test_the_decoded_prediction_is_what_is_measured(case, tmp_path):
    call, model = case
    busy = (decode(torch.ones(1, 4, 2, 2))[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    sizes = [size_on_disk(image, tmp_path) / SIDE**2 for image in (np.full((SIDE, SIDE, 3), 128, np.uint8), busy)]
    value = DecodedPngSize().measure(call, model)
    assert value.tolist() == [sizes[0], sizes[1], sizes[0]] and sizes[1] > 10 * sizes[0]


def test_lid_over_it(case):
    call, model = case
    share = call.level.a**2 / (call.level.s**2 + call.level.a**2)  # of an isotropic Gaussian of variance 1, exactly
    sizes = DecodedPngSize().measure(call, model)
    torch.testing.assert_close(LidPerPngSize(probes=1).measure(call, model), share / sizes, rtol=1e-6, atol=0)


def test_needs_an_autoencoder_and_probes(case):
    call, model = case
    blind = dataclasses.replace(model, decode=None)
    for statistic in (DecodedPngSize(), LidPerPngSize()):
        with pytest.raises(ValueError, match="decode is None"):
            statistic.measure(call, blind)
    with pytest.raises(ValueError, match="probes=0"):
        LidPerPngSize(probes=0)


def test_an_image_that_is_not_finite_has_no_size(case):
    call, model = case

    def broken(latents):
        images = decode(latents)
        images[0, 0, 0, 0] = torch.nan
        return images

    whole, value = (
        DecodedPngSize().measure(call, dataclasses.replace(model, decode=each)) for each in (decode, broken)
    )
    assert value[0].isnan() and torch.equal(value[1:], whole[1:])
