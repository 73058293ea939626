"""Detection metrics, and what they would have been on other prompts of the same kind.

Throughout, `scores` (N,) are higher for what is more memorized, and `positive` (N,) is true for the memorized ones. A
score that is NaN was not measured: it counts as *not flagged*, below every number, whichever class it is of.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import partial
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Weights = NDArray[np.float32 | np.float64]
Bools = NDArray[np.bool_]
Labels = NDArray[np.int64]

NEAR_DUPLICATE: Final = 0.5  # cosine similarity; see `cluster_prompts`
_ROUNDING: Final = 1e-9  # 0.01 * 2900 is 29 and a rounding error
_BLOCK: Final = 500  # prompts whose similarities to all others are held at once


class Metric(Protocol):
    """A metric under R weightings of the scores."""

    def __call__(self, scores: Floats, positive: Bools, weights: Weights) -> Floats:
        """(R,) from `scores` (N,), `positive` (N,) and `weights` (N, R), of which either class has some."""
        ...


def weighted_auroc(scores: Floats, positive: Bools, weights: Weights) -> Floats:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Args:
        scores: (N,).
        positive: (N,).
        weights: (N, R) at least 0; one AUROC for each column.

    Returns:
        (R,) in [0, 1].
    """
    scores, (ahead, behind) = _ordered(scores), _split(positive)
    behind = behind[np.argsort(scores[behind])]
    sums = _cumulative(weights[behind])
    won = sums[np.searchsorted(scores[behind], scores[ahead], "left")]
    won += sums[np.searchsorted(scores[behind], scores[ahead], "right")]
    w = weights[ahead]
    return np.einsum("pr,pr->r", w, won).astype(np.float64) / (2.0 * w.sum(0) * sums[-1])


def weighted_tpr_at(scores: Floats, positive: Bools, weights: Weights, *, rate: float) -> Floats:
    """True-positive rate at a false-positive rate of at most `rate`.

    The threshold is the lowest that no more than the share `rate` of the negatives exceeds; it is one of their scores,
    and a positive is found if it exceeds it as well. A positive that ties with it is missed.

    Args:
        scores: (N,).
        positive: (N,).
        weights: (N, R) at least 0; one rate for each column.
        rate: in [0, 1).

    Returns:
        (R,) in [0, 1].
    """
    scores, (ahead, behind) = _ordered(scores), _split(positive)
    ahead, behind = ahead[np.argsort(scores[ahead])], behind[np.argsort(-scores[behind])]
    exceeding = _cumulative(weights[behind])[1:]
    last = (exceeding > (rate + _ROUNDING) * exceeding[-1]).argmax(0)
    found = _cumulative(weights[ahead])
    missed = np.searchsorted(scores[ahead], scores[behind][last], "right")
    return 1.0 - found[missed, np.arange(found.shape[1])].astype(np.float64) / found[-1]


def auroc(scores: Floats, positive: Bools) -> float:
    """AUROC in [0, 1]; see `weighted_auroc`.

    Raises:
        ValueError: one of the classes is empty.
    """
    return float(weighted_auroc(scores, positive, _ones(positive))[0])


def tpr_at(scores: Floats, positive: Bools, rate: float) -> float:
    """True-positive rate in [0, 1] where at most the share `rate` of the negatives is flagged; see `weighted_tpr_at`.

    Raises:
        ValueError: one of the classes is empty, or `rate` is out of [0, 1).
    """
    return float(at_rate(rate)(scores, positive, _ones(positive))[0])


def at_rate(rate: float) -> Metric:
    """The metric `weighted_tpr_at` of one rate in [0, 1); a ValueError outside."""
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate} is no share of the negatives; give a number in [0, 1)")
    return partial(weighted_tpr_at, rate=rate)


