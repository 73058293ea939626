"""From measurements to a table: how well each statistic, at each step, answers each question.

One row a statistic x step x question x number of images looked at:

| column | type | meaning |
|---|---|---|
| `statistic` | string | its name |
| `step` | int32 | index into the scheduler's timesteps |
| `question` | string | memorized families / others that they are told from |
| `images` | int32 | of a prompt that a decision rests on: 1, or all seeds (their mean, as Wen et al. 2024) |
| `positives`, `negatives` | int32 | decisions of either class |
| `unscored` | int32 | decisions without a number; they count as not flagged |
| `auroc` | float64 | see `sd_guard.evaluation.metrics` |
| `tpr_at_1_fpr`, `tpr_at_3_fpr` | float64 | true-positive rate where at most 1 % or 3 % of the negatives are flagged |
| `..._low`, `..._high` | float64 | 95 % interval over clusters of near-duplicate prompts; NaN for a single cluster |
| `lanes` | float64 | lane evaluations beyond the sampler's own, mean of the images of the negatives |
| `milliseconds` | float64 | of measuring, an image: median over the images |
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa

from sd_guard.evaluation.collect import Described, Measurements, Table
from sd_guard.evaluation.metrics import (
    Bools,
    Floats,
    Metric,
    Weights,
    at_rate,
    cluster_prompts,
    interval,
    resample,
    weighted_auroc,
)
from sd_guard.screening.families import FAMILIES, MEMORIZED, OTHER, Kind, kind_of

METRICS: Final[Mapping[str, Metric]] = {
    "auroc": weighted_auroc,
    "tpr_at_1_fpr": at_rate(0.01),
    "tpr_at_3_fpr": at_rate(0.03),
}
SCHEMA: Final = pa.schema(
    [
        pa.field("statistic", pa.string(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        *(pa.field(name, pa.int32(), nullable=False) for name in ("images", "positives", "negatives", "unscored")),
        *(pa.field(f"{name}{end}", pa.float64()) for name in METRICS for end in ("", "_low", "_high")),
        pa.field("lanes", pa.float64(), nullable=False),
        pa.field("milliseconds", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Question:
    """Which families are to be told from which."""

    name: str
    positives: tuple[Kind, ...]
    negatives: tuple[Kind, ...]


QUESTIONS: Final = (
    Question("verbatim / novel", ("verbatim",), ("novel",)),
    Question("verbatim / plain", ("verbatim",), ("plain",)),
    Question("verbatim / novel + plain", ("verbatim",), ("novel", "plain")),
    Question("template / novel", ("template",), ("novel",)),
    Question("template / plain", ("template",), ("plain",)),
    Question("template / novel + plain", ("template",), ("novel", "plain")),
    Question("both / novel + plain", ("verbatim", "template"), ("novel", "plain")),
)
EVERYTHING: Final = Question("memorized / rest", MEMORIZED, OTHER)


@dataclass(frozen=True, slots=True)
class _Series:
    """One statistic at one step: scores (P, S), higher being memorized, of S seeds (1 where they were compared)."""

    described: Described
    step: int
    scores: Floats
    compared: bool
    lanes: Floats
    milliseconds: float


def questions_for(kinds: Collection[Kind]) -> list[Question]:
    """Of a list with these families: those that have all of theirs, and all memorized ones against the rest."""
    present = set(kinds)
    asked = [question for question in QUESTIONS if present >= {*question.positives, *question.negatives}]
    whole = ({*MEMORIZED} & present, {*OTHER} & present)
    same = any(({*question.positives}, {*question.negatives}) == whole for question in asked)
    return asked if same else [*asked, EVERYTHING]


def tabulate(measurements: Measurements, *, resamples: int = 500, seed: int = 0) -> Table:
    """The table of this module's docstring.

    Args:
        measurements: Of labelled prompts, all seeds of each.
        resamples: Of the bootstrap; all rows of a question share them.
        seed: Of the resampling.

    Raises:
        ValueError: Measurements are missing, or a label is not known, or only one class is there.
        ImportError: The extra `eval` is not installed.
    """
    by_prompt = measurements.values.group_by("index", use_threads=False)
    first = by_prompt.aggregate([("prompt", "first"), ("family", "first")])
    prompts = {row["index"]: row for row in first.to_pylist()}
    order = sorted(prompts)
    kinds = np.array([_kind(prompts[index]["family_first"]) for index in order])
    clusters = cluster_prompts([prompts[index]["prompt_first"] for index in order])
    series = list(_series(measurements, len(order)))
    rows: list[dict[str, Any]] = []
    for question in questions_for(cast("list[Kind]", np.unique(kinds).tolist())):
        asked = np.isin(kinds, question.positives + question.negatives)
        positive = np.isin(kinds[asked], question.positives)
        weights = resample(positive, clusters[asked], resamples=resamples, seed=seed)
        each = np.repeat(weights, measurements.seeds, axis=0)  # the seeds of a prompt stand or fall together
        for one in series:
            judge = partial(_judge, one, question.name, float(one.lanes[asked][~positive].mean()))
            scores = one.scores[asked]
            if not one.compared:
                images = np.repeat(positive, measurements.seeds)
                rows.append(judge(1, scores.ravel(), images, each))
            if measurements.seeds > 1:
                rows.append(judge(measurements.seeds, scores.mean(1), positive, weights))
    names = [described.name for described in measurements.statistics]
    rows.sort(key=lambda row: (names.index(row["statistic"]), row["step"]))  # stable: questions stay in their order
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def best_steps(table: Table, question: str, images: int) -> list[dict[str, Any]]:
    """Each statistic's best step by AUROC (the earliest among equals), best statistic first (the cheapest)."""
    best: dict[str, dict[str, Any]] = {}
    for row in table.to_pylist():
        if (row["question"], row["images"]) == (question, images):
            kept = best.get(row["statistic"])
            if kept is None or row["auroc"] > kept["auroc"]:
                best[row["statistic"]] = row
    return sorted(best.values(), key=lambda row: (-row["auroc"], row["lanes"]))


