"""`report.html`: one page of a run, without a network; what is shown is thinned, never silently."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from sd_guard.report.charts import MAX_FAMILIES, HistogramChart, histogram_chart
from sd_guard.report.gallery import draw, near_groups, seed_wall, select
from sd_guard.report.html import render_page
from sd_guard.report.images import Pictures
from sd_guard.report.mitigating import arrow_chart, mitigations
from sd_guard.report.rows import NO_FAMILY, Places, RunRows, open_rows
from sd_guard.report.texts import Texts
from sd_guard.screening.records import Row
from sd_guard.screening.settings import read_manifest
from sd_guard.screening.storage import Store

REPORT_FILE: Final = "report.html"
MAX_TABLE_FAMILIES: Final = 40
MAX_TABLE_ROWS: Final = 60  # statistic values shown of one image
_HASHES: Final = frozenset({"prompts", "model_fingerprint", "calibration"})


@dataclass(frozen=True, slots=True)
class Counts:
    """Images of one family, or of a run; `lanes` is the mean of extra lanes an image."""

    name: str
    screened: int
    flagged: int
    rescued: int
    blocked: int
    unscored: int
    lanes: float


def write_report(run: Path | str | Store, *, calibration: Path | None = None) -> str:
    """Writes `report.html` into a run folder, finished or not.

    Args:
        run: The folder, or its address.
        calibration: The calibration file of the run, to show its benign scores too.

    Returns:
        Where the page is: a path, or an address.

    Raises:
        ValueError: If the folder holds no run, a file of it is damaged, or the calibration is not the run's.
    """
    store = Store.at(run)
    manifest, rows = read_manifest(store), open_rows(store)
    benign = () if calibration is None else _benign_scores(calibration, manifest)
    html = render(store, rows, manifest, benign_scores=benign)
    store.write(REPORT_FILE, html.encode())
    return store.where(REPORT_FILE)


def render(
    run: Path | Store, rows: RunRows, manifest: Mapping[str, Any], *, benign_scores: tuple[float, ...] = ()
) -> str:
    """The page as text."""
    pictures, texts = Pictures(run), Texts()
    families = rows.by_family()
    threshold: float | None = manifest.get("threshold")
    chosen = select(rows)
    drawn = draw(rows, chosen, pictures, texts)
    wall, wall_prompts = seed_wall(rows, chosen, pictures, texts)
    return render_page(
        "report.html",
        manifest=manifest,
        configuration=describe(manifest),
        total=_count("total", rows, np.arange(len(rows))),
        outcomes=dict(zip(*(each.tolist() for each in np.unique(rows.outcomes, return_counts=True)), strict=True)),
        prompts=len(set(rows.prompts)),
        counts=_counts(rows, families),
        families=list(families),
        chart=_score_chart(rows, families, threshold, benign_scores),
        cards=[each for each in drawn if each.is_card],
        lines=[each for each in drawn if not each.is_card],
        shown_families={
            family: place for place, family in enumerate(dict.fromkeys(_family(each.row) for each in drawn))
        },
        shown_outcomes=list(dict.fromkeys(each.row["outcome"] for each in drawn)),
        wall=wall,
        wall_prompts=wall_prompts,
        groups=near_groups(rows, chosen, texts),
        all_groups=len(chosen.groups),
        mitigations=mitigations(rows),
        arrows=arrow_chart([each.row for each in drawn], threshold, texts),
        pictures_left_out=pictures.left_out,
        max_values=MAX_TABLE_ROWS,
    )


def describe(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The configuration and versions of a run, as names and short values; what was left at its default is left out."""
    fields = {**manifest["configuration"], **manifest.get("versions", {})}
    return {
        name.replace("_", " "): f"{str(value)[:16]}…" if name in _HASHES else str(value)
        for name, value in fields.items()
        if value is not None
    }


def _score_chart(
    rows: RunRows, families: Mapping[str, Places], threshold: float | None, benign_scores: tuple[float, ...]
) -> HistogramChart | None:
    """Scores of the calibration's benign prompts, of each family, and of the whole run where that is more than one."""
    largest = sorted(families, key=lambda family: -len(families[family]))
    if len(largest) > MAX_FAMILIES:
        kept = set(largest[: MAX_FAMILIES - 1])
        rest = np.concatenate([families[family] for family in largest[MAX_FAMILIES - 1 :]])
        shown = {family: places for family, places in families.items() if family in kept}
        families = {**shown, f"{len(largest) - len(kept)} other families": rest}
    groups: dict[str, tuple[Any, Any]] = {}
    if benign_scores:
        above = np.asarray(benign_scores) > (np.inf if threshold is None else threshold)
        groups["benign, of the calibration"] = (benign_scores, above)
    groups |= {family: (rows.scores[places], rows.flagged[places]) for family, places in families.items()}
    if len(groups) > 1:
        groups["this run, all of it"] = (rows.scores, rows.flagged)
    return histogram_chart(groups, threshold)


def _counts(rows: RunRows, families: Mapping[str, Places]) -> list[Counts]:
    """A line each of the largest families, in order of appearance."""
    kept = set(sorted(families, key=lambda family: -len(families[family]))[:MAX_TABLE_FAMILIES])
    return [_count(family, rows, places) for family, places in families.items() if family in kept]


def _count(name: str, rows: RunRows, places: Places) -> Counts:
    outcomes = rows.outcomes[places]
    return Counts(
        name=name,
        screened=len(places),
        flagged=int(rows.flagged[places].sum()),
        rescued=int((outcomes == "rescued").sum()),
        blocked=int((outcomes == "blocked").sum()),
        unscored=int((outcomes == "unscored").sum()),
        lanes=float(rows.lanes[places].mean()) if len(places) else 0.0,
    )


def _family(row: Row) -> str:
    return row["family"] or NO_FAMILY


def _benign_scores(calibration: Path, manifest: Mapping[str, Any]) -> tuple[float, ...]:
    from sd_guard.calibration import Calibration

    scores = Calibration.load(calibration).benign_scores
    known = manifest["configuration"].get("calibration")
    if known != hashlib.sha256(calibration.read_bytes()).hexdigest():
        used = "no calibration" if known is None else "another one"
        raise ValueError(f"{calibration}: the run was made with {used}; leave --calibration out, or name the run's own")
    return scores
