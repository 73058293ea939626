"""What `on_failure="keep"` hands out where nothing was rescued: `python -m benchmarks.keep [--checkpoint FOLDER]`.

On `report` rows of memorized prompts: images of which no attempt passed, as the guard hands them out (the attempt that
came nearest to passing) and as they would have been without it. `noise alone` fails often. `optimised` moves the
embedding against the very statistic that the detector rests on: what is rescued then shows whether verification is
fooled.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from benchmarks.mitigation import generate_guarded
from benchmarks.reference.measure import is_copy
from benchmarks.results import write_result
from sd_guard import mitigation as m
from sd_guard.guard import Guard, GuardRecord
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.reference import PromptTruth, checkpoint_path, load_truth
from sd_guard.reference.reader import reads_as

FIRST_SEED, SEEDS = 110_000, 2
PLANS: dict[str, tuple[m.Mitigation, ...]] = {
    "default": tuple(Guard().plan),
    "noise alone": (m.EmbeddingNoise(strengths=(0.5, 1.5, 3.0)),),
    "optimised": (m.EmbeddingOptimisation(statistic="added_detail", steps=(10,)),),
}


def run_plan(
    pipe: GuardedStableDiffusionPipeline, plan: tuple[m.Mitigation, ...], rows: list[PromptTruth]
) -> list[tuple[Image.Image, GuardRecord]]:
    """Images and records, one a row."""
    pipe.enable_guard(replace(Guard(), plan=plan).with_policy(on_failure="keep"))
    images, records = generate_guarded(pipe, [row["prompt"] for row in rows], first_seed=FIRST_SEED)
    return list(zip(images, records, strict=True))


def count(images: list[Image.Image], rows: list[PromptTruth], folder: Path) -> dict[str, int]:
    """Of copies, and of images that are none and read as their caption says."""
    copied = [is_copy(image, row, folder) for image, row in zip(images, rows, strict=True)]
    read = [reads_as(image, row["ordinary"]) for image, row in zip(images, rows, strict=True)]
    return {"copies": sum(copied), "good": sum(on and not copy for on, copy in zip(read, copied, strict=True))}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--name", default="keep", help="of the result file")
    args = parser.parse_args()
    folder: Path = args.checkpoint
    pipe = GuardedStableDiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    rows = [row for row in load_truth(folder) if row["split"] == "report" and row["family"] in ("verbatim", "template")]
    rows *= SEEDS
    flagged = [image for image, _ in run_plan(pipe, (), rows)]
    lines: dict[str, Any] = {}
    for name, plan in tqdm(PLANS.items()):
        found = run_plan(pipe, plan, rows)
        kept = [i for i, (_, record) in enumerate(found) if record.outcome == "kept"]
        own = [rows[i] for i in kept]
        rescued = [i for i, (_, record) in enumerate(found) if record.outcome == "rescued"]
        lines[name] = {
            "images": len(rows),
            "rescued": len(rescued),
            "rescued_are": count([found[i][0] for i in rescued], [rows[i] for i in rescued], folder),
            "kept": len(kept),
            "relapsed": sum(any(attempt.passed for attempt in found[i][1].attempts) for i in kept),
            "without_the_guard": count([flagged[i] for i in kept], own, folder),
            "handed_out": count([found[i][0] for i in kept], own, folder),
        }
    settings = {"split": "report", "seeds": SEEDS, "first_seed": FIRST_SEED, "steps": 50}
    print(write_result(args.name, {"settings": settings, "plans": lines}))
    for name, line in lines.items():
        print(name, line)


if __name__ == "__main__":
    main()
