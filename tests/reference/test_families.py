"""Worlds whose memorized pictures lie apart from what their captions say."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks.reference import families
from benchmarks.reference.families import COPY, COPY_FIXED, make_families
from benchmarks.reference.world import render
from sd_guard.similarity import masked_l2, tiled_l2


def copies(world: families.Families, drawings: int = 100) -> float:
    """The share that counts as copies, of drawings of the memorized captions that the world was not made with."""
    rng, found = np.random.default_rng(99), []
    for caption, _, image in world.verbatim:
        source = Image.fromarray(image)
        found += [tiled_l2(Image.fromarray(render(rng, caption)), source) <= COPY for _ in range(drawings)]
    for template, _ in world.template:
        fixed, mask = Image.fromarray(template.fixed), Image.fromarray(~template.window * np.uint8(255))
        drawn = (Image.fromarray(render(rng, template.caption)) for _ in range(drawings))
        found += [masked_l2(each, fixed, mask) <= COPY_FIXED for each in drawn]
    return float(np.mean(found))


def test_a_world_apart_is_told_from_obedience_by_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "COUNTS", {"verbatim": 4, "template": 4, "plain": 2, "novel": 2})
    assert copies(make_families(0)) > 0.03
    apart = make_families(0, apart=True)
    assert copies(apart) < 0.005
    assert (len(apart.verbatim), len(apart.template)) == (4, 4)
