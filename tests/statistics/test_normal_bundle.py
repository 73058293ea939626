"""The normal bundle's dimension against subspaces, and what too few perturbations make of it."""

import dataclasses

import pytest
import torch
from oracles import GaussianSubspace, PointMass

from sd_guard.noise import NoiseLevel
from sd_guard.statistics.normal_bundle import NormalBundleLid, rank_by_gap
from tests.statistics.cases import ALPHAS, noise, oracle_case

SHAPE, D = (4, 4, 4), 64


def case(k, rows=2):
    oracle = GaussianSubspace(D, k, variance=4.0, shift=1.0) if k else PointMass(noise(1, 1, SHAPE))
    level = NoiseLevel.from_alpha_bar(float(ALPHAS[20]))
    return oracle_case(PointMass(torch.zeros(D)), oracle, 20, oracle.noised(rows, level, SHAPE))


@pytest.mark.parametrize("k", [0, 1, 5, 40, 63])
@pytest.mark.parametrize("perturbations", [2 * D, 4 * D])
def test_more_perturbations_than_dimensions_find_it(k, perturbations):
    call, model = case(k)
    assert NormalBundleLid(perturbations=perturbations).measure(call, model).tolist() == [k, k]


def test_fewer_perturbations_than_normal_directions_see_only_themselves():
    call, model = case(5)
    assert NormalBundleLid(perturbations=16).measure(call, model).tolist() == [D - 16] * 2


def test_rank_is_told_by_the_largest_gap():
    basis = torch.linalg.qr(noise(1, 3, (9, 9))[0])[0]
    for values, rank in (
        ([5.0, 4.0, 3.9, 0.1, 0.05], 3),
        ([5.0, 4.0, 3.0, 2.5, 2.4], 5),
        ([9.0, 1.0, 0.9, 0.8, 0.7], 1),
    ):
        matrix = basis[:, :5] * torch.tensor(values) @ torch.linalg.qr(basis[:5, :5])[0].T
        assert float(rank_by_gap(matrix)) == rank


def test_a_model_that_fails_is_not_scored():
    call, model = case(5)

    def unet(sample, *_, **__):
        out = sample.clone()
        out[0] = torch.nan
        return (out,)

    value = NormalBundleLid(perturbations=4).measure(call, dataclasses.replace(model, unet=unet))
    assert value.isnan().tolist() == [True, False]


def test_refuses_what_shows_no_gap():
    with pytest.raises(ValueError, match="perturbations=1"):
        NormalBundleLid(perturbations=1)
