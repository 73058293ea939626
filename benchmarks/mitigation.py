"""What the guard's default plan does to each family: `python -m benchmarks.mitigation [--checkpoint FOLDER]`.

Guarded against unguarded images of the same seeds, and the oracle (the rare phrase removed by hand), on both splits.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm

from benchmarks.reference.measure import BATCH, generate, is_copy, tells_memory
from benchmarks.results import write_result
from sd_guard.guard import GuardRecord
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.reference import checkpoint_path, load_truth
from sd_guard.reference.reader import reads_as

FIRST_SEED = 20_000  # nothing was chosen by looking at images of these seeds


def generate_guarded(
    pipe: GuardedStableDiffusionPipeline, prompts: list[str], *, first_seed: int = FIRST_SEED
) -> tuple[list[Image.Image], list[GuardRecord]]:
    """Images and records, one a prompt, of the seeds that `generate` uses."""
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    records: list[GuardRecord] = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="guarded"):
        part = prompts[start : start + BATCH]
        output = pipe(part, generator=[torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))])
        images += output.images
        records += output.records
    return images, records


def share(values: list[bool]) -> float | None:
    """Of true ones; None of an empty list."""
    return round(float(np.mean(values)), 4) if values else None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--name", default="mitigation", help="of the result file")
    parser.add_argument("--split", default="report", choices=("tune", "report"))
    parser.add_argument("--seeds", type=int, default=10, help="images a memorized prompt; one of every other")
    args = parser.parse_args()
    folder: Path = args.checkpoint
    times = {"verbatim": args.seeds, "template": args.seeds}
    rows = [row for row in load_truth(folder) if row["split"] == args.split for _ in range(times.get(row["family"], 1))]
    prompts = [row["prompt"] for row in rows]
    plain = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    before = list(generate(plain, prompts, first_seed=FIRST_SEED))
    stripped = list(generate(plain, [row["ordinary"] or row["prompt"] for row in rows], first_seed=FIRST_SEED))
    after, records = generate_guarded(GuardedStableDiffusionPipeline.from_pipe(plain), prompts)

    table: dict[str, dict[str, Any]] = {}
    for family in ("verbatim", "template", "plain", "novel"):
        own = [i for i, row in enumerate(rows) if row["family"] == family]
        given = [i for i in own if records[i].outcome != "blocked"]
        rescued = [i for i in own if records[i].outcome == "rescued"]
        known, read = family in ("verbatim", "template"), family != "plain"
        kinds = {"before": before, "after": after, "oracle": stripped}
        copies = {
            f"{rule}_{kind}": share([(kind != "after" or i in given) and call(images[i], rows[i], folder) for i in own])
            if known
            else None
            for rule, call in (("copies", is_copy), ("beyond_caption", tells_memory))
            for kind, images in kinds.items()
        }
        table[family] = {
            "images": len(own),
            "outcomes": dict(Counter(records[i].outcome for i in own)),
            "flagged": share([records[i].verdict == "flag" for i in own]),
            "changed": share([before[i].tobytes() != after[i].tobytes() for i in own]),
            "flagged_of_copies": share(
                [records[i].verdict == "flag" for i in own if is_copy(before[i], rows[i], folder)]
            )
            if known
            else None,
            **copies,
            "on_caption_before": share([reads_as(before[i], rows[i]["ordinary"]) for i in own]) if read else None,
            "on_caption_rescued": share([reads_as(after[i], rows[i]["ordinary"]) for i in rescued]) if read else None,
            "on_caption_oracle": share([reads_as(stripped[i], rows[i]["ordinary"]) for i in own]) if read else None,
            "extra_lanes_mean": round(float(np.mean([records[i].extra_lanes for i in own])), 2),
            "extra_lanes_p95": round(float(np.percentile([records[i].extra_lanes for i in own], 95)), 2),
            "extra_lanes_max": max(records[i].extra_lanes for i in own),
            "mitigations": dict(
                Counter(
                    f"{r.attempts[-1].mitigation} {r.attempts[-1].strength:g}" for r in (records[i] for i in rescued)
                )
            ),
        }
    asked = {"split": args.split, "first_seed": FIRST_SEED}
    settings: dict[str, Any] = {"steps": 50, "guidance_scale": 7.5, "lanes_an_image": 100, **asked}
    # Lanes of a stream of which one prompt in twenty is memorized verbatim, over those of plain sampling.
    mixed = 0.05 * float(table["verbatim"]["extra_lanes_mean"]) + 0.95 * float(table["novel"]["extra_lanes_mean"])
    stream = {"stream_of_5_percent": round(1 + mixed / settings["lanes_an_image"], 4)}
    print(write_result(args.name, {"settings": settings, **table, **stream}))
    for family, row in table.items():
        print(family, row)


if __name__ == "__main__":
    main()
