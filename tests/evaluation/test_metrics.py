"""The metrics against scikit-learn and brute force, the intervals against a known distribution."""

import csv
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from sd_guard.evaluation.metrics import (
    at_rate,
    auroc,
    bootstrap,
    cluster_prompts,
    interval,
    resample,
    tpr_at,
    weighted_auroc,
)

TIED = st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=60).filter(
    lambda pairs: len({positive for _, positive in pairs}) == 2
)


def arrays(pairs):
    return np.array([s for s, _ in pairs], dtype=float), np.array([p for _, p in pairs])


@given(TIED)
def test_auroc_is_that_of_scikit_learn_with_ties(pairs):
    scores, positive = arrays(pairs)
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)


@given(TIED, st.sampled_from([0.0, 0.01, 0.03, 0.25, 0.5, 0.9]))
def test_tpr_is_the_best_of_all_thresholds_that_keep_the_rate(pairs, rate):
    scores, positive = arrays(pairs)
    kept = [t for t in scores[~positive] if (scores[~positive] > t).mean() <= rate + 1e-12]
    assert tpr_at(scores, positive, rate) == pytest.approx(max((scores[positive] > t).mean() for t in kept))


@pytest.mark.parametrize(("negatives", "rate", "may_exceed"), [(100, 0.01, 1), (99, 0.01, 0), (2900, 0.01, 29)])
def test_no_more_negatives_than_the_rate_allows_are_flagged(negatives, rate, may_exceed):
    scores = np.concatenate([np.arange(negatives, dtype=float), np.arange(negatives) + 0.5])
    positive = np.arange(2 * negatives) >= negatives
    threshold = negatives - 1 - may_exceed
    assert tpr_at(scores, positive, rate) == pytest.approx((may_exceed + 1) / negatives)
    assert (scores[~positive] > threshold).sum() == may_exceed


def test_a_score_that_was_not_measured_is_not_flagged():
    scores, positive = np.array([math.nan, 2.0, 1.0, math.nan]), np.array([True, True, False, False])
    assert auroc(scores, positive) == pytest.approx((0.0 + 0.5 + 1.0 + 1.0) / 4)
    assert tpr_at(scores, positive, 0.01) == 0.5
    assert tpr_at(scores, positive, 0.5) == 0.5  # the unmeasured positive only ties with the unmeasured negative


@pytest.mark.parametrize("positive", [np.ones(3, bool), np.zeros(3, bool)])
def test_one_class_alone_is_refused(positive):
    for ask in (lambda: auroc(np.arange(3.0), positive), lambda: resample(positive, np.arange(3))):
        with pytest.raises(ValueError, match="one class"):
            ask()


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match="rate="):
        tpr_at(np.arange(2.0), np.array([True, False]), rate)


def test_weights_are_repetitions():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 30).astype(float), np.arange(30) < 12
    weights = rng.integers(0, 4, (30, 5))
    for metric in (weighted_auroc, at_rate(0.1)):
        for column, value in zip(weights.T, metric(scores, positive, weights.astype(np.float32)), strict=True):
            repeated, classes = np.repeat(scores, column), np.repeat(positive, column)
            expected = metric(repeated, classes, np.ones((len(repeated), 1)))[0]
            assert value == pytest.approx(expected, abs=1e-6)


def test_resamples_draw_whole_clusters_as_many_as_there_are_in_each_class():
    positive, clusters = np.arange(10) < 6, np.array([0, 0, 1, 1, 2, 2, 2, 2, 7, 8])
    weights = resample(positive, clusters, resamples=200)
    assert weights.shape == (10, 200)
    assert (weights[[0, 2, 4]] == weights[[1, 3, 5]]).all()
    assert (weights[[0, 2, 4]].sum(0) == 3).all()
    assert (weights[6] == weights[7]).all()  # cluster 2 again, on its own among the negatives
    assert (weights[[6, 8, 9]].sum(0) == 3).all()
    assert (weights[4] != weights[6]).any()
    assert (weights == resample(positive, clusters, resamples=200)).all()
    assert (weights != resample(positive, clusters, resamples=200, seed=1)).any()


def test_a_single_cluster_gives_no_interval():
    positive, clusters = np.arange(6) < 3, np.array([0, 0, 0, 1, 2, 3])
    assert all(math.isnan(end) for end in bootstrap(weighted_auroc, np.arange(6.0), positive, clusters))


def test_the_interval_covers_the_truth_and_only_clusters_do_where_prompts_repeat():
    """Two normal classes one deviation apart, each cluster four times the same score: AUROC is Phi(1 / sqrt 2)."""
    rng, truth = np.random.default_rng(1), 0.5 * (1 + math.erf(0.5))
    size, each, runs = 40, 4, 200
    positive, clusters = np.arange(2 * size * each) < size * each, np.arange(2 * size * each) // each
    weights = {
        name: resample(positive, labels)
        for name, labels in (("clustered", clusters), ("alone", np.arange(len(clusters))))
    }
    covered = dict.fromkeys(weights, 0)
    for _ in range(runs):
        scores = np.repeat(rng.normal(size=2 * size) + (np.arange(2 * size) < size), each)
        for name, drawn in weights.items():
            low, high = interval(weighted_auroc, scores, positive, drawn)
            covered[name] += low <= truth <= high
    assert 0.90 <= covered["clustered"] / runs <= 0.985
    assert covered["alone"] / runs < 0.8


def test_near_duplicates_share_a_cluster_and_others_do_not():
    prompts = [
        "Renegade RSS Laptop Backpack - View 91",
        "renegade rss laptop backpack - view 21",
        "ＲＥＮＥＧＡＤＥ RSS Laptop Backpack – View 81",
        "Living in the Light with Ann Graham Lotz",
        "Living in the Light With Ann Graham Lotz!",
        "a mule deer in Glacier National Park",
        "猫の写真",
        "猫の写真",
        "cat",
    ]
    labels = cluster_prompts(prompts)
    assert len(set(labels[:3])) == len(set(labels[3:5])) == len(set(labels[6:8])) == 1
    assert len(set(labels[[0, 3, 5, 6, 8]])) == 5
    assert len(set(cluster_prompts(["cat", "dog", "CAT"]))) == 2


def test_clusters_do_not_depend_on_the_order_of_the_list():
    with (Path(__file__).parents[2] / "prompts" / "reference.csv").open(encoding="utf-8") as file:
        prompts = [row["prompt"] for row in csv.DictReader(file)]
    order = np.random.default_rng(0).permutation(len(prompts))
    labels, other = cluster_prompts(prompts), cluster_prompts([prompts[i] for i in order])
    assert ((labels[order][:, None] == labels[order]) == (other[:, None] == other)).all()
    assert 50 < len(set(labels)) < len(prompts)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(ImportError, match=r"sd-guard\[eval\]"):
        cluster_prompts(["a", "b"])
