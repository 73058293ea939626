"""Every statistic side by side on a reference checkpoint: `python -m benchmarks.detection [--checkpoint FOLDER]`.

One run, one seed a prompt: statistics of each observed step, AUROC and TPR at 1 % FPR of each alone and of the default
detector, on `tune` and `report` rows apart. Nothing is mitigated here.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from benchmarks.results import write_result
from sd_guard.calibration import observations_of
from sd_guard.guard import Guard, GuardRecord
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.policy import Policy
from sd_guard.reference import PromptTruth, checkpoint_path, load_truth

BATCH = 16
SHARES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.24, 0.3, 0.4)
LOWER_IS_MEMORIZED = ("trajectory_lid", "trajectory_lid_control")
QUESTIONS = {
    "verbatim / novel": (("verbatim",), ("novel",)),
    "verbatim / novel + plain": (("verbatim",), ("novel", "plain")),
    "template / novel + plain": (("template",), ("novel", "plain")),
    "both / novel + plain": (("verbatim", "template"), ("novel", "plain")),
}


def screen(
    pipe: GuardedStableDiffusionPipeline, rows: list[PromptTruth], guard: Guard, **settings: float
) -> list[GuardRecord]:
    """Records of one image a prompt, with nothing mitigated or decoded; sampling ends after the deciding step."""
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_guard(replace(guard, policy=Policy(max_attempts=0, on_failure="keep")))

    def stop(pipe: GuardedStableDiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        pipe._interrupt = step >= guard.steps(len(pipe.scheduler.timesteps))[0][-1]
        return tensors

    records: list[GuardRecord] = []
    for start in tqdm(range(0, len(rows), BATCH), desc="screen", mininterval=5):
        part = [row["prompt"] for row in rows[start : start + BATCH]]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        output = pipe(part, generator=seeds, output_type="latent", callback_on_step_end=stop, **settings)
        records += output.records
    return records


def tpr_at(scores: NDArray[np.float64], positive: NDArray[np.bool_], rate: float) -> float:
    """True-positive rate where at most `rate` of the negatives score higher."""
    negatives = np.sort(scores[~positive])[::-1]
    return float((scores[positive] > negatives[int(rate * len(negatives))]).mean())


def judge(scores: NDArray[np.float64], families: NDArray[np.str_]) -> dict[str, dict[str, float]]:
    """AUROC and TPR at 1 % FPR of one statistic (higher = more memorized), for each question."""
    table: dict[str, dict[str, float]] = {}
    for question, (positives, negatives) in QUESTIONS.items():
        asked = np.isin(families, positives + negatives)
        positive = np.isin(families[asked], positives)
        auroc = float(roc_auc_score(positive, scores[asked]))
        table[question] = {"auroc": round(auroc, 4), "tpr_at_1_fpr": round(tpr_at(scores[asked], positive, 0.01), 4)}
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--name", default="detection", help="of the result file")
    args = parser.parse_args()
    rows = load_truth(args.checkpoint)
    pipe = GuardedStableDiffusionPipeline.from_pretrained(args.checkpoint, local_files_only=True, use_safetensors=True)
    default = Guard()
    wide = screen(pipe, rows, replace(default, observe_at=SHARES, probe_at=SHARES))
    records = screen(pipe, rows, default)

    families, splits = (np.array([row[key] for row in rows]) for key in ("family", "split"))
    result: dict[str, object] = {}
    for split in ("tune", "report"):
        own = splits == split
        table: dict[str, object] = {}
        for index, step in enumerate(seen.step for seen in observations_of(wide[0])):
            values = [observations_of(record)[index].values for record in wide]
            for name in values[0]:
                sign = -1 if name in LOWER_IS_MEMORIZED else 1
                scores = np.array([sign * float(value[name]) for value in values])
                table[f"{name} @ {step}"] = judge(scores[own], families[own])
        scores = np.array([record.score for record in records])
        flagged = {
            f: float(
                np.mean([r.verdict == "flag" for r, keep in zip(records, own & (families == f), strict=True) if keep])
            )
            for f in np.unique(families)
        }
        result[split] = {
            "default": judge(scores[own], families[own]),
            "flagged_by_default": flagged,
            "statistics": table,
        }
    settings = {
        "steps": 50,
        "scheduler": type(pipe.scheduler).__name__,
        "guidance_scale": 7.5,
        "decided_at_step": records[0].decided_at_step,
    }
    cost = {"extra_lanes_an_image": records[0].extra_lanes, "lanes_an_image": 100}
    print(
        write_result(args.name, {"settings": settings, "cost": cost, "threshold": default.detector.threshold, **result})
    )
    for split in ("tune", "report"):
        print(split, result[split]["default"], result[split]["flagged_by_default"])  # type: ignore[index]


if __name__ == "__main__":
    main()
