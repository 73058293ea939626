"""Whether a predicted picture has stayed where it was."""

from __future__ import annotations

import math

import pytest
import torch

from sd_guard.noise import NoiseLevel
from sd_guard.statistics.sharpness import PLAIN, detail, excess_persistence, persistence, resemblance


def test_persistence_of_a_settled_picture_is_one() -> None:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    faint = torch.tensor([1.0, 0.5, 0.2]).reshape(3, 1, 1, 1)
    assert persistence(faint * x + 7.0, x) == pytest.approx([1.0] * 3, abs=0.03)  # however faint, on whatever ground


def test_persistence_of_unrelated_pictures_is_low() -> None:
    first, second = torch.randn(2, 500, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert float(persistence(first, second).mean()) < 0.2
    assert float(persistence(first, second).max()) < 0.5


@pytest.mark.parametrize("size", [(4, 8, 8), (4, 64, 64), (4, 16, 24)])
def test_persistence_sees_a_template_whose_other_part_is_free(size: tuple[int, int, int]) -> None:
    """The left half stays and the right half does not: the better half of the windows tells."""
    then = torch.randn(200, *size, generator=torch.Generator().manual_seed(2))
    now = then.clone()
    now[..., size[2] * 5 // 8 :] = torch.randn_like(now[..., size[2] * 5 // 8 :])
    assert float(persistence(then, now).mean()) > 0.9
    assert float(resemblance(then, now).mean()) < 0.7


def test_persistence_of_a_pixel_is_none() -> None:
    assert persistence(torch.ones(2, 4, 1, 1), torch.ones(2, 4, 1, 1)).isnan().all()


def test_persistence_of_nothing_is_finite() -> None:
    flat = torch.zeros(2, 4, 8, 8)
    assert persistence(flat, flat).tolist() == [0.0, 0.0]
    assert persistence(flat, torch.randn_like(flat)).tolist() == [0.0, 0.0]


def test_persistence_rows_do_not_see_each_other() -> None:
    then, now = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    alone = torch.cat([persistence(then[i : i + 1], now[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(persistence(then, now), alone)


def test_persistence_against_a_window_by_window_computation() -> None:
    then, now = torch.randn(2, 1, 2, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def edges(x: torch.Tensor) -> dict[tuple[int, int], list[float]]:
        image = x[0]
        found = {}
        for i in range(8):
            for j in range(8):
                right = (image[:, i, j + 1] - image[:, i, j]).tolist() if j < 7 else [0.0, 0.0]
                below = (image[:, i + 1, j] - image[:, i, j]).tolist() if i < 7 else [0.0, 0.0]
                found[i, j] = right + below
        return found

    a, b = edges(then), edges(now)
    dot = lambda p, q, c: sum(x * y for x, y in zip(p[c], q[c], strict=True))  # noqa: E731
    windows = [[(i + di, j + dj) for di in range(3) for dj in range(3)] for i in range(6) for j in range(6)]
    sums = [[sum(dot(p, q, c) for c in w) / 9 for w in windows] for p, q in ((a, b), (a, a), (b, b))]
    own, other = (0.02 * sum(energies) / 36 for energies in sums[1:])
    cosines = sorted(ab / ((aa + own) * (bb + other)) ** 0.5 for ab, aa, bb in zip(*sums, strict=True))
    assert float(persistence(then, now)) == pytest.approx(sum(cosines[18:]) / 18, abs=1e-5)


def test_a_plain_picture_is_settled_and_no_memory() -> None:
    """With a tenth of the detail that counts as any, a tenth of the persistence."""
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    plain = 0.1 * PLAIN / detail(x).reshape(4, 1, 1, 1) * x
    assert persistence(x, plain) == pytest.approx([0.1] * 4, abs=0.005)
    assert persistence(plain, x) == pytest.approx([0.1] * 4, abs=0.005)  # or what was hardly there yet
    assert persistence(x, 20 * plain) == pytest.approx([1.0] * 4, abs=0.03)


def test_more_persistence_is_ordinary_where_more_noise_is_left() -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    levels = [NoiseLevel.from_sigma(sigma) for sigma in (math.inf, 5.0, 1.5, 0.5, 0.0)]
    excess = torch.stack([excess_persistence(x, x, level) for level in levels])
    assert (excess.diff(dim=0) >= 0).all()  # the same picture stands out more and more
    assert (excess[0] == -math.inf).all()  # what is nothing but noise shows nothing
    torch.testing.assert_close(excess[-1], persistence(x, x) - 0.79)
