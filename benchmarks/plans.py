"""Whole plans, end to end, on `tune` rows of a checkpoint: `python -m benchmarks.plans [--checkpoint FOLDER]`.

Which mitigation comes first, how strong, where it resumes and what follows, with verification, budget and other noise
as they are. `good` is the share of memorized prompts' images that are handed out, are no copy and read as their caption
says; the default plan is to have most of these a lane. `benchmarks.mitigations` has each mitigation by itself.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.mitigation import generate_guarded
from benchmarks.reference.measure import is_copy
from benchmarks.results import FOLDER, revision, write_result
from sd_guard import mitigation as m
from sd_guard.guard import Guard
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.reference import PromptTruth, checkpoint_path, load_truth
from sd_guard.reference.reader import reads_as

FIRST_SEED, SEEDS = 95_000, 2
FEW, SUMMARY, WORDS = m.WordAblation(widen=False), m.SummaryReplacement(), m.WordAblation()
NOISE = m.EmbeddingNoise(strengths=(3.0,))
PLANS: dict[str, tuple[m.Mitigation, ...]] = {
    "few words, summary, words, noise (default)": tuple(Guard().plan),
    "few words from 6%, summary, words, noise": (m.Later(mitigation=FEW), SUMMARY, WORDS, NOISE),
    "summary, few words, words, noise": (SUMMARY, FEW, WORDS, NOISE),
    "summary from 6%, few words, words, noise": (m.Later(mitigation=SUMMARY), FEW, WORDS, NOISE),
    "words, summary, noise": (WORDS, SUMMARY, NOISE),
    "words, noise": (WORDS, NOISE),
    "few words from 2%, summary, words, noise": (m.Later(mitigation=FEW, at=0.02), SUMMARY, WORDS, NOISE),
    "words at a weight of .25, summary, words, noise": (m.WordWeighting(weights=(0.25,)), SUMMARY, WORDS, NOISE),
    "few words, summary, words, noise of 5": (FEW, SUMMARY, WORDS, m.EmbeddingNoise(strengths=(5.0,))),
}


def run_plan(
    pipe: GuardedStableDiffusionPipeline, plan: tuple[m.Mitigation, ...], rows: list[PromptTruth], folder: Path
) -> dict[str, Any]:
    """Shares of images, and lanes, of one plan."""
    pipe.enable_guard(replace(Guard(), plan=plan))
    good, copied, blocked, lanes = [], [], [], []
    images, records = generate_guarded(pipe, [row["prompt"] for row in rows], first_seed=FIRST_SEED)
    for row, image, record in zip(rows, images, records, strict=True):
        given = record.outcome != "blocked"
        copied.append(given and is_copy(image, row, folder))
        good.append(given and not copied[-1] and reads_as(image, row["ordinary"]))
        blocked.append(not given)
        lanes.append(record.extra_lanes)
    return {
        "images": len(rows),
        **{
            name: round(float(np.mean(of)), 4)
            for name, of in (("good", good), ("copies", copied), ("blocked", blocked))
        },
        "lanes_mean": round(float(np.mean(lanes)), 2),
        "lanes_p95": round(float(np.percentile(lanes, 95)), 1),
        "good_per_100_lanes": round(100 * sum(good) / sum(lanes), 3),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--name", default="plans", help="of the result file")
    parser.add_argument("--only", choices=PLANS, nargs="+", help="measured anew, the other lines as they are")
    args = parser.parse_args()
    pipe = GuardedStableDiffusionPipeline.from_pretrained(args.checkpoint, local_files_only=True, use_safetensors=True)
    truth = [row for row in load_truth(args.checkpoint) if row["split"] == "tune"]
    families = {name: [row for row in truth if row["family"] == name] * SEEDS for name in ("verbatim", "template")}
    lines = {
        name: {family: run_plan(pipe, plan, rows, args.checkpoint) for family, rows in families.items()}
        for name, plan in tqdm(PLANS.items())
        if not args.only or name in args.only
    }
    if args.only:
        file = FOLDER / f"{args.name}.json"
        known = json.loads(file.read_text())
        known["plans"] |= {name: line | {"git": revision()} for name, line in lines.items()}
        file.write_text(json.dumps(known, indent=1) + "\n")
        return
    settings = {"split": "tune", "seeds": SEEDS, "first_seed": FIRST_SEED, "steps": 50}
    print(write_result(args.name, {"settings": settings, "plans": lines}))
    for name, line in lines.items():
        print(name, line)


if __name__ == "__main__":
    main()