def markdown(table: Table) -> str:
    """For each question and number of images, a table of each statistic at its best step."""
    parts = [
        "Each statistic at its best step, chosen on these very prompts: on others it will do less well. In brackets, "
        "95 % intervals over prompts. Of fewer than 100 (34) negatives, 1 % (3 %) are none: no false alarm at all."
    ]
    for question, images in dict.fromkeys(zip(table["question"].to_pylist(), table["images"].to_pylist(), strict=True)):
        rows = best_steps(table, question, images)
        parts.append(
            f"### {question}, {images} image{'s' if images > 1 else ''} a decision "
            f"({rows[0]['positives']} / {rows[0]['negatives']})\n\n"
            "| statistic | step | AUROC | TPR at 1 % FPR | TPR at 3 % FPR | unscored | lanes | ms |\n"
            "|---|---|---|---|---|---|---|---|\n" + "\n".join(_line(row) for row in rows)
        )
    return "\n\n".join(parts) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    metrics = [_with_interval(row[name], row[f"{name}_low"], row[f"{name}_high"]) for name in METRICS]
    cost = [f"{row['unscored']}", f"{row['lanes']:.3g}", f"{row['milliseconds']:.3g}"]
    return f"| {' | '.join([row['statistic'], str(row['step']), *metrics, *cost])} |"


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f}" + ("" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]")


def _judge(
    series: _Series, question: str, lanes: float, images: int, scores: Floats, positive: Bools, weights: Weights
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "statistic": series.described.name,
        "step": series.step,
        "question": question,
        "images": images,
        "positives": int(positive.sum()),
        "negatives": int((~positive).sum()),
        "unscored": int(np.isnan(scores).sum()),
        "lanes": lanes,
        "milliseconds": series.milliseconds,
    }
    for name, metric in METRICS.items():
        row[name] = float(metric(scores, positive, np.ones((len(scores), 1)))[0])
        row[f"{name}_low"], row[f"{name}_high"] = interval(metric, scores, positive, weights)
    return row


def _series(measurements: Measurements, prompts: int) -> Iterator[_Series]:
    """Each statistic at each step; in each, prompts in the order of their index, and seeds in theirs."""
    values = measurements.values.sort_by([(key, "ascending") for key in ("statistic", "step", "index", "seed")])
    names = values["statistic"].combine_chunks().dictionary_encode()
    codes, words = names.indices.to_numpy(), names.dictionary.to_pylist()
    steps, numbers, lanes, costs = (values[name].to_numpy() for name in ("step", "value", "lanes", "milliseconds"))
    compared = values["seed"].is_null().to_numpy()
    starts = np.flatnonzero((np.diff(codes, prepend=-1) != 0) | (np.diff(steps, prepend=-1) != 0))
    described = {each.name: each for each in measurements.statistics}
    for start, end in zip(starts, [*starts[1:], len(codes)], strict=True):
        name = words[codes[start]]
        width = 1 if compared[start] else measurements.seeds
        if end - start != prompts * width:
            found = f"{end - start} values of {prompts * width}"
            raise ValueError(f"{name} has {found} at step {steps[start]}; resume the evaluation to complete it")
        scores = numbers[start:end].reshape(prompts, width)
        sign = 1.0 if described[name].higher_is_memorized else -1.0
        yield _Series(
            described[name],
            int(steps[start]),
            np.where(np.isfinite(scores), sign * scores, np.nan),
            bool(compared[start]),
            lanes[start:end].reshape(prompts, width),
            float(np.median(costs[start:end])),
        )


def _kind(family: str | None) -> Kind:
    kind = None if family is None else kind_of(family)
    if kind is None:
        raise ValueError(f"family {family!r} is not known; use one of {', '.join(FAMILIES)}")
    return kind
