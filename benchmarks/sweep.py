"""The guard's detection across settings: `python -m benchmarks.sweep [--checkpoint FOLDER] [--name NAME]`.

Guidance, number of steps, scheduler and dtype, one at a time around the default, on `report` rows (of the novel ones
the first `NOVEL`), one seed a prompt.
The threshold is the default's throughout: nothing is calibrated.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.results import write_result
from sd_guard.evaluation.metrics import auroc, tpr_at
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.reference import PromptTruth, checkpoint_path, load_truth
from sd_guard.screening.calibrating import score_prompts

BATCH, NOVEL = 16, 60
DEFAULT = {"scheduler": "DDIMScheduler", "steps": 50, "guidance_scale": 7.5, "dtype": "float32"}
CHANGES = (
    {},
    *({"guidance_scale": scale} for scale in (1.0, 2.0, 4.0, 12.0)),
    *({"steps": steps} for steps in (4, 10, 15, 20, 30)),
    *(
        {"scheduler": name}
        for name in (
            "EulerDiscreteScheduler",
            "EulerAncestralDiscreteScheduler",
            "DPMSolverMultistepScheduler",
            "PNDMScheduler",
        )
    ),
    {"dtype": "bfloat16"},
)


def score(folder: Path, rows: list[PromptTruth], setting: dict[str, Any]) -> dict[str, Any]:
    """AUROC, TPR at 1 % FPR, and shares that the default threshold flags, in one setting."""
    pipe = GuardedStableDiffusionPipeline.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, torch_dtype=getattr(torch, setting["dtype"])
    )
    pipe.scheduler = getattr(diffusers, setting["scheduler"]).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    records = []
    for start in tqdm(range(0, len(rows), BATCH), desc=str(setting), mininterval=5):
        prompts = [row["prompt"] for row in rows[start : start + BATCH]]
        seeds = list(range(start, start + len(prompts)))
        call = {"num_inference_steps": setting["steps"], "guidance_scale": setting["guidance_scale"]}
        records += score_prompts(pipe, prompts, seeds, **call)
    families = np.array([row["family"] for row in rows])
    scores = np.array([record.score for record in records])
    found: dict[str, Any] = {}
    for name, positives in (("verbatim", ["verbatim"]), ("template", ["template"])):
        asked = np.isin(families, [*positives, "novel", "plain"])
        positive = np.isin(families[asked], positives)
        found[f"{name} / novel + plain"] = {
            "auroc": round(auroc(scores[asked], positive), 4),
            "tpr_at_1_fpr": round(tpr_at(scores[asked], positive, 0.01), 4),
        }
    flags = np.array([record.verdict == "flag" for record in records])
    found["flagged"] = {f: round(float(flags[families == f].mean()), 4) for f in np.unique(families).tolist()}
    lanes = np.array([record.extra_lanes for record in records])
    found["extra_lanes_novel"] = round(float(lanes[families == "novel"].mean()), 2)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--name", default="sweep", help="of the result file")
    args = parser.parse_args()
    rows = [row for row in load_truth(args.checkpoint) if row["split"] == "report"]
    novel = [row for row in rows if row["family"] == "novel"]
    rows = [row for row in rows if row["family"] != "novel"] + novel[:NOVEL]
    lines = [{"setting": DEFAULT | change, **score(args.checkpoint, rows, DEFAULT | change)} for change in CHANGES]
    print(write_result(args.name, {"lines": lines}))
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
