"""The curvature map against exact diagonals, and against its own probes on exact Jacobians."""

import pytest
import torch
from oracles import GaussianMixture, PointMass

from sd_guard.statistics.curvature import CurvatureDifference
from sd_guard.trace import RowSeeds, draw_probes
from tests.statistics.cases import SHAPE, jacobian, noise, oracle_case


def gaussian(variance, seed=1):
    return GaussianMixture(noise(1, seed).flatten(1), torch.tensor([variance]))


def test_multiples_of_the_identity_need_one_probe():
    """J = s / (s^2 + a^2 v) I: 1 / s for a point mass."""
    call, model = oracle_case(gaussian(1.0), PointMass(torch.zeros(16)), 300, noise(3))
    a, s = call.level.a, call.level.s
    expected = SHAPE[0] * (1 / s - s / (s**2 + a**2))
    places = CurvatureDifference(probes=1).places(call, model)
    torch.testing.assert_close(places, torch.full((3, 2, 2), expected, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(CurvatureDifference(probes=2).measure(call, model), places.mean((1, 2)))


def test_only_the_positive_part_counts():
    call, model = oracle_case(PointMass(torch.zeros(16)), gaussian(1.0), 300, noise(3))
    assert CurvatureDifference(probes=1).measure(call, model).tolist() == [0.0] * 3


def test_mixtures_against_their_exact_jacobians():
    control, conditional = (
        GaussianMixture(noise(3, i).flatten(1), torch.full((3,), v)) for i, v in ((1, 0.5), (2, 0.1))
    )
    call, model = oracle_case(control, conditional, 600, noise(3, 7))
    difference = jacobian(conditional, call) - jacobian(control, call)
    probes = [draw_probes(call.x.shape, RowSeeds(model.seeds), "rademacher", "cpu", i).double() for i in range(5)]
    quadratic = [v * torch.einsum("bij,bj->bi", difference, v.flatten(1)).reshape(v.shape) for v in probes]
    expected = torch.stack(quadratic).mean(0).sum(1).relu()
    places = CurvatureDifference(probes=5).places(call, model)
    torch.testing.assert_close(places, expected, rtol=1e-4, atol=1e-6)
    assert 0 < (places == 0).float().mean() < 1


def test_many_probes_find_the_diagonal():
    control, conditional = (
        GaussianMixture(noise(2, i).flatten(1), torch.full((2,), v)) for i, v in ((1, 0.9), (2, 0.3))
    )
    call, model = oracle_case(control, conditional, 600, noise(1, 7))
    difference = jacobian(conditional, call) - jacobian(control, call)
    exact = difference.diagonal(dim1=1, dim2=2).reshape(1, *SHAPE).sum(1).relu()
    spread = (
        (difference.square().sum(2) - difference.diagonal(dim1=1, dim2=2).square()).reshape(1, *SHAPE).sum(1).sqrt()
    )
    places = CurvatureDifference(probes=200).places(call, model)
    # Rows of one place may be correlated: the sum of C terms is at most sqrt(C) times their root-sum-square.
    assert ((places - exact).abs() <= 4 * spread * SHAPE[0] ** 0.5 / 200**0.5).all()


def test_cost_and_refusal():
    assert CurvatureDifference().lanes == 32
    with pytest.raises(ValueError, match="probes=0"):
        CurvatureDifference(probes=0)
