"""`compare.html`: two runs of the same prompts, such as before and after a fine-tune, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sd_guard.report.charts import HistogramChart, histogram_chart
from sd_guard.report.html import render_page
from sd_guard.report.images import Picture, Pictures
from sd_guard.report.page import describe
from sd_guard.report.rows import Places, RunRows, open_rows
from sd_guard.report.texts import PromptText, Texts
from sd_guard.screening.records import Row, write_atomic
from sd_guard.screening.settings import read_manifest
from sd_guard.screening.storage import Store

COMPARE_FILE: Final = "compare.html"
MAX_SHOWN: Final = 100  # rows of each list
SIDE: Final = 128


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs joined by prompt and seed; of a pair that a run holds several times, its first row.

    Attributes:
        a: Rows of the first run.
        b: Rows of the second.
        in_a: (N) places in `a` of the N images that are in both.
        in_b: (N) their places in `b`.
        only_a: Places in `a` of images that are not in `b`.
        only_b: The reverse.
    """

    a: RunRows
    b: RunRows
    in_a: Places
    in_b: Places
    only_a: Places
    only_b: Places

    @property
    def shift(self) -> NDArray[np.float64]:
        """(N) score in `b` minus score in `a`; NaN where either has none."""
        return self.b.scores[self.in_b] - self.a.scores[self.in_a]

    @property
    def newly_flagged(self) -> NDArray[np.bool_]:
        """(N) flagged in `b` and not in `a`."""
        return self.b.flagged[self.in_b] & ~self.a.flagged[self.in_a]

    @property
    def no_longer_flagged(self) -> NDArray[np.bool_]:
        """(N) flagged in `a`, scored in `b`, and not flagged there."""
        return self.a.flagged[self.in_a] & ~self.b.flagged[self.in_b] & ~self._unscored_b

    @property
    def no_longer_scored(self) -> NDArray[np.bool_]:
        """(N) scored in `a` and `unscored` in `b`, which is not a pass."""
        return self._unscored_b & (self.a.outcomes[self.in_a] != "unscored")

    @property
    def _unscored_b(self) -> NDArray[np.bool_]:
        return self.b.outcomes[self.in_b] == "unscored"


@dataclass(frozen=True, slots=True)
class Change:
    """One image in both runs, its final or else unguarded picture in each."""

    prompt: PromptText
    a: Row
    b: Row
    picture_a: Picture | None
    picture_b: Picture | None
    shift: float


@dataclass(frozen=True, slots=True)
class Changes:
    """A list of the page: its first rows, and how many there are."""

    title: str
    about: str
    rows: tuple[Change, ...]
    total: int


@dataclass(frozen=True, slots=True)
class Single:
    """Images that only one run has: the first of them, and how many there are."""

    title: str
    rows: tuple[tuple[PromptText, int, float, str], ...]  # prompt, seed, score, outcome
    total: int


def compare_runs(run_a: Path | str, run_b: Path | str) -> Comparison:
    """Joins two run folders, or runs at addresses, by prompt and seed.

    Raises:
        ValueError: If a folder is no run, both are the same one, or they share no image.
    """
    a, b = Store.at(run_a), Store.at(run_b)
    if a.is_same(b):
        raise ValueError(f"{run_b}: is the same run twice; name two runs")
    for run in (a, b):
        read_manifest(run)
    return join(open_rows(a), open_rows(b), names=(a.address, b.address))


def join(a: RunRows, b: RunRows, *, names: tuple[str, str]) -> Comparison:
    """Joins rows by prompt and seed.

    Raises:
        ValueError: If they share none; `names` say of which runs.
    """
    first_a, first_b = _first_places(a), _first_places(b)
    shared = [key for key in first_a if key in first_b]
    if not shared:
        raise ValueError(
            f"{names[0]} and {names[1]} share no prompt with the same seed; compare two runs of one prompt list"
        )
    return Comparison(
        a=a,
        b=b,
        in_a=np.array([first_a[key] for key in shared], dtype=np.int64),
        in_b=np.array([first_b[key] for key in shared], dtype=np.int64),
        only_a=np.array([place for key, place in first_a.items() if key not in first_b], dtype=np.int64),
        only_b=np.array([place for key, place in first_b.items() if key not in first_a], dtype=np.int64),
    )


def summary(comparison: Comparison) -> str:
    """A short table, as plain text."""
    shift = comparison.shift[np.isfinite(comparison.shift)]
    counts = {
        "images in both": len(comparison.in_a),
        "newly flagged": comparison.newly_flagged.sum(),
        "no longer flagged": comparison.no_longer_flagged.sum(),
        "no longer scored": comparison.no_longer_scored.sum(),
        "only in the first": len(comparison.only_a),
        "only in the second": len(comparison.only_b),
    }
    lines = [f"{name:<18}  {value:>8}" for name, value in counts.items()]
    if len(shift):
        low, middle, high = np.quantile(shift, (0.05, 0.5, 0.95))
        lines.append(f"score shift: median {middle:.3g}, 90 % from {low:.3g} to {high:.3g}")
    return "\n".join(lines)


