"""False-positive rates of calibrated thresholds, as promised or not: `python -m benchmarks.conformal`.

Benign prompts (novel and plain) of the bundled checkpoint, both splits, one image each. Once as a user would: from the
`tune` rows, counted on `report`. And over 200 random halves of all, whose mean is what the guarantee speaks of.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import binom
from tqdm import tqdm

from benchmarks.results import write_result
from sd_guard.calibration import conformal_threshold
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.reference import checkpoint_path, load_truth
from sd_guard.screening.calibrating import score_prompts

BATCH, FIRST_SEED, SPLITS = 16, 40_000, 200


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--name", default="conformal", help="of the result file")
    args = parser.parse_args()
    rows = [row for row in load_truth(args.checkpoint) if row["family"] in ("novel", "plain")]
    pipe = GuardedStableDiffusionPipeline.from_pretrained(args.checkpoint, local_files_only=True, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    scores: list[float] = []
    for start in tqdm(range(0, len(rows), BATCH), desc="score", mininterval=5):
        prompts = [row["prompt"] for row in rows[start : start + BATCH]]
        seeds = range(FIRST_SEED + start, FIRST_SEED + start + len(prompts))
        scores += [record.score for record in score_prompts(pipe, prompts, seeds)]
    values, tune = np.array(scores), np.array([row["split"] == "tune" for row in rows])
    rng, lines = np.random.default_rng(0), []
    for alpha in (0.01, 0.02, 0.05):
        threshold = conformal_threshold(values[tune].tolist(), alpha)
        flagged, count = int((values[~tune] > threshold).sum()), int((~tune).sum())
        rates = []
        for _ in range(SPLITS):
            order = rng.permutation(len(values))
            half, rest = order[: len(order) // 2], order[len(order) // 2 :]
            rates.append(float((values[rest] > conformal_threshold(values[half].tolist(), alpha)).mean()))
        lines.append(
            {
                "alpha": alpha,
                "threshold": round(threshold, 4),
                "report_rate": round(flagged / count, 4),
                "report_interval_at_alpha": [round(float(q) / count, 4) for q in binom.interval(0.95, count, alpha)],
                "mean_rate_over_random_halves": round(float(np.mean(rates)), 4),
            }
        )
        print(lines[-1])
    print(write_result(args.name, {"settings": {"tune": int(tune.sum()), "splits": SPLITS}, "lines": lines}))


if __name__ == "__main__":
    main()
