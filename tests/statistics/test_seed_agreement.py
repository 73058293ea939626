"""Other seeds, against worlds where what they must show is known."""

import math

import pytest
import torch
from oracles import GaussianMixture, PointMass

from sd_guard.noise import CLEAR_SIGMA, NoiseLevel, Prediction, nearest_level
from sd_guard.pipelines.trajectory import denoiser_of
from sd_guard.statistics.seed_agreement import (
    SEEN_SIGMA,
    SeedAgreement,
    excess_agreement,
    other_noise,
    other_places,
    predict_from_other_seed,
    seed_agreement,
    step_down,
)
from tests.statistics.cases import ALPHAS, SEEDS, noise, on_its_own, oracle_case, tiny_calls, tiny_pipe

SHAPE, D = (4, 8, 8), 256
PICTURE = noise(1, 1, SHAPE)
NOTHING = PointMass(torch.zeros(D))
MEMORY = PointMass(PICTURE.flatten())
# As many pictures as there are seeds to tell apart, far from each other: which one comes is decided by the noise.
MANY = GaussianMixture(noise(4096, 2, SHAPE).flatten(1), torch.full((4096,), 1e-3))


def agreement(conditional, timestep=300, images=8):
    call, model = oracle_case(NOTHING, conditional, timestep, other_noise(range(100, 100 + images), PICTURE).double())
    return SeedAgreement().measure(call, model), model


def test_a_memory_is_the_same_for_every_seed():
    value, model = agreement(MEMORY)
    torch.testing.assert_close(value.float(), torch.ones(8), rtol=0, atol=0.03)  # its faintest windows count for less
    assert model.unet.rows == SeedAgreement().lanes * 8


def test_an_ordinary_prompt_has_another_picture_for_each_seed():
    value, _ = agreement(MANY)
    assert value.max() < 0.4


def test_what_is_there_without_the_prompt_is_no_agreement():
    """The prompt adds nothing to what this noise shows anyway."""
    call, model = oracle_case(MEMORY, MEMORY, 300, noise(2, 0, SHAPE))
    assert SeedAgreement().measure(call, model).tolist() == [0.0, 0.0]


def test_one_even_colour_is_nobodys_memory():
    value, _ = agreement(PointMass(torch.full((D,), 0.7)))
    assert value.abs().max() < 0.01


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_is_the_oracles_own(kind):
    """From the noise to the lower level by the exact prediction, and its answer there, whatever the UNet returns."""
    _, model = oracle_case(NOTHING, MANY, 300, noise(2, 0, SHAPE))
    places, seeds = other_places(ALPHAS), [5, 6]
    x = other_noise(seeds, noise(1, 0, SHAPE), 3)
    for (_, level), lower in ((places.first, places.seen[1]), (places.seen, None)):
        ahead = Prediction(MANY.predict_noise(x, level), MANY.denoise(x, level))
        x = x if lower is None else step_down(ahead, lower)
    model.unet.lanes = [oracle.as_unet(ALPHAS, kind) for oracle in (NOTHING, MANY)]
    object.__setattr__(model, "prediction_type", kind)
    lanes = oracle_case(NOTHING, MANY, 300, x)[0].lanes.select(torch.tensor([2, 3]))
    found = predict_from_other_seed(model, lanes, x, seeds, 3)
    torch.testing.assert_close(found, ahead.x0_hat, rtol=1e-4, atol=1e-4)


def test_places_are_the_checkpoints_own():
    first, seen = other_places(ALPHAS)
    assert first == nearest_level(ALPHAS, CLEAR_SIGMA)
    assert seen[1].sigma == pytest.approx(SEEN_SIGMA, rel=0.01)
    noisiest = max(NoiseLevel.from_alpha_bar(float(value)).sigma for value in ALPHAS)
    assert first[1].sigma == pytest.approx(min(noisiest, CLEAR_SIGMA), rel=0.01)


def test_places_where_the_schedule_ends_in_noise_alone():
    """Zero terminal signal: the last timestep's ratio is infinite."""
    alphas = torch.linspace(0.999, 0, 1000, dtype=torch.float64)
    first, seen = other_places(alphas)
    assert math.isfinite(first[1].sigma)
    assert first[1].sigma == pytest.approx(CLEAR_SIGMA, rel=0.2)
    assert seen[1].sigma == pytest.approx(SEEN_SIGMA, rel=0.05)


def test_noise_depends_on_seed_and_number_only():
    whole = other_noise([1, 2, 2**64 - 1], PICTURE)
    torch.testing.assert_close(other_noise([2], PICTURE), whole[1:2], rtol=0, atol=0)
    assert (other_noise([2], PICTURE, 1) != whole[1]).all()
    assert (torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)) != whole[1]).all()


@pytest.mark.parametrize("row", range(3))
def test_rows_do_not_see_each_other(row):
    pipe = tiny_pipe()
    call = tiny_calls(pipe)[1]
    whole = SeedAgreement().measure(call, denoiser_of(pipe, SEEDS))
    alone = SeedAgreement().measure(*on_its_own(call, pipe, row))
    torch.testing.assert_close(alone, whole[row : row + 1])


def test_more_is_ordinary_of_what_is_seen_through_more_noise():
    x0_hat, other, nothing = noise(3, 0, SHAPE), noise(3, 1, SHAPE), torch.zeros(3, *SHAPE)
    agreed = seed_agreement(x0_hat, nothing, other)
    levels = [*map(NoiseLevel.from_sigma, (2.0, 12.0, 120.0, 1500.0)), NoiseLevel.from_alpha_bar(0.0)]
    low, high, higher, highest, nothing_left = (agreed - excess_agreement(x0_hat, nothing, other, at) for at in levels)
    assert (low < high).all()
    torch.testing.assert_close(higher - high, torch.full((3,), 0.1 * math.log(10), dtype=torch.float64))
    assert (highest > higher).all()
    assert torch.equal(highest, nothing_left)  # zero terminal SNR: sampling begins without a signal
    assert (nothing_left < 0.8).all()  # what has one picture for all noise stays above it


def test_broken_predictions_stay_alone_and_unscored():
    x0_hat = noise(2, 0, SHAPE)
    other = x0_hat.clone()
    other[0, 0, 0, 0] = torch.nan
    value = seed_agreement(x0_hat, torch.zeros_like(x0_hat), other)
    assert value.isnan().tolist() == [True, False]
