"""Explanations of flagged rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sd_guard.attribution import WordAttribution
from sd_guard.pipelines.explanation import Explanation
from sd_guard.reference import checkpoint_path, load_truth
from sd_guard.screening.explained import ExplainedScreener, draw_map
from sd_guard.screening.jobs import Job
from sd_guard.screening.loading import load_screener
from sd_guard.screening.records import SCHEMA, unscored_row
from sd_guard.screening.screener import Screened
from sd_guard.screening.settings import ModelSettings, RunSettings

MODEL = ModelSettings(model=str(checkpoint_path()), steps=20)


def test_flagged_rows_say_why_and_others_nothing(tmp_path: Any) -> None:
    rows = [row for row in load_truth() if row["split"] == "tune"]
    memorized = next(row["prompt"] for row in rows if row["family"] == "verbatim")
    ordinary = next(row["prompt"] for row in rows if row["family"] == "novel")
    (tmp_path / "list.txt").write_text("x")
    settings = RunSettings(prompts=tmp_path / "list.txt", out=tmp_path / "run", model=MODEL, explain=True)
    jobs = [Job(0, memorized, None, 7), Job(1, ordinary, None, 8)]
    screened = load_screener(settings).screen(jobs)
    flagged, passed = screened.rows
    assert [row["flagged"] for row in screened.rows] == [True, False]
    assert [each["word"] for each in flagged["words"]] == memorized.split()
    heaviest = max(flagged["words"], key=lambda each: each["weight"])
    assert heaviest["word"] in memorized.split()[-2:]
    assert screened.images[flagged["map"]]().size == (64, 64)
    assert (passed["words"], passed["map"]) == (None, None)
    assert {name for name in SCHEMA.names} == set(flagged)


@dataclass
class Flagging:
    """Flags everything, and makes nothing."""

    threshold: float | None = 0.0

    def screen(self, jobs: Sequence[Job]) -> Screened:
        asked = ({"prompt": job.prompt, "family": None, "seed": job.seed, "index": job.index} for job in jobs)
        return Screened([unscored_row(**each, reason="made up") | {"flagged": True} for each in asked])


def test_a_row_outlives_an_explanation_that_fails() -> None:
    screened = ExplainedScreener(Flagging(), object(), MODEL).screen([Job(3, "a prompt", None, 1)])
    assert [(row["index"], row["words"], row["map"]) for row in screened.rows] == [(3, None, None)]
    assert not screened.images


def test_the_map_is_red_where_nothing_is_left_open() -> None:
    left_open = torch.ones(8, 8)
    left_open[:, :4] = 0.0
    words = WordAttribution(words=("x",), scores=(1.0,), method="ablation")
    seen = {"score": 1.0, "threshold": 0.3, "step": 3, "count": 50, "shown": 20, "image": torch.full((3, 64, 64), 0.5)}
    found = Explanation(verdict="flag", words=words, left_open=left_open, left_open_without=left_open, **seen)
    drawn = np.asarray(draw_map(found)).astype(int)
    assert isinstance(draw_map(found), Image.Image)
    assert (drawn[:, :24, 0] - drawn[:, :24, 2] > 60).all()
    assert (abs(drawn[:, 40:, 0] - drawn[:, 40:, 2]) <= 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": "quick"}, "--explain: --depth quick samples nothing"),
        ({"model": ModelSettings(model=MODEL.model, height=64)}, "leave --height and --width out"),
    ],
)
def test_what_cannot_be_explained_is_refused(tmp_path: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunSettings(**({"prompts": "x.txt", "out": tmp_path, "model": MODEL, "explain": True} | options))
