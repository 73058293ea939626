"""Which rows of a run are drawn, and how: as a card with pictures, as a line of a list, or on the seed wall."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from sd_guard.report.charts import Band, StepLine, step_line
from sd_guard.report.clusters import near_duplicates
from sd_guard.report.images import Picture, Pictures
from sd_guard.report.rows import Places, RunRows
from sd_guard.report.texts import PromptText, Texts
from sd_guard.screening.records import Row

MAX_DRAWN: Final = 2_000  # rows, cards and lines together
MAX_CARDS: Final = 200
MAX_THUMBS: Final = 400  # lines with a picture
MAX_WALL_ROWS: Final = 12
MAX_WALL_SEEDS: Final = 16
MAX_GROUPS: Final = 30  # of near-duplicate prompts
MAX_MEMBERS: Final = 20  # prompts shown of a group
WALL_SIDE: Final = 128
THUMB_SIDE: Final = 64
BY_STEP: Final = ("added_detail", "trajectory_lid")  # of what the default detector's score is made of
TINTS: Final = 5
_BAND_ROWS: Final = 2_000


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a prompt; `tint` from 0 to 5 by its weight over the largest."""

    text: str
    weight: float
    tint: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """One image on the page.

    Attributes:
        row: Its record.
        rank: Its place from the most suspicious one, from 0.
        prompt: Of the row.
        before: The unguarded image, where it was kept.
        after: The final image.
        is_card: True for a card, with all that follows; a line has only a small `after`.
        map: Where in the image nothing is left open.
        words: With their weights, in the order of the prompt.
        lines: Statistics by step.
        near: Distinct other prompts that nearly repeat this one.
    """

    row: Row
    rank: int
    prompt: PromptText
    before: Picture | None
    after: Picture | None
    is_card: bool
    map: Picture | None = None
    words: tuple[Word, ...] = ()
    lines: tuple[StepLine, ...] = ()
    near: int = 0