def write_comparison(comparison: Comparison, run_a: Path | str, run_b: Path | str, out: Path | None = None) -> str:
    """Writes the page.

    Args:
        comparison: Of `compare_runs`.
        run_a: Folder of the first run, or its address.
        run_b: Of the second.
        out: The HTML file; None writes `COMPARE_FILE` beside the second run's records.

    Returns:
        Where it is: a path, or an address.
    """
    texts, pictures = Texts(), (Pictures(run_a), Pictures(run_b))
    shift = comparison.shift
    lists = (
        ("Newly flagged", "Flagged in the second run and not in the first.", comparison.newly_flagged),
        ("No longer flagged", "Flagged in the first run; scored in the second.", comparison.no_longer_flagged),
        ("No longer scored", "Scored in the first run only; this is not a pass.", comparison.no_longer_scored),
        ("Largest shifts", "Of all images with a score in both runs.", np.isfinite(shift)),
    )
    manifests = (read_manifest(run_a), read_manifest(run_b))
    page = render_page(
        "compare.html",
        names=(str(run_a), str(run_b)),
        comparison=comparison,
        thresholds=tuple(manifest.get("threshold") for manifest in manifests),
        chart=_shift_chart(comparison),
        lists=[_changes(comparison, *each, pictures, texts) for each in lists],
        singles=[
            _single("Only in the first run", comparison.a, comparison.only_a, texts),
            _single("Only in the second run", comparison.b, comparison.only_b, texts),
        ],
        differences=_differences(*(describe(manifest) for manifest in manifests)),
        pictures_left_out=sum(each.left_out for each in pictures),
    )
    if out is not None:
        write_atomic(out, page.encode())
        return str(out)
    store = Store.at(run_b)
    store.write(COMPARE_FILE, page.encode())
    return store.where(COMPARE_FILE)


def _first_places(rows: RunRows) -> dict[tuple[str, int], int]:
    places: dict[tuple[str, int], int] = {}
    for place, key in enumerate(zip(rows.prompts, rows.seeds.tolist(), strict=True)):
        places.setdefault(key, place)
    return places


def _shift_chart(comparison: Comparison) -> HistogramChart | None:
    """Shifts of all images, those whose verdict changed marked, with a line at zero."""
    changed = comparison.newly_flagged | comparison.no_longer_flagged
    return histogram_chart({"score shift": (comparison.shift, changed)}, 0.0)


def _changes(
    comparison: Comparison,
    title: str,
    about: str,
    chosen: NDArray[np.bool_],
    pictures: tuple[Pictures, Pictures],
    texts: Texts,
) -> Changes:
    places = np.flatnonzero(chosen)
    shift = comparison.shift
    places = places[np.argsort(-np.nan_to_num(np.abs(shift[places]), nan=-1.0), kind="stable")][:MAX_SHOWN]
    rows_a = comparison.a.full(comparison.in_a[places])
    rows_b = comparison.b.full(comparison.in_b[places])
    changes: list[Change] = []
    for place in places.tolist():
        a, b = rows_a[int(comparison.in_a[place])], rows_b[int(comparison.in_b[place])]
        shown = [
            own.get(row["image_before"] or row["image"], side=SIDE) for own, row in zip(pictures, (a, b), strict=True)
        ]
        changes.append(Change(texts.get(a["prompt"]), a, b, shown[0], shown[1], float(shift[place])))
    return Changes(title, about, tuple(changes), int(chosen.sum()))


def _single(title: str, rows: RunRows, places: Places, texts: Texts) -> Single:
    ranks = np.empty(len(rows), dtype=np.int64)
    ranks[rows.ranked()] = np.arange(len(rows))
    first = places[np.argsort(ranks[places])][:MAX_SHOWN].tolist()
    shown = tuple(
        (texts.get(rows.prompts[p]), int(rows.seeds[p]), float(rows.scores[p]), str(rows.outcomes[p])) for p in first
    )
    return Single(title, shown, len(places))


def _differences(a: dict[str, str], b: dict[str, str]) -> Sequence[tuple[str, str, str]]:
    """Name and values of what the runs were not made alike in."""
    names = dict.fromkeys([*a, *b])
    return [(name, a.get(name, "–"), b.get(name, "–")) for name in names if a.get(name) != b.get(name)]
