"""Copies, and copies that a caption alone does not account for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.reference.measure import CHANCE, chance_distance, copy_distance, draw, is_copy, tells_memory
from sd_guard.reference import PromptTruth, checkpoint_path, load_truth, source_path

FIRST = Path(__file__).parents[2] / "benchmarks" / "reference" / "first"  # its captions may say all of a source


def rows(family: str) -> list[PromptTruth]:
    return [row for row in load_truth(checkpoint_path()) if row["family"] == family][:4]


@pytest.mark.parametrize("family", ["verbatim", "template"])
def test_a_source_is_its_own_copy_whatever_its_caption_says(family: str) -> None:
    for row in rows(family):
        source = Image.open(source_path(row, checkpoint_path()))
        assert is_copy(source, row, checkpoint_path())
        assert tells_memory(source, row, checkpoint_path())


@pytest.mark.parametrize("family", ["verbatim", "template"])
def test_drawings_that_no_model_made_are_seldom_taken_for_memories(family: str) -> None:
    """Of other drawings than those that the bound was set by; a distance alone is the laxer rule."""
    near, told = [], []
    for row in rows(family):
        drawings = list(draw(row, checkpoint_path(), np.random.default_rng(12345), 100))
        near += [is_copy(drawing, row, checkpoint_path()) for drawing in drawings]
        told += [tells_memory(drawing, row, checkpoint_path()) for drawing in drawings]
    assert np.mean(told) <= 3 * CHANCE
    assert not any(t and not n for n, t in zip(near, told, strict=True))


def test_a_caption_that_says_its_source_has_a_nearer_bound() -> None:
    """The prompt whose drawings come nearest of all: a picture at chance distance is a copy by distance alone."""
    folder = FIRST
    templates = [row for row in load_truth(folder) if row["family"] == "template"]
    (row,) = (row for row in templates if "large purple square at the left on a red background" in row["prompt"])
    bound = chance_distance(row, folder)
    between = [
        drawing
        for drawing in draw(row, folder, np.random.default_rng(7), 100)
        if copy_distance(drawing, row, folder) >= bound and is_copy(drawing, row, folder)
    ]
    assert between
    assert not any(tells_memory(drawing, row, folder) for drawing in between)


def test_a_world_that_was_changed_is_refused() -> None:
    row = rows("verbatim")[0] | {"ordinary": "something else"}
    with pytest.raises(RuntimeError, match="world changed since it was trained"):
        draw(row, checkpoint_path(), np.random.default_rng(0), 1)
