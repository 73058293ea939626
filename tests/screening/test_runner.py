"""The runner on a pipeline that only pretends: nothing is lost, repeated or silently passed."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from sd_guard.screening import runner
from sd_guard.screening.prompts import MAX_SEED, PromptRow
from sd_guard.screening.records import read_run
from sd_guard.screening.runner import expand, plan_run, screen
from sd_guard.screening.settings import ModelSettings, RunSettings
from sd_guard.screening.summary import summary_table


class Pretender:
    """Flags prompts with "memorized", blocks those with "hopeless", raises on "broken", is killed at `kill_at`."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.guarded = True
        self.calls: list[tuple[str, int, bool]] = []
        self.kill_at = kill_at

    @property
    def guard(self) -> Any:
        return SimpleNamespace(detector=SimpleNamespace(threshold=0.5), mine=True) if self.guarded else None

    def enable_guard(self, guard: Any = None, **settings: Any) -> None:
        assert guard.mine
        assert settings == {"on_failure": "blank"}
        self.guarded = True

    def disable_guard(self) -> None:
        self.guarded = False

    def __call__(self, *, prompt: list[str], generator: list[Any], **arguments: Any) -> Any:
        seeds = [each.initial_seed() for each in generator]
        self.calls += [(text, seed, self.guarded) for text, seed in zip(prompt, seeds, strict=True)]
        if self.kill_at is not None and len(self.calls) > self.kill_at:
            raise KeyboardInterrupt
        if any("broken" in text for text in prompt):
            raise RuntimeError("CUDA out of memory\nsecond line")
        images = [
            Image.new("RGB", (8, 8), (seed % 256, 200 if self.guarded and "memorized" in text else 0, 0))
            for text, seed in zip(prompt, seeds, strict=True)
        ]
        records = [self.record(text) for text in prompt] if self.guarded else None
        return SimpleNamespace(images=images, records=records)

    @staticmethod
    def record(text: str) -> Any:
        flagged, hopeless = "memorized" in text, "hopeless" in text
        return SimpleNamespace(
            verdict="flag" if flagged else "pass",
            outcome="blocked" if hopeless else "rescued" if flagged else "passed",
            score=0.9 if flagged else 0.1,
            decided_at_step=3,
            statistics=(),
            attempts=(),
            extra_lanes=10 if flagged else 2,
            fingerprint="f",
            reason="no attempt passed" if hopeless else None,
        )


PROMPTS = ["a", "memorized b", "c", "memorized hopeless d", "e"]


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,family\n" + "".join(f"{text},{text[0]}\n" for text in PROMPTS))
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text("{}")
    return RunSettings(
        prompts=prompts, out=tmp_path / "run", model=ModelSettings(model=str(model)), seeds=2, batch_size=3
    )


def test_expand_counts_on_from_each_rows_own_seed() -> None:
    jobs = expand([PromptRow("a"), PromptRow("b", "f", 7)], seeds=2, seed=3)
    assert [(job.index, job.prompt, job.seed) for job in jobs] == [(0, "a", 3), (1, "a", 4), (2, "b", 7), (3, "b", 8)]
    with pytest.raises(ValueError, match="would exceed"):
        expand([PromptRow("a", None, MAX_SEED)], seeds=2, seed=0)


def test_a_run_has_a_row_an_image_and_files_for_all_but_the_blocked(settings: RunSettings) -> None:
    rows = screen(plan_run(settings), lambda model: Pretender())
    assert [(row["prompt"], row["seed"]) for row in rows] == [(text, seed) for text in PROMPTS for seed in (0, 1)]
    for row in rows:
        if "hopeless" in row["prompt"]:
            assert (row["image"], row["outcome"]) == (None, "blocked")
        else:
            assert row["image"] is not None
            assert (settings.out / row["image"]).is_file()
    assert {row["image_before"] for row in rows} == {None}
    assert pq.read_table(settings.out / "records.parquet").to_pylist() == rows
    manifest = json.loads((settings.out / "run.json").read_text())
    assert (manifest["images"], manifest["threshold"], manifest["configuration"]["steps"]) == (10, 0.5, 50)
    assert manifest["finished"] >= manifest["started"]


