"""A row depends on prompt, seed and configuration: bit for bit where batches are cut at the same places."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import build, components, watching

from benchmarks.null_runs import NullScreener, null_row, null_settings
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.screening.jobs import Job
from sd_guard.screening.records import Row
from sd_guard.screening.runner import missing_batches, plan_run, screen
from sd_guard.screening.screener import AutoScreener, FullScreener, Screened, png
from sd_guard.screening.settings import ModelSettings

MODEL = ModelSettings(model="tiny/random", steps=6, guidance_scale=5.0)
JOBS = [Job(i, f"a {colour} ring number {i}", None, i % 4) for i, colour in enumerate(("red", "blue", "grey") * 4)]


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    return components()


@pytest.fixture(scope="module")
def threshold(parts: dict[str, Any]) -> float:
    """That half of the images exceed."""
    pipe = build(GuardedStableDiffusionPipeline, parts)
    pipe.enable_guard(watching())
    return float(np.median([row["score"] for row in FullScreener(pipe, MODEL).screen(JOBS).rows]))


def run(parts: dict[str, Any], threshold: float, batches: list[range]) -> tuple[list[Row], dict[str, bytes]]:
    """Rows in order of their index, and the files of their images, by a process of its own."""
    pipe = build(GuardedStableDiffusionPipeline, parts)
    pipe.enable_guard(watching(threshold))
    screener = FullScreener(pipe, MODEL, keep_before=True)
    done = [screener.screen([JOBS[place] for place in batch]) for batch in batches]
    rows = sorted((row for each in done for row in each.rows), key=lambda row: row["index"])
    return rows, {name: png(image()) for each in done for name, image in each.images.items()}


def test_neither_order_nor_workers_nor_an_interruption_changes_a_bit(parts: dict[str, Any], threshold: float) -> None:
    batches = list(missing_batches(len(JOBS), [], 4))
    rows, images = run(parts, threshold, batches)
    assert {row["outcome"] for row in rows} == {"passed", "rescued"}
    assert run(parts, threshold, batches[::-1]) == (rows, images)
    shares = [run(parts, threshold, part) for part in (batches[:1], batches[1:])]
    assert sorted((row for part, _ in shares for row in part), key=lambda row: row["index"]) == rows
    assert {**shares[0][1], **shares[1][1]} == images


def test_another_batch_size_changes_rounding_and_no_verdict(parts: dict[str, Any], threshold: float) -> None:
    rows, _ = run(parts, threshold, list(missing_batches(len(JOBS), [], 4)))
    others, _ = run(parts, threshold, list(missing_batches(len(JOBS), [], 1)))
    assert [row["score"] for row in others] == pytest.approx([row["score"] for row in rows], abs=1e-4)
    # Half lie above the threshold, which is midway between two scores: none is so near that rounding moves it.
    assert min(b - a for a, b in pairwise(sorted(row["score"] for row in rows if row["score"] is not None))) > 1e-6
    assert [row["outcome"] for row in others] == [row["outcome"] for row in rows]


class Doubtful(NullScreener):
    """A quick screener: flags "flag", is in doubt about "doubt", cannot score "broken"."""

    def screen(self, jobs: Any) -> Screened:
        rows = [null_row(job) for job in jobs]
        for row in rows:
            row["flagged"] = "flag" in row["prompt"]
            row["outcome"] = "unscored" if "broken" in row["prompt"] else "flagged" if row["flagged"] else "passed"
            if "doubt" in row["prompt"]:
                row["statistics"] = [
                    {"step": 2, "name": "trajectory_lid", "point": "noisy", "lane": "conditional", "value": 1.0}
                ]
        return Screened(rows)


class Whole(NullScreener):
    """A full screener, which notes the sizes of its batches."""

    sizes: list[int] = []  # noqa: RUF012

    def screen(self, jobs: Any) -> Screened:
        self.sizes.append(len(jobs))
        return Screened([{**null_row(job), "image": f"{job.index}.png", "extra_lanes": 5} for job in jobs], {})


def test_auto_looks_closer_where_quick_flags_doubts_or_fails(tmp_path: Path) -> None:
    texts = ["plain", "flag", "doubt", "plain", "broken", "flag and doubt", "plain"]
    settings = null_settings(tmp_path, texts, batch_size=7)
    Whole.sizes.clear()
    auto = AutoScreener(Doubtful(), Whole(threshold=0.7), batch_size=3)
    assert auto.threshold == 0.7
    summary = screen(plan_run(settings), lambda asked: auto)
    assert summary is not None
    rows = auto.screen([Job(i, text, None, 0) for i, text in enumerate(texts)]).rows
    assert [row["image"] is not None for row in rows] == [text != "plain" for text in texts]
    assert [row["extra_lanes"] for row in rows] == [1 if text == "plain" else 6 for text in texts]
    assert Whole.sizes == [3, 1, 3, 1]
