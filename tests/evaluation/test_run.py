"""The engine on a tiny pipeline: everything checked before a model is loaded, nothing lost, nothing repeated."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from evaluation.fakes import Alike, Norm, Probed

import sd_guard.statistics
from sd_guard.evaluation import settings as evaluation_settings
from sd_guard.evaluation.run import evaluate, plan_evaluation
from sd_guard.evaluation.settings import EvaluationSettings
from sd_guard.reference import checkpoint_path
from sd_guard.screening.settings import ModelSettings

LIST = [("a red cat", "verbatim"), ("a blue dog", "novel"), ("two green birds", "novel"), ("the wall", "plain")]
LIST += [("a fish by someone", "verbatim"), ("the old town", "novel")]


class Killed(BaseException):
    """As a signal would end the process."""


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(sd_guard.statistics, "STATISTICS", {"norm": Norm, "probed": Probed}, raising=False)
    monkeypatch.setattr(sd_guard.statistics, "SEED_STATISTICS", {"alike": Alike}, raising=False)


def write(path: Path, rows=LIST) -> Path:
    lines = "\n".join(json.dumps({"prompt": p, **({} if f is None else {"family": f})}) for p, f in rows)
    path.write_text(lines + "\n", encoding="utf-8")
    return path


@pytest.fixture
def settings(tmp_path):
    return EvaluationSettings(
        prompts=write(tmp_path / "prompts.jsonl"),
        out=tmp_path / "out",
        model=ModelSettings(model=str(checkpoint_path()), steps=5),
        statistics=("norm", "probed", "alike"),
        seeds=2,
        observe_at=(0.0, 0.4),
        batch_size=4,
    )


def never(_):
    raise AssertionError("no model may be loaded")


def values(out: Path):
    table = pq.read_table(out / "measurements.parquet").drop_columns(["milliseconds"])
    return table.sort_by([(name, "ascending") for name in ("index", "seed", "statistic", "step")]).to_pylist()


def test_writes_tables_and_a_figure_that_agree(settings, pipe):
    out = evaluate(settings, lambda _: pipe)
    assert {path.name for path in out.iterdir()} == {
        "run.json", "measurements.parquet", "table.csv", "table.parquet", "table.md", "auroc.png",
    }  # fmt: skip
    table = pq.read_table(out / "table.parquet")
    from_csv = pyarrow.csv.read_csv(out / "table.csv")
    assert from_csv.column_names == table.column_names
    assert from_csv["auroc"].to_pylist() == pytest.approx(table["auroc"].to_pylist())
    assert set(table["statistic"].to_pylist()) == {"norm", "probed", "alike"}
    assert len(values(out)) == 6 * (2 * 2 + 2 * 2 + 1)
    assert json.loads((out / "run.json").read_text())["finished"] is not None


def test_a_killed_run_goes_on_with_at_most_one_batch_repeated(settings, pipe, tmp_path, monkeypatch):
    whole = evaluate(replace(settings, out=tmp_path / "whole"), lambda _: pipe)
    calls = []

    class Deadly(Norm):
        def measure(self, call, model):
            calls.append(len(call.x))
            if len(calls) == 4:  # the second of two steps of the second batch
                raise Killed
            return super().measure(call, model)

    monkeypatch.setattr(sd_guard.statistics, "STATISTICS", {"norm": Deadly, "probed": Probed})
    with pytest.raises(Killed):
        evaluate(settings, lambda _: pipe)
    assert len(list((settings.out / "shards").iterdir())) == 1
    with pytest.raises(ValueError, match="--resume"):
        evaluate(settings, never)
    with pytest.raises(ValueError, match="seeds was 2, now 3"):
        evaluate(replace(settings, seeds=3, resume=True), never)
    with pytest.raises(ValueError, match="observe_at was"):
        evaluate(replace(settings, observe_at=(0.0,), resume=True), never)
    with pytest.raises(ValueError, match="statistics was"):
        evaluate(replace(settings, statistics=("norm",), resume=True), never)
    calls.clear()
    calls += [0] * 4
    evaluate(replace(settings, resume=True), lambda _: pipe)
    assert sum(calls) == 2 * 2 * 4  # four prompts of six, two seeds, two steps: the first batch is not repeated
    for row, other in zip(values(settings.out), values(whole), strict=True):
        assert row["value"] == pytest.approx(other["value"], rel=1e-4, abs=1e-4)
        assert {**row, "value": 0} == {**other, "value": 0}
    assert not (settings.out / "shards").exists()
    before = (settings.out / "table.csv").read_bytes()
    evaluate(replace(settings, resume=True), never)  # nothing left to measure
    assert (settings.out / "table.csv").read_bytes() == before


def test_an_error_is_one_line_and_a_run_without_measurements_leaves_the_folder_free(settings, pipe, monkeypatch):
    class Failing(Norm):
        def measure(self, call, model):
            raise RuntimeError("out of memory\nat some place")

    monkeypatch.setattr(sd_guard.statistics, "STATISTICS", {"norm": Failing})
    with pytest.raises(ValueError, match=r"measuring ended \(RuntimeError: out of memory\); nothing was measured"):
        evaluate(replace(settings, statistics=("norm",)), lambda _: pipe)
    assert list(settings.out.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([("a", "verbatim"), ("b", None)], "1 of 2 prompts have no family"),
        ([("a", "verbatim"), ("b", "TM")], "has only memorized prompts"),
        ([("a", "novel"), ("b", "plain")], "has only other prompts"),
        ([("a", "verbatin"), ("b", "novel")], "'verbatin' is not known"),
    ],
)
def test_labels_that_are_missing_or_one_sided_are_refused(settings, tmp_path, rows, named):
    write(settings.prompts, rows)
    with pytest.raises(ValueError, match=named) as caught:
        evaluate(settings, never)
    assert "\n" not in str(caught.value)
    assert str(settings.prompts) in str(caught.value)
    assert not settings.out.exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(statistics=("norm", "nrom")), "'nrom' is no statistic; there are guard, norm, probed, alike"),
        (dict(statistics=()), "needs names"),
        (dict(statistics=("norm", "norm")), "each once"),
        (dict(statistics=("alike",), seeds=1), "alike compares the seeds"),
    ],
)
def test_statistics_that_cannot_be_measured_are_refused(settings, changes, named):
    with pytest.raises(ValueError, match=named):
        evaluate(replace(settings, **changes), never)
    assert not settings.out.exists()


def test_one_seed_leaves_out_what_compares_seeds_and_names_choose(settings):
    alone = plan_evaluation(replace(settings, statistics=None, seeds=1))
    assert alone.with_guard
    assert [s.name for s in alone.statistics] == ["norm", "probed"]
    assert alone.seed_statistics == ()
    settings = replace(settings, out=settings.out.with_name("other"))
    chosen = plan_evaluation(replace(settings, statistics=("alike", "probed")))
    assert not chosen.with_guard
    assert [s.name for s in (*chosen.statistics, *chosen.seed_statistics)] == ["probed", "alike"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(seeds=0), "--seeds"),
        (dict(batch_size=0), "--batch-size"),
        (dict(observe_at=(1.5,)), "observe_at"),
        (dict(model=ModelSettings(model="a/b", height=64)), "--height"),
    ],
)
def test_settings_out_of_range_are_refused(settings, changes, named):
    with pytest.raises(ValueError, match=named):
        replace(settings, **changes)


def test_without_the_extra_it_is_named(settings, monkeypatch):
    monkeypatch.setattr(evaluation_settings, "find_spec", lambda name: None if name == "sklearn" else object())
    with pytest.raises(ValueError, match=r"sklearn not installed; pip install 'sd-guard\[eval\]'"):
        replace(settings, seeds=1)