@pytest.mark.parametrize("kill_at", [0, 3, 7, 9])
@pytest.mark.parametrize("batch_size", [3, 1])
def test_resuming_a_killed_run_repeats_and_misses_no_row(settings: RunSettings, kill_at: int, batch_size: int) -> None:
    whole = screen(plan_run(replace(settings, out=settings.out.parent / "whole")), lambda model: Pretender())
    with pytest.raises(KeyboardInterrupt):
        screen(plan_run(settings), lambda model: Pretender(kill_at))
    again = Pretender()
    rows = screen(plan_run(replace(settings, batch_size=batch_size), resume=True), lambda model: again)
    assert rows == whole == read_run(settings.out)
    assert len(again.calls) == len(rows) - kill_at // 3 * 3


def test_a_finished_run_resumes_without_a_model(settings: RunSettings) -> None:
    rows = screen(plan_run(settings), lambda model: Pretender())
    assert screen(plan_run(settings, resume=True), lambda model: pytest.fail("loaded a model")) == rows


def test_resume_refuses_another_configuration_and_says_what_differs(settings: RunSettings) -> None:
    screen(plan_run(settings), lambda model: Pretender())
    changed = replace(settings, seeds=3, model=replace(settings.model, steps=10))
    with pytest.raises(ValueError, match=r"steps was 50, now 10, seeds was 2, now 3"):
        plan_run(changed, resume=True)
    (Path(settings.model.model) / "weights.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="model_fingerprint was"):
        plan_run(settings, resume=True)


def test_an_output_folder_in_use_is_refused_and_left_alone(settings: RunSettings) -> None:
    settings.out.mkdir()
    (settings.out / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="is not empty; add --resume"):
        plan_run(settings)
    with pytest.raises(ValueError, match=r"has no run\.json"):
        plan_run(settings, resume=True)
    assert [path.name for path in settings.out.iterdir()] == ["mine.txt"]


def test_a_row_that_fails_is_unscored_and_its_batch_goes_on(settings: RunSettings) -> None:
    settings.prompts.write_text("prompt\na\nbroken b\nmemorized c\n")
    rows = screen(plan_run(replace(settings, seeds=1)), lambda model: Pretender())
    assert [row["outcome"] for row in rows] == ["passed", "unscored", "rescued"]
    assert (rows[1]["score"], rows[1]["image"]) == (None, None)
    assert rows[1]["reason"] == "RuntimeError: CUDA out of memory"


def test_a_first_batch_that_wholly_fails_is_an_error_and_leaves_the_folder_free(settings: RunSettings) -> None:
    settings.prompts.write_text("prompt\nbroken a\nbroken b\nc\n")
    for _ in range(2):
        plan = plan_run(replace(settings, batch_size=4, seeds=1))
        with pytest.raises(ValueError, match="first batch could be made"):
            screen(replace(plan, jobs=plan.jobs[:2]), lambda model: Pretender())
    assert screen(plan, lambda model: Pretender())[2]["outcome"] == "passed"


def test_keep_before_reruns_only_flagged_rows_unguarded(settings: RunSettings) -> None:
    pipe = Pretender()
    rows = screen(plan_run(replace(settings, keep_before=True)), lambda model: pipe)
    unguarded = [(text, seed) for text, seed, guarded in pipe.calls if not guarded]
    assert unguarded == [(text, seed) for text in PROMPTS if "memorized" in text for seed in (0, 1)]
    assert pipe.guarded
    for row in rows:
        assert row["image_before"] is not None
        if row["flagged"]:
            assert row["image_before"] != row["image"]
            assert Image.open(settings.out / row["image_before"]).getpixel((0, 0)) == (row["seed"], 0, 0)
        else:
            assert row["image_before"] == row["image"]
    assert len(list((settings.out / "images").iterdir())) == 6 + 2 + 4


def test_a_full_disk_ends_the_run_instead_of_unscoring_it(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    plan = plan_run(settings)
    monkeypatch.setattr(runner, "write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        screen(plan, lambda model: Pretender())
    assert not (settings.out / "records.parquet").exists()


def test_summary_counts_each_family_and_the_total(settings: RunSettings) -> None:
    settings.prompts.write_text("prompt,family\na,\nmemorized b,m\nmemorized hopeless c,m\nbroken,m\n")
    table = summary_table(screen(plan_run(replace(settings, seeds=1)), lambda model: Pretender()))
    lines = [line.split() for line in table.splitlines() if not line.startswith("--")]
    assert lines[1:] == [
        ["-", "1", "0", "0", "0", "0", "2.0"],
        ["m", "3", "2", "1", "1", "1", "6.7"],
        ["total", "4", "2", "1", "1", "1", "5.5"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1