def bootstrap(
    metric: Metric,
    scores: Floats,
    positive: Bools,
    clusters: Labels,
    *,
    resamples: int = 500,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of a metric over resampled clusters (Efron 1979; Davison and Hinkley 1997, ch. 2 and 5).

    Scores of one cluster stand or fall together. Where every resample gives the same value, as with a perfect AUROC,
    the interval has no width and says nothing of the certainty.

    Args:
        metric: `weighted_auroc`, or of `at_rate`.
        scores: (N,).
        positive: (N,).
        clusters: (N,) as of `cluster_prompts`; one that holds both classes counts in each by itself.
        resamples: how many.
        seed: of the resampling.

    Returns:
        Low and high end; NaN both if a class has a single cluster, which tells nothing of others.
    """
    return interval(metric, scores, positive, resample(positive, clusters, resamples=resamples, seed=seed))


def resample(positive: Bools, clusters: Labels, *, resamples: int = 500, seed: int = 0) -> NDArray[np.float32]:
    """How often each score is drawn when the clusters of either class are drawn anew, as many as there were.

    Args:
        positive: (N,).
        clusters: (N,).
        resamples: R.
        seed: of the drawing.

    Returns:
        (N, R) counts, laid out for the sums that the metrics take; all NaN if a class has a single cluster.
    """
    _ones(positive)
    rng = np.random.default_rng(seed)
    weights = np.empty((len(positive), resamples), dtype=np.float32)
    for own in _split(positive):
        names, place = np.unique(clusters[own], return_inverse=True)
        if len(names) == 1:
            return np.full_like(weights, np.nan)
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
        weights[own] = counts.T[place]
    return weights


def interval(metric: Metric, scores: Floats, positive: Bools, weights: Weights) -> tuple[float, float]:
    """As `bootstrap`, on the resamples (N, R) of `resample`, which many statistics may share."""
    if np.isnan(weights[0, 0]):
        return float("nan"), float("nan")
    low, high = np.quantile(metric(scores, positive, weights), (0.025, 0.975))
    return float(low), float(high)


def cluster_prompts(prompts: Sequence[str]) -> Labels:
    """Which prompts are near-duplicates of each other.

    Two are linked if, after Unicode NFKC and case folding, the cosine similarity of their character 5-grams, weighted
    by inverse document frequency in this list, is at least `NEAR_DUPLICATE`; a cluster is whatever links connect. At
    0.5, 146 of the 500 captions that Webster (2023, arXiv 2305.08694) found memorized have a near-duplicate ("... view
    91" and "... view 21"), and of 500 other LAION captions, 2 have.

    Args:
        prompts: N texts; 10,000 take seconds.

    Returns:
        (N,) labels of clusters, from 0.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from scipy.sparse import vstack
        from scipy.sparse.csgraph import connected_components
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError("clustering prompts needs scikit-learn; pip install 'sd-guard[eval]'") from error
    texts, place = np.unique([unicodedata.normalize("NFKC", text).casefold() for text in prompts], return_inverse=True)
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(5, 5), lowercase=False, binary=True)
    try:
        rows = vectorizer.fit_transform(texts)
    except ValueError:  # no text has five characters, so that only equal ones are duplicates
        return place.astype(np.int64)
    links = [rows[start : start + _BLOCK] @ rows.T >= NEAR_DUPLICATE for start in range(0, len(texts), _BLOCK)]
    return connected_components(vstack(links), directed=False)[1][place].astype(np.int64)


def _ordered(scores: Floats) -> Floats:
    return np.where(np.isnan(scores), -np.inf, scores)


def _split(positive: Bools) -> tuple[Labels, Labels]:
    """Places of the positives and of the negatives."""
    return np.flatnonzero(positive), np.flatnonzero(~positive)


def _cumulative(weights: Weights) -> Weights:
    """(N, R) to (N + 1, R): the sums of the first 0, 1, ... N rows; float32 is exact for counts below 2^24."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]), dtype=weights.dtype)
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums


def _ones(positive: Bools) -> Floats:
    """(N, 1) weights of one, once both classes are there."""
    if positive.all() or not positive.any():
        raise ValueError(f"all {len(positive)} scores are of one class; give positives and negatives")
    return np.ones((len(positive), 1))
