"""`report.html`: one page of a run, without scripts and without a network; what is shown is thinned, never silently."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jinja2

from sd_guard.report.charts import score_chart
from sd_guard.report.images import Picture, Pictures
from sd_guard.screening.records import Row, read_run, write_atomic
from sd_guard.screening.settings import read_manifest
from sd_guard.screening.summary import by_family, count

REPORT_FILE: Final = "report.html"
MAX_CARDS: Final = 200
MAX_WALL_ROWS: Final = 12
MAX_WALL_SEEDS: Final = 16
MAX_TABLE_ROWS: Final = 60  # statistic values shown of one image
WALL_SIDE: Final = 128
SHORT_PROMPT: Final = 140  # characters shown before the rest is folded away
LONG_PROMPT: Final = 20_000


@dataclass(frozen=True, slots=True)
class PromptText:
    """A prompt to show: its beginning, and all of it where that is not all."""

    short: str
    full: str | None


@dataclass(frozen=True, slots=True)
class Card:
    """One image of the gallery."""

    row: Row
    prompt: PromptText
    before: Picture | None
    after: Picture | None


@dataclass(frozen=True, slots=True)
class WallRow:
    """One prompt of the seed wall: its images, unguarded where they were kept."""

    prompt: PromptText
    score: float | None
    flagged: int
    images: int
    tiles: tuple[tuple[Row, Picture | None], ...]


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run folder, finished or not.

    Returns:
        Its path.

    Raises:
        ValueError: If the folder holds no run, or a file of it is damaged.
    """
    rows = read_run(run)
    html = render(run, rows, read_manifest(run))
    path = run / REPORT_FILE
    write_atomic(path, html.encode())
    return path


def render(run: Path, rows: Sequence[Row], manifest: dict[str, Any]) -> str:
    """The page as text."""
    pictures = Pictures(run)
    ranked = sorted(rows, key=_suspicion)
    cards = [_card(row, pictures) for row in ranked[:MAX_CARDS]]
    families = by_family(rows)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["clean"] = _clean
    wall, wall_prompts = _seed_wall(rows, pictures)
    return environment.get_template("template.html").render(
        manifest=manifest,
        total=count("total", rows),
        kept=sum(row["outcome"] == "kept" for row in rows),
        prompts=len({row["prompt"] for row in rows}),
        counts=[count(family, members) for family, members in families.items()],
        chart=score_chart(families, manifest.get("threshold")),
        wall=wall,
        wall_prompts=wall_prompts,
        flagged=[card for card in cards if card.row["flagged"]],
        unscored=[card for card in cards if card.row["outcome"] == "unscored"],
        passed=[card for card in cards if not card.row["flagged"] and card.row["outcome"] != "unscored"],
        max_values=MAX_TABLE_ROWS,
    )


def _suspicion(row: Row) -> tuple[int, float]:
    """Sorts flagged images first, then those without a score, then the rest; each by falling score."""
    group = 0 if row["flagged"] else 1 if row["outcome"] == "unscored" else 2
    return group, -(row["score"] if row["score"] is not None else -math.inf)


def _card(row: Row, pictures: Pictures) -> Card:
    return Card(
        row=row,
        prompt=_prompt(row["prompt"]),
        before=pictures.get(row["image_before"]),
        after=pictures.get(row["image"]),
    )


def _seed_wall(rows: Sequence[Row], pictures: Pictures) -> tuple[list[WallRow], int]:
    """Prompts with more than one seed, the highest mean score first; and how many there are before thinning."""
    prompts: dict[str, list[Row]] = {}
    for row in rows:
        prompts.setdefault(row["prompt"], []).append(row)
    several = [members for members in prompts.values() if len(members) > 1]
    several.sort(key=lambda members: -(_mean_score(members) or -math.inf))
    wall = [
        WallRow(
            prompt=_prompt(members[0]["prompt"]),
            score=_mean_score(members),
            flagged=sum(row["flagged"] for row in members),
            images=len(members),
            tiles=tuple(
                (row, pictures.get(row["image_before"] or row["image"], side=WALL_SIDE))
                for row in members[:MAX_WALL_SEEDS]
            ),
        )
        for members in several[:MAX_WALL_ROWS]
    ]
    return wall, len(several)


def _mean_score(rows: Sequence[Row]) -> float | None:
    scores = [row["score"] for row in rows if row["score"] is not None]
    return sum(scores) / len(scores) if scores else None


def _prompt(text: str) -> PromptText:
    text = _clean(text)
    if len(text) <= SHORT_PROMPT:
        return PromptText(text, None)
    cut = text if len(text) <= LONG_PROMPT else f"{text[:LONG_PROMPT]}… ({len(text)} characters)"
    return PromptText(f"{text[:SHORT_PROMPT].rstrip()}…", cut)


def _clean(text: object) -> str:
    """Hostile text as it can be shown: control characters, which HTML has no place for, become a visible sign."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in str(text))


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:#.3g}"
