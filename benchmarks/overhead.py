"""Guarded over unguarded time with nothing mitigated: `python -m benchmarks.overhead`.

Pairs in one run, each of other benign prompts; as the guard is by default, but that an image which is flagged is kept.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from benchmarks.results import write_result
from sd_guard.guard import Guard
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.policy import Policy
from sd_guard.reference import checkpoint_path, load_truth


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    plain = StableDiffusionPipeline.from_pretrained(args.checkpoint, local_files_only=True, use_safetensors=True)
    plain.to(args.device)
    guarded = GuardedStableDiffusionPipeline.from_pipe(plain)
    guarded.enable_guard(Guard(policy=Policy(max_attempts=0, on_failure="keep")))
    prompts = [row["prompt"] for row in load_truth(args.checkpoint) if row["family"] == "novel"]

    def seconds(pipe: StableDiffusionPipeline, batch: int, pair: int = 0) -> tuple[float, float]:
        pipe.set_progress_bar_config(disable=True)
        seeds = [torch.Generator().manual_seed(i) for i in range(batch)]
        started = time.perf_counter()
        output = pipe(prompts[pair * batch : (pair + 1) * batch], generator=seeds)
        # It ended with images on the CPU, so the clock needs no event.
        elapsed = time.perf_counter() - started
        records = getattr(output, "records", None) or []
        return elapsed, float(np.mean([record.extra_lanes for record in records])) if records else 0.0

    lines = []
    for batch in args.batches:
        seconds(plain, batch), seconds(guarded, batch)
        pairs = [(seconds(plain, batch, pair)[0], seconds(guarded, batch, pair)) for pair in range(args.pairs)]
        ratios = [with_guard / without for without, (with_guard, _) in pairs]
        lines.append(
            {
                "batch": batch,
                "unguarded_seconds": round(float(np.median([without for without, _ in pairs])), 3),
                "ratio_median": round(float(np.median(ratios)), 4),
                "ratio_quartiles": np.quantile(ratios, [0.25, 0.75]).round(4).tolist(),
                "extra_lanes_an_image": round(float(np.mean([lanes for _, (_, lanes) in pairs])), 2),
            }
        )
        print(lines[-1])
    print(
        write_result(
            "overhead", {"settings": {"steps": 50, "guidance_scale": 7.5, "pairs": args.pairs}, "batches": lines}
        )
    )


if __name__ == "__main__":
    main()
