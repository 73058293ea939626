"""Every mitigation by itself, on verbatim prompts: `python -m benchmarks.mitigations [--split tune]`.

Each variant's first change is taken whatever the guard thinks of it, so that what it does is seen, and not what
verification lets through; the last row is the default plan as it is used. `good` is the share of images that are no
copy and still read as their caption says. What a plan of several makes of them: `benchmarks.plans`.
A variant runs in a process of its own, for its peak memory. Lanes, seconds and memory are those of a batch of `BATCH`
images beyond the unguarded run's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.reference.measure import is_copy
from benchmarks.results import FOLDER, revision, write_result
from sd_guard import mitigation as m
from sd_guard.bench.mitigation import TakeAnything
from sd_guard.guard import Guard
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.reference import PromptTruth, checkpoint_path, load_truth
from sd_guard.reference.reader import reads_as
from sd_guard.similarity import tiled_l2

FIRST_SEED, SEEDS, BATCH = 90_000, 2, 4


NEAREST = m.NearestMeaning()
NONE = "none"
DEFAULT = "default plan, verified"
VARIANTS: dict[str, m.Mitigation] = {
    "word_ablation": m.WordAblation(),
    **{f"word_ablation, from {x:.0%}": m.Later(at=x) for x in (0.02, 0.06)},
    **{f"word_weighting {x:g}": m.WordWeighting(weights=(x,)) for x in (0.5, 0.25)},
    "summary_replacement": m.SummaryReplacement(),
    **{f"summary_replacement, from {x:.0%}": m.Later(mitigation=m.SummaryReplacement(), at=x) for x in (0.02, 0.06)},
    **{f"embedding_noise {x:g}": m.EmbeddingNoise(strengths=(x,)) for x in (0.5, 1.5, 3.0, 5.0)},
    **{
        f"random_tokens, {how} 4": m.RandomTokens(how=how, counts=(4,))
        for how in ("add", "replace", "number", "repeat")
    },
    **{
        f"embedding_optimisation, {name} 10": m.EmbeddingOptimisation(statistic=name, steps=(10,))
        for name in ("cfg_norm", "score_norm", "trajectory_lid", "flipd", "added_detail")
    },
    "embedding_optimisation, cfg_norm 20": m.EmbeddingOptimisation(steps=(20,)),
    **{
        f"token_replacement, nearest {n}": m.TokenReplacement(rewriter=m.NearestMeaning(), words=(n,))
        for n in (1, 2, 4)
    },
    **{f"token_replacement, deletion {n}": m.TokenReplacement(rewriter=m.Deletion(), words=(n,)) for n in (1, 2, 4)},
    "prompt_reanchoring, nearest": m.PromptReanchoring(rewriter=NEAREST),
    "prompt_reanchoring, deletion": m.PromptReanchoring(rewriter=m.Deletion()),
    **{f"lower_guidance {x:g}": m.LowerGuidance(scales=(x,)) for x in (3.0, 1.0)},
    **{f"delayed_guidance {x:g}": m.DelayedGuidance(until=(x,)) for x in (0.1, 0.2, 0.4)},
    **{f"dynamic_transition, before {x:g}": m.DynamicTransition(before=x) for x in (1.0, 0.0)},
    **{f"opposite_guidance {x:g}": m.OppositeGuidance(until=(x,)) for x in (0.2, 0.35)},
    "new_seed": m.NewSeed(seeds=1),
    "noise_optimisation 10": m.NoiseOptimisation(steps=(10,)),
    "renoise 0.06": m.Renoise(to=(0.06,)),
    "summary_mask": m.SummaryMask(),
}


def rows_of(folder: Path, split: str) -> list[PromptTruth]:
    """Verbatim rows, a prompt's seeds side by side."""
    rows = [row for row in load_truth(folder) if (row["split"], row["family"]) == (split, "verbatim")]
    return [row for row in rows for _ in range(SEEDS)]


