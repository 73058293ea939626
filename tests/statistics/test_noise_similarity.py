"""Multi-scale SSIM against one in SciPy, and the feature against its definition."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from sd_guard.pipelines.trajectory import denoiser_of
from sd_guard.statistics.noise_similarity import NoiseSimilarity, multiscale_ssim
from tests.statistics.cases import SEEDS, tiny_calls, tiny_pipe


def smooth(plane, radius):
    full = gaussian_filter(plane, 1.5, radius=radius)
    return full[radius:-radius, radius:-radius] if radius else full


def reference(x, y, scales, radius=5):
    """(C, H, W) each, in NumPy."""
    value = 1.0
    for scale in range(scales):
        seen = []
        for a, b in zip(x, y, strict=True):
            ma, mb = smooth(a, radius), smooth(b, radius)
            va, vb = smooth(a * a, radius) - ma**2, smooth(b * b, radius) - mb**2
            term = (2 * (smooth(a * b, radius) - ma * mb) + 0.0009) / (va + vb + 0.0009)
            if scale == scales - 1:
                term = term * (2 * ma * mb + 0.0001) / (ma**2 + mb**2 + 0.0001)
            seen.append(term)
        value *= max(np.mean(seen), 0.0) ** 0.33
        if scale < scales - 1:
            x, y = (i.reshape(len(i), i.shape[1] // 2, 2, i.shape[2] // 2, 2).mean((2, 4)) for i in (x, y))
    return value


def pictures(side, amount):
    rng = np.random.default_rng(0)
    base = gaussian_filter(rng.random((4, side, side)), (0, 2, 2))
    base = (base - base.min()) / (base.max() - base.min())
    other = np.clip(base + amount * rng.standard_normal(base.shape), 0, 1)
    return base, other


@pytest.mark.parametrize(("side", "scales", "radius"), [(64, 3, 5), (44, 3, 5), (32, 2, 5), (16, 1, 5), (8, 1, 3)])
@pytest.mark.parametrize("amount", [0.05, 0.4])
def test_equals_ssim_in_scipy(side, scales, radius, amount):
    x, y = pictures(side, amount)
    value = multiscale_ssim(torch.from_numpy(x)[None], torch.from_numpy(y)[None])
    assert value.item() == pytest.approx(reference(x, y, scales, radius), rel=1e-6)
    assert 0 < value.item() < 1


def test_a_negative_of_a_picture_counts_as_unlike():
    x = torch.from_numpy(pictures(64, 0)[0])[None]
    assert multiscale_ssim(x, 1 - x).item() == 0
    assert multiscale_ssim(x, x).item() == pytest.approx(1)


def test_the_most_alike_pair_decides():
    features = torch.rand(4, 4, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features[3] = (features[1] + 0.02 * features[3]).clamp(0, 1)
    pairs = [reference(features[i].numpy(), features[j].numpy(), 2) for i, j in itertools.combinations(range(4), 2)]
    assert NoiseSimilarity().compare(features) == pytest.approx(max(pairs), rel=1e-6)
    assert max(pairs) == pairs[4]  # of seeds 1 and 3


def test_the_feature_is_the_prediction_less_the_noise_channel_by_channel():
    pipe = tiny_pipe()
    call = tiny_calls(pipe, steps=1)[0]
    difference = (call.conditional - call.x).numpy()
    low, high = (f(difference, axis=(2, 3), keepdims=True) for f in (np.min, np.max))
    feature = NoiseSimilarity().feature(call, denoiser_of(pipe, SEEDS))
    np.testing.assert_allclose(feature, (difference - low) / (high - low))
    flat = dataclasses.replace(call, conditional=call.x + 1)
    assert NoiseSimilarity().feature(flat, denoiser_of(pipe, SEEDS)).isfinite().all()
