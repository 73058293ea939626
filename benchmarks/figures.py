"""README's figures, from the committed result files: `python -m benchmarks.figures` rewrites them in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- figures: written by benchmarks/figures.py -->", "<!-- end of figures -->"
SHOWN_STATISTICS = ("cfg_norm", "detail", "log_detail_ratio", "trajectory_lid", "trajectory_lid_control")


def load(name: str) -> dict[str, Any]:
    """One result file."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def percent(value: float | None) -> str:
    """A share as per cent."""
    return "-" if value is None else f"{100 * value:.1f} %"


def cell(judged: dict[str, float]) -> str:
    """AUROC and TPR of one question."""
    return f"{judged['auroc']:.4f} / {judged['tpr_at_1_fpr']:.2f}"


def detection_table(result: dict[str, Any], split: str = "report") -> str:
    """The default detector, then each statistic at its best step up to the deciding one."""
    report, decided = result[split], result["settings"]["decided_at_step"]
    questions = ("verbatim / novel", "verbatim / novel + plain", "template / novel + plain")
    rows = [(f"**default, decided at step {decided}**", *(f"**{cell(report['default'][q])}**" for q in questions))]
    for name in SHOWN_STATISTICS:
        steps = {
            int(key.split(" @ ")[1]): value
            for key, value in report["statistics"].items()
            if key.split(" @ ")[0] == name
        }
        best = max((s for s in steps if s <= decided), key=lambda s: steps[s][questions[1]]["auroc"])
        rows.append((f"{name}, step {best}", *(cell(steps[best][q]) for q in questions)))
    return table(("statistic", *questions), rows)


def mitigation_table(result: dict[str, Any]) -> str:
    """What the default plan does to each family."""
    header = (
        "family",
        "images",
        "flagged",
        "changed",
        "copies before",
        "copies after",
        "blocked",
        "on caption, rescued",
        "on caption, oracle",
        "extra lanes, mean (max)",
    )
    rows = []
    for family in ("verbatim", "template", "plain", "novel"):
        row = result[family]
        blocked = row["outcomes"].get("blocked", 0) / row["images"]
        cells = (
            row["flagged"],
            row["changed"],
            row["copies_before"],
            row["copies_after"],
            blocked,
            row["on_caption_rescued"],
            row["on_caption_oracle"],
        )
        lanes = f"{row['extra_lanes_mean']:g} ({row['extra_lanes_max']})"
        rows.append((family, row["images"], *(percent(value) for value in cells), lanes))
    return table(header, rows)


def pooled(*results: dict[str, Any]) -> str:
    """Verbatim images of several runs together: one run of twenty prompts says little."""
    rows = [result["verbatim"] for result in results]
    images = sum(row["images"] for row in rows)
    copies = sum(round(row["copies_after"] * row["images"]) for row in rows)
    blocked = sum(row["outcomes"].get("blocked", 0) for row in rows)
    one = rows[-1]
    return (
        "It varies with the seeds: an earlier run of the same guard, with one other seed a prompt "
        f"(`mitigation_one_seed.json`), left {percent(one['copies_after'])} verbatim copies and blocked "
        f"{percent(one['outcomes']['blocked'] / one['images'])}. "
        f"Both runs together: {copies} copies ({percent(copies / images)}) and {blocked} blocked "
        f"({percent(blocked / images)}) of {images} images. The targets were 5 % and 10 %."
    )


def figures() -> str:
    """The whole section."""
    truth, detection, mitigation, overhead = (load(n) for n in ("reference", "detection", "mitigation", "overhead"))
    report, place = truth["report"], detection["provenance"]
    speed = ", ".join(f"{line['ratio_median']:.3f} at batch {line['batch']}" for line in overhead["batches"])
    return "\n\n".join(
        (
            "All on `report` rows, one image a prompt (mitigation: three of a memorized one), 50 DDIM steps, "
            "guidance 7.5; thresholds chosen on `tune` rows. "
            f"{place['machine']}, {place['threads']} threads, torch {place['versions']['torch']}, {place['dtype']}; "
            "raw numbers with revision and versions in `benchmarks/results/`.",
            f"*The reference.* {percent(report['verbatim_reproduced'])} of verbatim prompts reproduce their source, "
            f"{percent(report['novel_near_a_source'])} of novel images come near one, and "
            f"{percent(report['reads_as_caption']['novel'])} of novel images read as their caption.",
            "*Detection*, AUROC / TPR at 1 % FPR:",
            detection_table(detection),
            "Flagged by the default threshold: "
            + ", ".join(
                f"{family} {percent(value)}" for family, value in detection["report"]["flagged_by_default"].items()
            )
            + f", for {detection['cost']['extra_lanes_an_image']} extra lane evaluations an image of "
            f"{detection['cost']['lanes_an_image']}.",
            "*Mitigation*, the default plan; the oracle is the rare phrase removed by hand:",
            mitigation_table(mitigation),
            pooled(mitigation, load("mitigation_one_seed")),
            f"*Time*, guarded over unguarded with nothing flagged: {speed} "
            f"({overhead['batches'][0]['extra_lanes_an_image']} extra lanes on 100).",
        )
    )


def write_figures(readme: str) -> str:
    """README with its figures replaced."""
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n\n{figures()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(write_figures(README.read_text()))
