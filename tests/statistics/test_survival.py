"""How much of a flagged picture is left in another one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sd_guard.statistics.sharpness import resemblance, survival, what_is_left


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_the_picture_itself_survives_and_an_unrelated_one_does_not() -> None:
    flagged, other = pictures(500), pictures(500, seed=1)
    control = torch.zeros_like(flagged)
    assert survival(flagged, flagged, control).tolist() == pytest.approx([1.0] * 500)
    assert float(survival(other, flagged, control).mean()) == pytest.approx(0.0, abs=0.1)
    assert float(survival(other, flagged, control).max()) < 0.5


def test_it_is_never_less_than_the_edges_say() -> None:
    """A faint copy on another ground is one by its edges alone."""
    flagged = pictures(3)
    copy = 0.3 * flagged + 5.0
    assert survival(copy, flagged, torch.zeros_like(flagged)).tolist() == pytest.approx([1.0] * 3)
    assert (
        survival(pictures(50, 2), pictures(50, 3), torch.zeros(50, 4, 8, 8))
        >= resemblance(pictures(50, 2), pictures(50, 3))
    ).all()


def test_the_same_ground_with_other_edges_is_seen() -> None:
    """One shape on even ground, which moved: what edges lose, colour keeps."""
    flagged, moved = torch.full((1, 4, 8, 8), 1.5), torch.full((1, 4, 8, 8), 1.5)
    flagged[..., 1:3, 1:3], moved[..., 5:7, 5:7] = -0.5, -0.5
    assert float(resemblance(moved, flagged)) == pytest.approx(0.0, abs=1e-6)
    assert float(survival(moved, flagged, torch.zeros_like(flagged))) > 0.3


def test_the_free_part_of_a_template_does_not_count() -> None:
    """Where the prompt moved nothing, the pictures may differ as they like."""
    flagged, control = pictures(100), torch.zeros(100, 4, 8, 8)
    control[..., 4:] = flagged[..., 4:]
    other = flagged.clone()
    other[..., 4:] = pictures(100, seed=5)[..., 4:]
    everywhere = survival(other, flagged, torch.zeros_like(flagged))
    assert float(survival(other, flagged, control).mean()) > float(everywhere.mean()) + 0.05


def test_by_hand_in_one_place() -> None:
    """Two places, of which the prompt moved one by 2 and the other by 1: weights 4 and 1."""
    flagged = torch.tensor([2.0, 1.0]).reshape(1, 1, 1, 2)
    other = torch.tensor([2.5, 2.0]).reshape(1, 1, 1, 2)
    distance = (4 * 0.5**2 + 1 * 1.0**2) / 5
    edges = 1.0  # both fall from left to right
    found = float(survival(other, flagged, torch.zeros_like(flagged)))
    assert found == pytest.approx(max(edges, (edges + 1 - distance / 2) / 2))
    risen = other.flip(-1)
    distance = (4 * 0.0**2 + 1 * 1.5**2) / 5
    assert float(survival(risen, flagged, torch.zeros_like(flagged))) == pytest.approx((-1 + 1 - distance / 2) / 2)


def test_rows_do_not_see_each_other_and_half_precision_is_enough() -> None:
    flagged, other, control = pictures(5), pictures(5, 1), 0.1 * pictures(5, 2)
    together = survival(other, flagged, control)
    alone = torch.cat([survival(other[i : i + 1], flagged[i : i + 1], control[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone)
    half = survival(other.bfloat16(), flagged.bfloat16(), control.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, together, atol=0.02, rtol=0.0)


def test_nothing_brought_along_is_finite_and_nan_is_not_a_number() -> None:
    flat = torch.zeros(1, 4, 8, 8)
    assert survival(flat, flat, flat).isfinite().all()
    assert survival(flat * float("nan"), pictures(1), flat).isnan().all()


def test_what_all_predictions_have_in_common_is_no_memory() -> None:
    """Half of each picture is the latent's own: of that a prediction without the prompt has as much."""
    common = pictures(200)
    flagged, control, other = (common + pictures(200, seed) for seed in (1, 2, 3))
    assert float(resemblance(other, flagged).mean()) == pytest.approx(0.5, abs=0.05)
    assert float(what_is_left(other, flagged, control).mean()) == pytest.approx(0.0, abs=0.05)
    assert what_is_left(flagged, flagged, control).tolist() == pytest.approx([1.0] * 200)
    assert what_is_left(control, flagged, control).tolist() == pytest.approx([0.0] * 200, abs=1e-5)


def test_what_is_left_stays_within_its_range() -> None:
    """Also where the control is as good as the picture, or one flagged picture is compared with many."""
    flagged = pictures(1)
    left = what_is_left(pictures(50, 1), flagged, flagged)
    assert left.tolist() == [-1.0] * 50
    assert what_is_left(pictures(50, 1), flagged, pictures(1, 2)).shape == (50,)
