"""The runner on a pipeline that only pretends: nothing is lost, repeated or silently passed."""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from screening.fakes import Pretender

from benchmarks.null_runs import NullScreener, null_settings
from sd_guard.screening import settings as settings_module
from sd_guard.screening import storage
from sd_guard.screening.jobs import Job
from sd_guard.screening.records import Shard, find_shards, read_run
from sd_guard.screening.runner import missing_batches, plan_run, screen
from sd_guard.screening.screener import Screened
from sd_guard.screening.settings import RunSettings

PROMPTS = ["a", "memorized b", "c", "memorized hopeless d", "e"]


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return null_settings(tmp_path, PROMPTS, seeds=2)


def rewrite(settings: RunSettings, *prompts: str) -> RunSettings:
    Path(settings.prompts).write_text("\n".join(["prompt", *prompts]) + "\n")
    return replace(settings, seeds=1)


def run(settings: RunSettings, pipe: Pretender | None = None, *, resume: bool = False) -> list[Any]:
    assert screen(plan_run(settings, resume=resume), (pipe or Pretender()).screener) is not None
    return read_run(Path(settings.out))


def test_a_run_has_a_row_an_image_and_files_for_all_but_the_blocked(settings: RunSettings) -> None:
    rows = run(settings)
    assert [(row["prompt"], row["seed"]) for row in rows] == [(text, seed) for text in PROMPTS for seed in (0, 1)]
    for row in rows:
        if "hopeless" in row["prompt"]:
            assert (row["image"], row["outcome"]) == (None, "blocked")
        else:
            assert row["image"] is not None
            assert (Path(settings.out) / row["image"]).is_file()
    assert {row["image_before"] for row in rows} == {None}
    assert pq.read_table(Path(settings.out) / "records.parquet").to_pylist() == rows
    assert not (Path(settings.out) / "shards").exists()
    manifest = json.loads((Path(settings.out) / "run.json").read_text())
    assert (manifest["images"], manifest["threshold"], manifest["configuration"]["steps"]) == (10, 0.5, 50)
    assert manifest["finished"] >= manifest["started"]
    assert manifest["fingerprint"] == "f"