def run_variant(name: str, folder: Path, split: str) -> dict[str, Any]:
    """One line of the table."""
    rows = rows_of(folder, split)
    pipe = GuardedStableDiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    if name == NONE:
        pipe.disable_guard()
    elif name != DEFAULT:
        policy = TakeAnything(budget=2_000, max_attempts=1, max_resemblance=1.0, on_failure="keep")
        pipe.enable_guard(replace(Guard(), plan=(VARIANTS[name],), policy=policy))
    images, records, started = [], [], time.perf_counter()
    for start in range(0, len(rows), BATCH):
        seeds = [torch.Generator().manual_seed(FIRST_SEED + start + i) for i in range(len(rows[start : start + BATCH]))]
        output = pipe([row["prompt"] for row in rows[start : start + BATCH]], generator=seeds)
        images += output.images
        records += output.records or []
    seconds = time.perf_counter() - started
    given = [i for i in range(len(rows)) if not records or records[i].outcome != "blocked"]
    pairs = [
        tiled_l2(images[i], images[j])
        for start in range(0, len(rows), SEEDS)
        for i, j in combinations(range(start, start + SEEDS), 2)
        if i in given and j in given
    ]
    copies = [i in given and is_copy(images[i], rows[i], folder) for i in range(len(rows))]
    read = [i in given and reads_as(images[i], rows[i]["ordinary"]) for i in range(len(rows))]
    lanes = float(np.mean([record.extra_lanes for record in records])) if records else 0.0
    good = float(np.mean([on and not copy for on, copy in zip(read, copies, strict=True)]))
    return {
        "images": len(rows),
        "reproduced": float(np.mean(copies)),
        "on_caption": float(np.mean([read[i] for i in given])) if given else None,
        "good": good,
        "good_per_100_lanes": 100 * good / lanes if lanes else None,
        "blocked": 1 - len(given) / len(rows),
        "diversity": float(np.mean(pairs)) if pairs else None,
        "extra_lanes": lanes,
        "seconds_an_image": seconds / len(rows),
        "peak_mib": peak_mib(),
        "pixels": [np.asarray(images[i]).tolist() if i in given else None for i in range(len(rows))],
    }


def peak_mib() -> float:
    """Of this process's own resident memory; what `getrusage` says begins with that of the process that forked it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def distance(pixels: list[Any], unguarded: list[Any]) -> float | None:
    """Root-mean-square difference from the unguarded image, in [0, 1], mean over what was handed out."""
    found = [
        np.sqrt(((np.asarray(own, dtype=float) - np.asarray(plain, dtype=float)) ** 2).mean()) / 255
        for own, plain in zip(pixels, unguarded, strict=True)
        if own is not None
    ]
    return float(np.mean(found)) if found else None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--name", default="mitigations", help="of the result file")
    parser.add_argument("--split", default="report", choices=("tune", "report"))
    parser.add_argument("--only", choices=VARIANTS, nargs="+", help="measured anew, the other lines as they are")
    parser.add_argument("--variant", choices=(NONE, *VARIANTS, DEFAULT), help="that one alone, as JSON")
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(run_variant(args.variant, args.checkpoint, args.split)))
        return
    lines: dict[str, dict[str, Any]] = {}
    for name in (NONE, *(args.only or (*VARIANTS, DEFAULT))):
        asked = ["--checkpoint", str(args.checkpoint), "--split", args.split, "--variant", name]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.mitigations", *asked], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        lines[name] = json.loads(done.stdout.splitlines()[-1])
        own, plain = lines[name], lines[NONE]
        own["distance"] = distance(own["pixels"], plain["pixels"])
        own["extra_seconds"] = own["seconds_an_image"] - plain["seconds_an_image"]
        own["extra_peak_mib"] = own["peak_mib"] - plain["peak_mib"]
        print(name, {key: value for key, value in own.items() if key != "pixels"}, flush=True)
    for line in lines.values():
        del line["pixels"]
    kept = {
        name: {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}
        for name, line in lines.items()
    }
    if args.only:
        file = FOLDER / f"{args.name}.json"
        known = json.loads(file.read_text())
        added = {name: kept[name] | {"git": revision()} for name in args.only}
        merged = known["lines"] | added
        known["lines"] = {name: merged[name] for name in (NONE, *VARIANTS, DEFAULT) if name in merged}
        file.write_text(json.dumps(known, indent=1) + "\n")
        return
    settings = {"split": args.split, "seeds": SEEDS, "batch": BATCH, "first_seed": FIRST_SEED, "steps": 50}
    print(write_result(args.name, {"settings": settings, "lines": kept}))


if __name__ == "__main__":
    main()