@dataclass(frozen=True, slots=True)
class WallRow:
    """One prompt of the seed wall: its images, unguarded where they were kept."""

    prompt: PromptText
    score: float
    flagged: int
    images: int
    tiles: tuple[tuple[Row, Picture | None], ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Near-duplicate prompts: the most suspicious, and the first others, each with its highest score."""

    prompt: PromptText
    score: float
    prompts: int
    images: int
    flagged: int
    others: tuple[tuple[PromptText, float], ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """What is drawn of a run.

    Attributes:
        places: Of rows that get a card or a line, most suspicious first; near-duplicates follow the first of them.
        cards: Those that get a card.
        groups: Places by prompt, by near-duplicates; only groups of several prompts, the largest first.
    """

    places: Places
    cards: frozenset[int]
    groups: tuple[dict[str, Places], ...]


def select(rows: RunRows) -> Selection:
    """Chooses what is drawn: by suspicion, near-duplicates of a prompt only where space is left."""
    ranked = rows.ranked()[:MAX_DRAWN]
    prompts = list(dict.fromkeys(rows.prompts[place] for place in ranked))
    leaders = near_duplicates(prompts)
    leader_of = {prompt: leader for prompt, leader in zip(prompts, leaders, strict=True)}
    rank = np.array([leader_of[rows.prompts[place]] for place in ranked], dtype=np.int64)
    ranked = ranked[np.argsort(rank, kind="stable")]
    candidates = [place for place in ranked.tolist() if rows.flagged[place] or rows.outcomes[place] == "unscored"]
    first = [place for place in candidates if prompts[leader_of[rows.prompts[place]]] == rows.prompts[place]]
    cards = dict.fromkeys([*first, *candidates])
    return Selection(ranked, frozenset(list(cards)[:MAX_CARDS]), _groups(rows, ranked, prompts, leaders))


def _groups(
    rows: RunRows, ranked: Places, prompts: Sequence[str], leaders: Sequence[int]
) -> tuple[dict[str, Places], ...]:
    members: dict[int, list[str]] = {}
    for prompt, leader in zip(prompts, leaders, strict=True):
        members.setdefault(leader, []).append(prompt)
    several = sorted((group for group in members.values() if len(group) > 1), key=len, reverse=True)
    wanted = {prompt for group in several for prompt in group}
    places: dict[str, list[int]] = {}
    for place in ranked.tolist():
        if rows.prompts[place] in wanted:
            places.setdefault(rows.prompts[place], []).append(place)
    return tuple({prompt: np.array(places[prompt]) for prompt in group} for group in several)


def draw(rows: RunRows, chosen: Selection, pictures: Pictures, texts: Texts) -> list[Drawn]:
    """Cards and lines, in the order of the selection; a row that has nothing for a card becomes a line."""
    full = rows.full(chosen.places)
    near = {prompt: len(group) - 1 for group in chosen.groups for prompt in group}
    cards = {place for place in chosen.cards if _fills_a_card(full[place])}
    by_step = {place: _by_step(full[place]) for place in cards}
    bands = _bands(rows)
    limits = {name: _limits(bands[name], [each[name] for each in by_step.values()]) for name in BY_STEP}
    drawn: list[Drawn] = []
    thumbs = 0
    for rank, place in enumerate(chosen.places.tolist()):
        row = full[place]
        prompt = texts.get(row["prompt"])
        if place not in cards:
            thumbs += row["image"] is not None
            thumb = pictures.get(row["image"], side=THUMB_SIDE) if thumbs <= MAX_THUMBS else None
            drawn.append(Drawn(row, rank, prompt, None, thumb, is_card=False))
            continue
        more = cast("Mapping[str, Any]", row)  # columns that only some runs have
        lines = (step_line(name, by_step[place][name], bands[name], limits[name]) for name in BY_STEP)
        drawn.append(
            Drawn(
                row,
                rank,
                prompt,
                before=pictures.get(row["image_before"]),
                after=pictures.get(row["image"]),
                is_card=True,
                map=pictures.get(more.get("map")),
                words=_words(more.get("words") or []),
                lines=tuple(line for line in lines if line is not None),
                near=near.get(row["prompt"], 0),
            )
        )
    return drawn


def _fills_a_card(row: Row) -> bool:
    more = cast("Mapping[str, Any]", row)
    return bool(row["image"] or row["image_before"] or row["attempts"] or more.get("words") or more.get("map"))


def _words(words: Sequence[Mapping[str, Any]]) -> tuple[Word, ...]:
    weights = [float(each["weight"] or 0.0) for each in words]
    largest = max((weight for weight in weights if math.isfinite(weight)), default=0.0)
    tints = [round(TINTS * max(w, 0.0) / largest) if largest > 0 and math.isfinite(w) else 0 for w in weights]
    return tuple(Word(str(each["word"]), w, tint) for each, w, tint in zip(words, weights, tints, strict=True))


def _by_step(row: Row) -> dict[str, dict[int, float]]:
    """Of the drawn statistics: step to value."""
    return {name: {s["step"]: s["value"] for s in row["statistics"] if s["name"] == name} for name in BY_STEP}


def _bands(rows: RunRows) -> dict[str, Band]:
    """By drawn statistic, the 10th and 90th percentile of passed images at each step; of at most 2,000 of them."""
    passed = np.flatnonzero(~rows.flagged & (rows.outcomes != "unscored"))
    some = passed[np.linspace(0, max(len(passed) - 1, 0), min(len(passed), _BAND_ROWS)).astype(np.int64)]
    parts = [batch.column("statistics").flatten() for batch in rows.batches(some, ["statistics"])]
    fields = {name: _column(parts, name) for name in ("name", "step", "value")}
    names, steps, values = fields["name"], fields["step"], fields["value"].astype(np.float64)
    bands: dict[str, Band] = {}
    for name in BY_STEP:
        own = (names == name) & np.isfinite(values)
        bands[name] = {
            int(step): tuple(np.quantile(values[own & (steps == step)], (0.1, 0.9)).tolist())
            for step in np.unique(steps[own])
        }
    return bands


def _column(parts: Sequence[Any], name: str) -> NDArray[Any]:
    """One field of arrays of structs, in a row."""
    return np.concatenate([np.array([]), *(part.field(name).to_numpy(zero_copy_only=False) for part in parts)])


def _limits(band: Band, images: Sequence[Mapping[int, float]]) -> tuple[float, float]:
    values = [value for ends in band.values() for value in ends]
    values += [value for image in images for value in image.values() if math.isfinite(value)]
    return (min(values), max(values)) if values else (0.0, 1.0)


def seed_wall(rows: RunRows, chosen: Selection, pictures: Pictures, texts: Texts) -> tuple[list[WallRow], int]:
    """Prompts with more than one seed, the highest mean score first; and how many there are before thinning.

    Of near-duplicate prompts only the most suspicious is shown, and no prompt without a picture.
    """
    followers = {prompt for group in chosen.groups for prompt in list(group)[1:]}
    prompts: dict[str, list[int]] = {}
    for place, prompt in enumerate(rows.prompts):
        prompts.setdefault(prompt, []).append(place)
    several = [places for places in prompts.values() if len(places) > 1]
    means = {places[0]: _mean(rows, places) for places in several}
    shown = [places for places in several if rows.prompts[places[0]] not in followers]
    shown.sort(key=lambda places: -np.nan_to_num(means[places[0]], nan=-np.inf))
    shown = shown[:MAX_WALL_ROWS]
    full = rows.full(np.array([place for places in shown for place in places[:MAX_WALL_SEEDS]], dtype=np.int64))
    wall = [
        WallRow(
            prompt=texts.get(rows.prompts[places[0]]),
            score=means[places[0]],
            flagged=int(rows.flagged[places].sum()),
            images=len(places),
            tiles=tuple((full[place], _tile(full[place], pictures)) for place in places[:MAX_WALL_SEEDS]),
        )
        for places in shown
    ]
    return [row for row in wall if any(picture for _, picture in row.tiles)], len(several)


def _tile(row: Row, pictures: Pictures) -> Picture | None:
    return pictures.get(row["image_before"] or row["image"], side=WALL_SIDE)


def near_groups(rows: RunRows, chosen: Selection, texts: Texts) -> list[Group]:
    """The largest groups of near-duplicate prompts."""
    groups: list[Group] = []
    for group in chosen.groups[:MAX_GROUPS]:
        scores = {prompt: _highest(rows, places) for prompt, places in group.items()}
        first, *others = group
        every = np.concatenate(list(group.values()))
        groups.append(
            Group(
                prompt=texts.get(first),
                score=scores[first],
                prompts=len(group),
                images=len(every),
                flagged=int(rows.flagged[every].sum()),
                others=tuple((texts.get(prompt), scores[prompt]) for prompt in others[:MAX_MEMBERS]),
            )
        )
    return groups


def _mean(rows: RunRows, places: Sequence[int]) -> float:
    scores = rows.scores[places]
    scores = scores[~np.isnan(scores)]
    return float(scores.mean()) if len(scores) else math.nan


def _highest(rows: RunRows, places: Places) -> float:
    scores = rows.scores[places]
    return float(np.nanmax(scores)) if np.isfinite(scores).any() else math.nan
