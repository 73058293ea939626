"""The table against scikit-learn on made-up measurements."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from sklearn.metrics import roc_auc_score

from sd_guard.evaluation.collect import SCHEMA, Described, Measurements
from sd_guard.evaluation.figure import draw
from sd_guard.evaluation.metrics import tpr_at
from sd_guard.evaluation.table import best_steps, markdown, questions_for, tabulate

FAMILIES = ["verbatim"] * 12 + ["TM"] * 8 + ["plain"] * 10 + ["novel"] * 30
SEEDS = 4
WORDS = np.random.default_rng(3).permutation([f"{a}{b}{c}" for a in "kvdzp" for b in "aeiou" for c in "nrlst"])


def made_up(families=FAMILIES, seeds=SEEDS):
    """`up` and `down` (lower is memorized) at two steps, and `pair`, which compares seeds; and the scores of each."""
    rng = np.random.default_rng(0)
    memorized = np.array([family not in ("plain", "novel", "other") for family in families])
    scores = {
        (name, step): rng.normal(size=(len(families), seeds)) + memorized[:, None] * gap
        for name in ("up", "down")
        for step, gap in ((2, 0.5), (5, 1.5))
    }
    if seeds > 1:
        scores["pair", 0] = rng.normal(size=(len(families), 1)) + memorized[:, None]
    described = (Described("up", True), Described("down", False), Described("pair", True))
    lanes = {"up": 2.0, "down": 0.0, "pair": 0.5}
    rows = []
    for (name, step), values in scores.items():
        sign = -1 if name == "down" else 1
        for index, prompt in enumerate(values):
            for j, value in enumerate(prompt):
                seed = None if name == "pair" else index + j * 1_000_000
                text = " ".join(WORDS[[index, (7 * index + 3) % 125, (31 * index + 11) % 125]])
                rows.append((index, text, families[index], seed, name, step, sign * value, lanes[name], 2.0 + step))
    rng.shuffle(rows)
    table = pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], schema=SCHEMA)
    return Measurements(values=table, statistics=described[: 3 if seeds > 1 else 2], seeds=seeds), scores


@pytest.fixture(scope="module")
def table():
    return tabulate(made_up()[0])


def test_every_row_is_that_of_the_scores_it_stands_for(table):
    _, scores = made_up()
    kinds = np.array(["template" if family == "TM" else family for family in FAMILIES])
    seen = set()
    for row in table.to_pylist():
        positives, negatives = row["question"].replace("both", "verbatim + template").split(" / ")
        asked = np.isin(kinds, [*positives.split(" + "), *negatives.split(" + ")])
        own = scores[row["statistic"], row["step"]][asked]
        positive = np.isin(kinds[asked], positives.split(" + "))
        if row["images"] == 1:
            own, positive = own.ravel(), np.repeat(positive, SEEDS)
        else:
            own = own.mean(1)
        assert row["auroc"] == pytest.approx(roc_auc_score(positive, own))
        assert row["tpr_at_1_fpr"] == pytest.approx(tpr_at(own, positive, 0.01))
        assert row["tpr_at_3_fpr"] == pytest.approx(tpr_at(own, positive, 0.03))
        for name in ("auroc", "tpr_at_1_fpr", "tpr_at_3_fpr"):
            assert 0 <= row[f"{name}_low"] <= row[f"{name}_high"] <= 1
        assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
        assert (row["positives"], row["negatives"]) == (positive.sum(), (~positive).sum())
        assert row["unscored"] == 0
        assert (row["lanes"], row["milliseconds"]) == (
            {"up": 2, "down": 0, "pair": 0.5}[row["statistic"]],
            2 + row["step"],
        )
        seen.add((row["statistic"], row["step"], row["question"], row["images"]))
    singles = 2 * 2 * 7 * 2  # names, steps, questions, numbers of images
    assert len(seen) == table.num_rows == singles + 7


def test_several_images_of_a_prompt_narrow_no_interval():
    """Seeds of a prompt that all say the same are one observation: the interval is that of one image a prompt."""
    measurements, _ = made_up()
    rows = [row for row in measurements.values.to_pylist() if row["statistic"] == "up"]
    first = {(row["index"], row["step"]): row["value"] for row in rows if row["seed"] < 1_000_000}
    rows = [{**row, "value": first[row["index"], row["step"]]} for row in rows]
    same = Measurements(
        values=pa.Table.from_pylist(rows, schema=SCHEMA), statistics=measurements.statistics[:1], seeds=SEEDS
    )
    for row, other in zip(*[iter(tabulate(same).to_pylist())] * 2, strict=True):
        assert (row["images"], other["images"]) == (1, SEEDS)
        for end in ("", "_low", "_high"):
            assert row[f"auroc{end}"] == pytest.approx(other[f"auroc{end}"], abs=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_unscored_image_is_counted(value):
    measurements, _ = made_up()
    rows = measurements.values.to_pylist()
    bare = next(row for row in rows if (row["statistic"], row["index"]) == ("up", 0))
    bare["value"] = value
    broken = Measurements(
        values=pa.Table.from_pylist(rows, schema=SCHEMA), statistics=measurements.statistics, seeds=SEEDS
    )
    for row in tabulate(broken, resamples=10).to_pylist():
        hit = row["statistic"] == "up" and row["step"] == bare["step"] and row["question"][:4] in ("verb", "both")
        assert row["unscored"] == (1 if hit else 0)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["verbatim", "novel"], ["verbatim / novel"]),
        (["memorized", "novel"], ["memorized / rest"]),
        (["template", "verbatim", "novel"], ["verbatim / novel", "template / novel", "memorized / rest"]),
        (["verbatim", "memorized", "plain"], ["verbatim / plain", "memorized / rest"]),
    ],
)
def test_questions_are_those_that_the_families_can_answer(kinds, expected):
    assert [question.name for question in questions_for(kinds)] == expected


def test_all_families_ask_every_question_once():
    names = [question.name for question in questions_for(["verbatim", "template", "plain", "novel"])]
    assert names[-1] == "both / novel + plain"
    assert len(set(names)) == len(names) == 7


def test_other_words_and_a_single_seed():
    measurements, scores = made_up(["memorized"] * 9 + ["other"] * 20, seeds=1)
    rows = tabulate(measurements, resamples=20).to_pylist()
    assert {(row["question"], row["images"]) for row in rows} == {("memorized / rest", 1)}
    for row in rows:
        own = scores[row["statistic"], row["step"]].ravel()
        assert row["auroc"] == pytest.approx(roc_auc_score(np.arange(29) < 9, own))


def test_the_best_step_is_told_with_its_intervals(table):
    best = best_steps(table, "both / novel + plain", 1)
    assert [row["auroc"] for row in best] == sorted((row["auroc"] for row in best), reverse=True)
    assert {(row["statistic"], row["step"]) for row in best} == {("up", 5), ("down", 5)}
    text = markdown(table)
    row = best[0]
    assert "chosen on these very prompts" in text
    assert f"| {row['statistic']} | 5 | {row['auroc']:.3f} [{row['auroc_low']:.3f}, {row['auroc_high']:.3f}] |" in text
    assert "### both / novel + plain, 4 images a decision (20 / 40)" in text
    assert "### verbatim / novel, 1 image a decision (48 / 120)" in text


@pytest.mark.parametrize("spoil", ["lost", "unlabelled"])
def test_refuses_what_is_incomplete(spoil):
    measurements, _ = made_up()
    rows = measurements.values.to_pylist()
    rows = rows[1:] if spoil == "lost" else [{**row, "family": None} for row in rows]
    broken = Measurements(
        values=pa.Table.from_pylist(rows, schema=SCHEMA), statistics=measurements.statistics, seeds=SEEDS
    )
    with pytest.raises(ValueError, match="resume" if spoil == "lost" else "family None"):
        tabulate(broken, resamples=10)


def test_the_figure_is_a_png_of_two_panels(table, tmp_path):
    from PIL import Image

    draw(table, tmp_path / "auroc.png", ours=("up",))
    one = table.filter(pc.equal(table["question"], "verbatim / novel"))
    draw(one, tmp_path / "one.png", ours=("up",))
    with Image.open(tmp_path / "auroc.png") as two_panels, Image.open(tmp_path / "one.png") as one_panel:
        assert two_panels.format == one_panel.format == "PNG"
        assert two_panels.width > one_panel.width > 600
        colours = {tuple(c) for c in np.asarray(two_panels.convert("RGB")).reshape(-1, 3).tolist()}
        assert (0xC1, 0x27, 0x2D) in colours  # the emphasised line is there
