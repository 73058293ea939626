"""Detection on a reference checkpoint: `python -m benchmarks.detection [--checkpoint FOLDER] [--name NAME]`.

`sd-guard evaluate` on the checkpoint's `report` rows, four seeds a prompt, every statistic and the guard itself; then
the guard's own decision at its default threshold, by family. Writes `benchmarks/results/NAME.json` (the guard, and each
statistic at its best step), `NAME.parquet` (the whole table) and `NAME.png`.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.results import FOLDER, write_result
from sd_guard.evaluation.figure import draw
from sd_guard.evaluation.run import evaluate
from sd_guard.evaluation.settings import GUARD, EvaluationSettings
from sd_guard.evaluation.table import best_steps, markdown
from sd_guard.guard import Guard
from sd_guard.reference import PromptTruth, checkpoint_path, load_truth
from sd_guard.screening.settings import ModelSettings

SHARES = (0.0, 0.02, 0.06, 0.1, 0.2, 0.4, 0.5, 1.0)
QUESTIONS = (
    "verbatim / novel",
    "verbatim / plain",
    "verbatim / novel + plain",
    "template / novel",
    "template / plain",
    "template / novel + plain",
    "both / novel + plain",
)
OURS = (GUARD, "added_detail", "seed_agreement", "detail", "log_detail_ratio")  # what changes with the detector
KEPT = [
    "statistic",
    "step",
    *(f"{metric}{end}" for metric in ("auroc", "tpr_at_1_fpr") for end in ("", "_low", "_high")),
    "tpr_at_3_fpr",
    "unscored",
    "lanes",
    "milliseconds",
]


def write_prompts(rows: Sequence[PromptTruth], path: Path) -> Path:
    """A labelled prompt file; a row's seed is its place, as without one."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "family"])
        writer.writerows((row["prompt"], row["family"]) for row in rows)
    return path


def flagged(measurements: Any, threshold: float) -> dict[str, float]:
    """Share of images that the guard flags at either look, by family: a score never falls."""
    rows = [row for row in measurements.to_pylist() if row["statistic"] == GUARD]
    rows = [row for row in rows if row["step"] == max(row["step"] for row in rows)]
    families = sorted({row["family"] for row in rows})
    return {f: round(float(np.mean([r["value"] > threshold for r in rows if r["family"] == f])), 4) for f in families}


def reuse(name: str, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Sets the committed rows of all other statistics beside those measured anew, in the evaluation's own files."""
    earlier = json.loads((FOLDER / f"{name}.json").read_text())
    if settings.items() - earlier["settings"].items():
        raise SystemExit(f"{name}.json is of other settings than {settings}; measure without --reuse")
    table, others = pq.read_table(out / "table.parquet"), pq.read_table(FOLDER / f"{name}.parquet")
    others = others.filter(pc.invert(pc.is_in(others["statistic"], pa.array(OURS))))
    table = pa.concat_tables([table, others.cast(table.schema)])
    pq.write_table(table, out / "table.parquet", compression="zstd")
    draw(table, out / "auroc.png")
    (out / "table.md").write_text(markdown(table))
    return {"other_statistics": earlier["settings"].get("other_statistics", f"at {earlier['provenance']['git']}")}


def above_the_guard(table: Any) -> list[dict[str, Any]]:
    """Statistics that do better than the guard, one image a decision: each step against the guard's last look so far.

    Steps before the guard's first look are compared with that.
    """
    rows = [row for row in table.to_pylist() if row["images"] == 1 and row["question"].endswith("novel + plain")]
    own = sorted((row for row in rows if row["statistic"] == GUARD), key=lambda row: row["step"])
    found = []
    for row in rows:
        looks = [look for look in own if look["question"] == row["question"]]
        last = next((look for look in reversed(looks) if look["step"] <= row["step"]), looks[0])
        if row["statistic"] != GUARD and row["auroc"] > last["auroc"]:
            asked = {key: row[key] for key in ("statistic", "step", "question")}
            found.append({**asked, "auroc": round(row["auroc"], 5), "guard": round(last["auroc"], 5)})
    return found


def shortened(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(row[key], 4) if isinstance(row[key], float) else row[key] for key in KEPT}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--name", default="detection", help="of the result files")
    parser.add_argument("--split", default="report", choices=("tune", "report"))
    parser.add_argument("--seeds", type=int, default=4, help="images a prompt")
    parser.add_argument("--statistics", help="names, with commas; default all")
    parser.add_argument("--out", type=Path, help="folder of the evaluation, to be resumed if there; default a new one")
    parser.add_argument("--reuse", action="store_true", help="measure only what changes with the detector anew")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp()) / "evaluation"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for row in load_truth(args.checkpoint) if row["split"] == args.split]
    settings = EvaluationSettings(
        prompts=write_prompts(rows, out.parent / f"{args.name}_prompts.csv"),
        out=out,
        model=ModelSettings(model=str(args.checkpoint)),
        statistics=OURS if args.reuse else tuple(args.statistics.split(",")) if args.statistics else None,
        seeds=args.seeds,
        observe_at=SHARES,
        resume=out.exists(),
    )
    evaluate(settings)
    asked = {"steps": 50, "guidance_scale": 7.5, "split": args.split, "prompts": len(rows), "seeds": args.seeds}
    reused = reuse(args.name, out, asked) if args.reuse else {}
    table, measurements = (pq.read_table(out / f"{name}.parquet") for name in ("table", "measurements"))
    guard = Guard()
    result = {
        "settings": asked | reused,
        "threshold": guard.detector.threshold,
        "flagged": flagged(measurements, guard.detector.threshold),
        "above_the_guard": above_the_guard(table),
        "looks": {
            f"{question}, {images} image{'s' * (images > 1)}": [
                shortened(r)
                for r in table.to_pylist()
                if (r["statistic"], r["question"], r["images"]) == (GUARD, question, images)
            ]
            for question in QUESTIONS
            for images in sorted({1, args.seeds})
        },
        "best_steps": {
            f"{question}, {images} image{'s' * (images > 1)}": [
                shortened(r) for r in best_steps(table, question, images)
            ]
            for question in QUESTIONS
            for images in sorted({1, args.seeds})
        },
    }
    print(write_result(args.name, result))
    for kind, source in (("parquet", "table.parquet"), ("png", "auroc.png")):
        shutil.copy(out / source, FOLDER / f"{args.name}.{kind}")
    print(result["flagged"])
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
