"""A chart of how well each statistic does at each step."""

from __future__ import annotations

import io
import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from sd_guard.evaluation.collect import Table
from sd_guard.screening.records import write_atomic

OURS: Final = ("guard", "added_detail", "trajectory_lid")  # what the default detector is made of
PREFERRED: Final = ("verbatim / novel + plain", "template / novel + plain")
_STRONG: Final = ("#c1272d", "#0b62a8", "#1a7f37", "#8a3ffc")
_MUTED: Final = ("#8c8c8c", "#b08a5b", "#7a9a8b", "#a58ab5", "#6f8fb0", "#b58a8a")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")


def draw(table: Table, path: Path, *, ours: Collection[str] = OURS) -> None:
    """Writes a PNG: AUROC by step of every statistic on one image (on all seeds, where these are compared).

    Args:
        table: Of `sd_guard.evaluation.table`.
        path: Of the PNG.
        ours: Names of statistics to emphasise: strong colours, and their intervals.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib; pip install 'sd-guard[eval]'") from error
    rows: list[dict[str, Any]] = table.to_pylist()
    questions = chosen_questions(list(dict.fromkeys(row["question"] for row in rows)))
    names = list(dict.fromkeys(row["statistic"] for row in rows))
    styles = _styles(names, ours)
    height = max(4.5, 0.24 * len(names) + 1.2)
    figure = Figure(figsize=(5.2 * len(questions) + 3.2, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(questions), sharey=True, squeeze=False)[0]
    places = {step: place for place, step in enumerate(sorted({row["step"] for row in rows}))}
    best: dict[str, float] = {}
    for axis, question in zip(axes, questions, strict=True):
        for number, name in enumerate(names):
            line = one_line(rows, name, question)
            best[name] = max(best.get(name, 0.0), *(row["auroc"] for row in line))
            beside = (number % 7 - 3) * 0.1 if len(line) == 1 else 0.0  # single points would hide each other
            x = [places[row["step"]] + beside for row in line]
            _draw_line(axis, x, line, styles[name], band=name in ours)
        _dress(axis, question, places)
    axes[0].set_ylabel("AUROC")
    handles, labels = axes[0].get_legend_handles_labels()
    ranked = sorted(zip(handles, labels, strict=True), key=lambda pair: -best[pair[1].split(" (")[0]])
    figure.legend(
        *zip(*ranked, strict=True),
        loc="outside right upper",
        fontsize=8,
        frameon=False,
        title="best first; heavy, with 95 % bands:\nthis guard's own",
        title_fontsize=8,
        alignment="left",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(path, buffer.getvalue())


def chosen_questions(questions: Sequence[str]) -> list[str]:
    """At most two: verbatim and template against all others where they are asked, else the broadest ones."""
    preferred = [question for question in PREFERRED if question in questions]
    return preferred if len(preferred) == 2 else list(questions[-2:])


def one_line(rows: Sequence[dict[str, Any]], statistic: str, question: str) -> list[dict[str, Any]]:
    """The rows of one line of the chart, by step: on the fewest images that the statistic takes."""
    own = [row for row in rows if (row["statistic"], row["question"]) == (statistic, question)]
    fewest = min(row["images"] for row in own)
    return sorted((row for row in own if row["images"] == fewest), key=lambda row: row["step"])


def _styles(names: Sequence[str], ours: Collection[str]) -> dict[str, dict[str, Any]]:
    strong, muted = itertools.cycle(_STRONG), itertools.cycle(_MUTED)
    marker, dash = itertools.cycle(_MARKERS), itertools.cycle(("--", ":", "-."))
    own = {"linewidth": 2.6, "linestyle": "-", "marker": "o", "markersize": 5, "zorder": 3}
    rest = {"linewidth": 1.1, "markersize": 4, "zorder": 2}
    return {
        name: {**own, "color": next(strong)}
        if name in ours
        else {**rest, "color": next(muted), "marker": next(marker), "linestyle": next(dash)}
        for name in names
    }


def _draw_line(
    axis: Any, x: Sequence[float], line: Sequence[dict[str, Any]], style: dict[str, Any], *, band: bool
) -> None:
    images = line[0]["images"]
    label = line[0]["statistic"] + (f" ({images} images)" if images > 1 else "")
    axis.plot(x, [row["auroc"] for row in line], label=label, **style)
    if band:
        low, high = (np.array([row[f"auroc_{end}"] for row in line]) for end in ("low", "high"))
        axis.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0, zorder=1)


def _dress(axis: Any, question: str, places: Mapping[int, int]) -> None:
    axis.set_title(question, fontsize=10)
    axis.set_xlabel("sampling step, evenly spaced")
    axis.axhline(0.5, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlim(-0.5, len(places) - 0.5)
    axis.set_xticks(list(places.values()), [str(step) for step in places], fontsize=8)
    axis.grid(axis="y", alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