@pytest.mark.parametrize("kill_at", [0, 3, 7, 9])
@pytest.mark.parametrize("batch_size", [3, 1])
def test_resuming_a_killed_run_repeats_and_misses_no_row(settings: RunSettings, kill_at: int, batch_size: int) -> None:
    whole = run(replace(settings, out=Path(settings.out).parent / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(settings, Pretender(kill_at))
    again = Pretender()
    rows = run(replace(settings, batch_size=batch_size), again, resume=True)
    assert rows == whole
    assert len(again.calls) == len(rows) - kill_at // 3 * 3


def test_a_finished_run_resumes_without_a_model(settings: RunSettings) -> None:
    rows = run(settings)
    assert screen(plan_run(settings, resume=True), lambda asked: pytest.fail("loaded a model")) is not None
    assert read_run(Path(settings.out)) == rows


def test_resume_refuses_another_configuration_and_says_what_differs(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(settings)
    changed = replace(settings, seeds=3, model=replace(settings.model, steps=10))
    with pytest.raises(ValueError, match=r"steps was 50, now 10, seeds was 2, now 3"):
        plan_run(changed, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(settings_module, "package_version", lambda name: "99")
        with pytest.raises(ValueError, match=r"version was .*, now '99'"):
            plan_run(settings, resume=True)
    with pytest.raises(ValueError, match="prompts was"):
        plan_run(rewrite(settings, "another"), resume=True)
    (Path(settings.model.model) / "weights.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="model_fingerprint was"):
        plan_run(settings, resume=True)


def test_an_output_folder_in_use_is_refused_and_left_alone(settings: RunSettings) -> None:
    out = Path(settings.out)
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="is not empty; add --resume"):
        plan_run(settings)
    with pytest.raises(ValueError, match=r"has no run\.json"):
        plan_run(settings, resume=True)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_list_with_a_bad_row_leaves_no_trace(settings: RunSettings) -> None:
    with pytest.raises(ValueError, match="line 5001: the prompt is empty"):
        plan_run(rewrite(settings, *(f"prompt {i}" for i in range(4999)), " "))
    assert not Path(settings.out).exists()


def test_bad_rows_are_left_out_when_asked_and_listed(settings: RunSettings) -> None:
    rows = run(replace(rewrite(settings, "a", " ", "b", "x,y"), skip_bad=True))
    assert [(row["index"], row["prompt"]) for row in rows] == [(0, "a"), (1, "b")]
    skipped = (Path(settings.out) / "skipped.txt").read_text().splitlines()
    assert [line.split(": ")[0].rpartition(", ")[2] for line in skipped] == ["line 3", "line 5"]


def test_a_row_that_fails_is_unscored_and_its_batch_goes_on(settings: RunSettings) -> None:
    rows = run(rewrite(settings, "a", "broken b", "memorized c"))
    assert [row["outcome"] for row in rows] == ["passed", "unscored", "rescued"]
    assert (rows[1]["score"], rows[1]["image"]) == (None, None)
    assert rows[1]["reason"] == "RuntimeError: CUDA out of memory"


def test_a_first_batch_that_wholly_fails_is_an_error_and_leaves_the_folder_free(settings: RunSettings) -> None:
    broken = replace(rewrite(settings, "broken a", "broken b", "c"), batch_size=2)
    for _ in range(2):
        with pytest.raises(ValueError, match="first batch could be made"):
            run(broken)
    assert run(replace(broken, batch_size=3))[2]["outcome"] == "passed"


@pytest.mark.parametrize(("allowed", "stopped"), [(0.5, False), (0.2, True)])
def test_a_run_whose_images_cannot_be_scored_is_stopped(settings: RunSettings, allowed: float, stopped: bool) -> None:
    texts = ["broken" if i % 3 == 1 else "ok" for i in range(150)]
    asked = replace(rewrite(settings, *texts), batch_size=10, max_unscored=allowed)
    if not stopped:
        assert sum(row["outcome"] == "unscored" for row in run(asked)) == 50
        return
    with pytest.raises(ValueError, match=r"33 of 100 .* --max-unscored 0.2 .*CUDA out of memory"):
        run(asked)
    assert not (Path(settings.out) / "records.parquet").exists()


def test_keep_before_reruns_only_flagged_rows_unguarded(settings: RunSettings) -> None:
    pipe = Pretender()
    rows = run(replace(settings, keep_before=True), pipe)
    unguarded = [(text, seed) for text, seed, guarded in pipe.calls if not guarded]
    assert unguarded == [(text, seed) for text in PROMPTS if "memorized" in text for seed in (0, 1)]
    assert pipe.guarded
    for row in rows:
        assert row["image_before"] is not None
        if row["flagged"]:
            assert row["image_before"] != row["image"]
            before = Image.open(Path(settings.out) / row["image_before"])
            assert before.getpixel((0, 0)) == (row["seed"], 0, 0)
        else:
            assert row["image_before"] == row["image"]
    assert len(list((Path(settings.out) / "images").iterdir())) == 6 + 2 + 4


def test_a_full_disk_ends_the_run_in_one_line_and_loses_no_row(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 12
    real = os.fsync

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)
        with pytest.raises(ValueError, match=r"cannot be written .No space left on device.; make room, and go on"):
            run(settings)
    kept = sum(len(shard.rows) for shard in find_shards(Path(settings.out)))
    assert 0 < kept < 10
    again = Pretender()
    assert len(run(settings, again, resume=True)) == 10
    assert len(again.calls) == 10 - kept


def test_the_prompts_of_the_next_batch_are_named_before_the_one_before_it_is_screened(settings: RunSettings) -> None:
    pipe = Pretender()
    run(settings, pipe)
    jobs = [text for text in PROMPTS for _ in range(2)]
    size = settings.batch_size
    assert pipe.expected == [jobs[start : start + size] for start in range(size, len(jobs), size)]


def test_what_cannot_be_begun_ahead_ends_no_run(settings: RunSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Pretender, "encode_ahead", fail)
    assert [row["outcome"] for row in run(settings)].count("unscored") == 0


class Interrupted(NullScreener):
    """Is sent a signal while it screens its second batch, which it finishes."""

    def screen(self, jobs: Sequence[Job]) -> Screened:
        if jobs[0].index == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().screen(jobs)


def test_an_interrupt_finishes_the_batch_and_writes_it(settings: RunSettings) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        screen(plan_run(settings), lambda asked: Interrupted())
    assert signal.getsignal(signal.SIGINT) is before
    assert [shard.rows for shard in find_shards(Path(settings.out))] == [range(3), range(3, 6)]
    assert screen(plan_run(settings, resume=True), lambda asked: NullScreener()) is not None
    assert [row["index"] for row in read_run(Path(settings.out))] == list(range(10))


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=8)


@given(done=RANGES, total=st.integers(0, 60), size=st.integers(1, 10))
def test_missing_batches_are_what_no_shard_holds_cut_at_multiples(
    done: list[tuple[int, int]], total: int, size: int
) -> None:
    shards = [Shard(range(start, min(start + n, total)), 0, 0) for start, n in sorted(done) if start < total]
    held = {place for shard in shards for place in shard.rows}
    batches = list(missing_batches(total, shards, size))
    assert [place for batch in batches for place in batch] == [place for place in range(total) if place not in held]
    assert all(batch.start // size == (batch.stop - 1) // size for batch in batches)


def test_the_summary_counts_each_family_and_the_total(settings: RunSettings) -> None:
    Path(settings.prompts).write_text("prompt,family\na,\nmemorized b,m\nmemorized hopeless c,m\nbroken,m\n")
    summary = screen(plan_run(replace(settings, seeds=1, batch_size=2)), Pretender().screener)
    assert summary is not None
    table = summary.table()
    lines = [line.split() for line in table.splitlines() if not line.startswith("--")]
    assert lines[1:] == [
        ["-", "1", "0", "0", "0", "0", "2.0"],
        ["m", "3", "2", "1", "1", "1", "6.7"],
        ["total", "4", "2", "1", "1", "1", "5.5"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1
    assert summary.reasons == {"RuntimeError": 1}
