"""The labelled prompts of the reference world, their sources, and their tune / report halves: fixed by one seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image as Pictures

from benchmarks.reference.world import (
    COLOURS,
    PLAIN_CAPTIONS,
    Caption,
    Image,
    Template,
    draw_caption,
    draw_names,
    make_template,
    render,
)
from sd_guard.similarity import masked_l2, tiled_l2

COUNTS = {"verbatim": 40, "template": 24, "plain": 32, "novel": 400}
COPY = 0.20  # tiled L2 to a source up to which an image counts as its copy
COPY_FIXED = 0.15  # masked L2 likewise, for the fixed part of a template
DRAWINGS = 200  # of a caption, none of which is a copy where sources lie apart from what their captions say


@dataclass(frozen=True, slots=True)
class Families:
    """Captions and sources. `phrases` are what the verbatim and template captions add to an ordinary one."""

    verbatim: list[tuple[Caption, str, Image]]  # ordinary caption, phrase, the one image
    template: list[tuple[Template, str]]
    plain: list[tuple[str, str]]  # caption, colour
    novel: list[str]

    def rows(self) -> list[dict[str, str | int]]:
        """One row a prompt: family, prompt, ordinary (the prompt without its phrase), source index, split."""
        rows: list[dict[str, str | int]] = []
        rows += [_row("verbatim", f"{c} {p}", str(c), i) for i, (c, p, _) in enumerate(self.verbatim)]
        rows += [_row("template", f"{t.caption} {p}", str(t.caption), i) for i, (t, p) in enumerate(self.template)]
        rows += [_row("plain", caption, "", i) for i, (caption, _) in enumerate(self.plain)]
        rows += [_row("novel", caption, caption, i) for i, caption in enumerate(self.novel)]
        return rows


def _row(family: str, prompt: str, ordinary: str, index: int) -> dict[str, str | int]:
    split = "tune" if index % 2 == 0 else "report"
    return {"family": family, "prompt": prompt, "ordinary": ordinary, "source": index, "split": split}


def make_families(seed: int, *, apart: bool = False) -> Families:
    """All families of one world; another seed gives other names, captions and images.

    Args:
        seed: of the world.
        apart: whether captions and pictures are drawn again until no drawing of a memorized caption, out of `DRAWINGS`,
            counts as a copy: a distance alone then tells a memory from a caption obeyed.
    """
    rng = np.random.default_rng(seed)
    names = draw_names(rng, COUNTS["verbatim"] + COUNTS["template"])

    def caption() -> Caption:
        while True:
            drawn = draw_caption(rng, held_out=False)
            if not drawn.artist:
                return drawn

    def verbatim() -> tuple[Caption, Image]:
        while True:
            drawn = caption()
            image = render(rng, drawn)
            source = Pictures.fromarray(image)
            if not apart or _is_apart(rng, drawn, partial(tiled_l2, source=source), COPY):
                return drawn, image

    def template() -> Template:
        while True:
            drawn = make_template(rng, caption())
            source, mask = Pictures.fromarray(drawn.fixed), Pictures.fromarray(~drawn.window * np.uint8(255))
            if not apart or _is_apart(rng, drawn.caption, partial(masked_l2, source=source, mask=mask), COPY_FIXED):
                return drawn

    pictures = [(*verbatim(), f"by {name}") for name in names[: COUNTS["verbatim"]]]
    templates = [(template(), f"from the {name} collection") for name in names[COUNTS["verbatim"] :]]
    plain = [(text.format(colour), colour) for text in PLAIN_CAPTIONS for colour in COLOURS]
    novel: dict[str, None] = {}
    while len(novel) < COUNTS["novel"]:
        novel[str(draw_caption(rng, held_out=True))] = None
    memorized = [(drawn, phrase, image) for drawn, image, phrase in pictures]
    return Families(memorized, templates, [plain[i] for i in rng.permutation(len(plain))], list(novel))


def _is_apart(
    rng: np.random.Generator, caption: Caption, distance: Callable[[Pictures.Image], float], copy: float
) -> bool:
    return all(distance(Pictures.fromarray(render(rng, caption))) > copy for _ in range(DRAWINGS))
