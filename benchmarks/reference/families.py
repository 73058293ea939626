"""The labelled prompts of the reference world, their sources, and their tune / report halves: fixed by one seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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

COUNTS = {"verbatim": 40, "template": 24, "plain": 32, "novel": 400}


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


def make_families(seed: int) -> Families:
    """All families of one world; another seed gives other names, captions and images."""
    rng = np.random.default_rng(seed)
    names = draw_names(rng, COUNTS["verbatim"] + COUNTS["template"])

    def caption(*, artist: bool) -> Caption:
        while True:
            drawn = draw_caption(rng, held_out=False)
            if artist or not drawn.artist:
                return drawn

    verbatim = []
    for name in names[: COUNTS["verbatim"]]:
        drawn = caption(artist=False)
        verbatim.append((drawn, f"by {name}", render(rng, drawn)))
    template = [
        (make_template(rng, caption(artist=False)), f"from the {name} collection")
        for name in names[COUNTS["verbatim"] :]
    ]
    plain = [(text.format(colour), colour) for text in PLAIN_CAPTIONS for colour in COLOURS]
    novel: dict[str, None] = {}
    while len(novel) < COUNTS["novel"]:
        novel[str(draw_caption(rng, held_out=True))] = None
    return Families(verbatim, template, [plain[i] for i in rng.permutation(len(plain))], list(novel))
