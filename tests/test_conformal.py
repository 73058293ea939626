"""The false-positive rate that a conformal threshold states is the one that it has."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sd_guard.calibration import conformal_threshold


@pytest.mark.parametrize("draw", ["normal", "standard_cauchy", "ties"])
@pytest.mark.parametrize(("n", "alpha"), [(19, 0.05), (40, 0.1), (99, 0.01), (150, 0.02)])
def test_false_positive_rate_over_many_splits(draw: str, n: int, alpha: float) -> None:
    """Mean over 400 splits of 200 fresh scores: at most alpha within four standard errors, and not idle either."""
    rng = np.random.default_rng(0)
    sample = (lambda size: rng.integers(0, 5, size).astype(float)) if draw == "ties" else getattr(rng, draw)
    splits = 400
    rates = [float((sample(size=200) > conformal_threshold(list(sample(size=n)), alpha)).mean()) for _ in range(splits)]
    mean, error = float(np.mean(rates)), float(np.std(rates)) / math.sqrt(splits)
    assert mean <= alpha + 4 * error
    if draw != "ties":  # without ties the rate is (n + 1 - rank) / (n + 1) in expectation, not just below alpha
        rank = math.ceil((n + 1) * (1 - alpha) - 1e-9)
        assert abs(mean - (n + 1 - rank) / (n + 1)) <= 4 * error


SPLITS = 200


@pytest.mark.parametrize("alpha", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("n", [99, 150, 400])
def test_false_positives_over_200_splits_lie_in_their_binomial_interval(alpha: float, n: int) -> None:
    """One fresh score a split: 200 independent trials at the stated rate."""
    rng = np.random.default_rng(n)
    exact = (n + 1 - math.ceil((n + 1) * (1 - alpha) - 1e-9)) / (n + 1)
    assert alpha - 1 / (n + 1) < exact <= alpha + 1e-12
    low, high = stats.binom.ppf([0.0005, 0.9995], SPLITS, exact)
    hits = 0
    for _ in range(SPLITS):
        *calibrating, fresh = rng.gamma(2.0, size=n + 1)
        hits += fresh > conformal_threshold(calibrating, alpha)
    assert low <= hits <= high


@pytest.mark.parametrize(("n", "alpha"), [(99, 0.01), (150, 0.02), (400, 0.05), (60, 0.05)])
def test_the_rate_of_one_calibration_is_beta_distributed(n: int, alpha: float) -> None:
    """On uniform scores a threshold q has the rate 1 - q exactly; over splits that is Beta(n + 1 - k, k)."""
    rng = np.random.default_rng(1)
    k = math.ceil((n + 1) * (1 - alpha) - 1e-9)
    rates = [1 - conformal_threshold(list(rng.random(n)), alpha) for _ in range(SPLITS)]
    assert stats.kstest(rates, stats.beta(n + 1 - k, k).cdf).pvalue > 1e-3


@pytest.mark.parametrize("levels", [1, 2, 5, 40])
def test_ties_only_make_it_cautious(levels: int) -> None:
    """The exact rate of a threshold on a die of so many sides, over splits of a pool with many ties."""
    rng = np.random.default_rng(2)
    thresholds = np.array([conformal_threshold(list(rng.integers(0, levels, 120)), 0.05) for _ in range(SPLITS)])
    rates = (levels - 1 - thresholds) / levels
    assert rates.mean() <= 0.05 + 4 * rates.std() / math.sqrt(SPLITS)


@pytest.mark.parametrize("each", [2, 4])
def test_the_rate_holds_where_a_prompt_has_several_images(each: int) -> None:
    """Images of one prompt that are nearly one another; counted as so many prompts, the rate is missed."""
    rng, prompts, alpha = np.random.default_rng(3), 40, 0.05
    exceeds = stats.norm(scale=math.hypot(1, 0.01)).sf

    def scores(count: int) -> Any:
        return (rng.normal(size=(count, 1)) + 0.01 * rng.normal(size=(count, each))).ravel()

    thresholds = [conformal_threshold(list(scores(prompts)), alpha, per_prompt=each) for _ in range(SPLITS)]
    rates = exceeds(thresholds)
    assert rates.mean() <= alpha + 4 * rates.std() / math.sqrt(SPLITS)
    naive = exceeds([conformal_threshold(list(scores(10)), alpha) for _ in range(SPLITS)])
    assert naive.mean() > alpha + 4 * naive.std() / math.sqrt(SPLITS)
    with pytest.raises(ValueError, match=f"at least {19 * each} are needed"):
        conformal_threshold(list(scores(18)), alpha, per_prompt=each)
    conformal_threshold(list(scores(19)), alpha, per_prompt=each)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(0.02, 0.9))
def test_threshold_is_the_conformal_quantile(scores: list[float], alpha: float) -> None:
    needed = math.ceil(1 / alpha - 1 - 1e-9)
    if len(scores) < needed:
        with pytest.raises(ValueError, match=f"{len(scores)} benign images .* at least {needed} are needed"):
            conformal_threshold(scores, alpha)
        return
    threshold = conformal_threshold(scores, alpha)
    assert threshold in scores
    assert sum(score > threshold for score in scores) <= alpha * (len(scores) + 1) + 1e-6


@pytest.mark.parametrize(("alpha", "needed"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.5, 1), (1 / 3, 2)])
def test_too_few_images_names_how_many(alpha: float, needed: int) -> None:
    with pytest.raises(ValueError, match=f"at least {needed} are needed"):
        conformal_threshold([0.0] * (needed - 1), alpha)
    assert conformal_threshold([*range(needed)], alpha) == needed - 1
