"""Does an explanation name what carries a memory? `python -m benchmarks.attribution [--checkpoint FOLDER]`.

Words: how often the first of all words is one of the two rare words of a verbatim caption, whose meaning the checkpoint
never saw elsewhere. Places: AUROC of the local LID map, pinned against free places of a template, at the deciding
step and the guard's later looks: of the latent's places, but for those that the edge of the window runs through, and of
all pixels of the image, to which the map is brought up as the report shows it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from benchmarks.results import write_result
from sd_guard.attribution import METHODS, pinned_map, read_text
from sd_guard.guard import Guard
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.pipelines.trajectory import denoiser_of, walk
from sd_guard.reference import PromptTruth, checkpoint_path, load_truth, mask_path

FIRST_SEED, SEEDS, STEPS, PROBES = 60_000, 3, 50, 16


def rare_words(row: PromptTruth) -> set[str]:
    """The two names of a memorized caption; the `by` before them stands in other captions, too."""
    return set(row["prompt"].split()) - set(row["ordinary"].split()) - {"by"}


def named(pipe: Any, rows: list[PromptTruth]) -> dict[str, float]:
    """Share of images whose first word, by each method, is a rare one."""
    watched, hits = Guard().steps(STEPS), {name: [] for name in METHODS}
    for place, row in enumerate(tqdm(rows, desc="words", mininterval=5)):
        text = read_text(pipe, row["prompt"])
        for seed in range(FIRST_SEED + SEEDS * place, FIRST_SEED + SEEDS * (place + 1)):
            walked = walk(pipe, [row["prompt"]], [seed], steps=STEPS)
            calls = [call for call in (next(walked) for _ in range(watched[-1] + 1)) if call.step in watched]
            for name, attribute in METHODS.items():
                found = attribute(calls, denoiser_of(pipe, [seed]), text)
                first = max(range(len(found.words)), key=lambda k: found.scores[k])
                hits[name].append(found.words[first] in rare_words(row))
    return {name: round(float(np.mean(values)), 4) for name, values in hits.items()}


def placed(pipe: Any, rows: list[PromptTruth], folder: Path) -> dict[str, dict[str, float]]:
    """AUROC of the map at each look: over all images together, and the mean of each image's own."""
    guard, found = Guard(), {}
    looks = [guard.steps(STEPS)[-1], *guard.later_steps(STEPS)]
    model = denoiser_of(pipe, range(FIRST_SEED, FIRST_SEED + len(rows)))
    for call in walk(pipe, [row["prompt"] for row in rows], model.seeds, steps=STEPS):
        if call.step in looks:
            closed = -pinned_map(call, model, probes=PROBES).numpy()
            size = closed.shape[:0:-1]
            masks = [Image.open(mask_path(row, folder)).convert("L").resize(size, Image.Resampling.BOX) for row in rows]
            share = np.stack([np.asarray(mask) for mask in masks]) / 255
            clear = (share < 0.05) | (share > 0.95)
            own = [roc_auc_score(s[c] > 0.5, m[c]) for s, c, m in zip(share, clear, closed, strict=True)]
            together = roc_auc_score(share[clear] > 0.5, closed[clear])
            pinned = np.stack([np.asarray(Image.open(mask_path(row, folder)).convert("L")) for row in rows]) > 127
            shown = [Image.fromarray(one).resize(pinned.shape[:0:-1], Image.Resampling.BILINEAR) for one in closed]
            pixels = roc_auc_score(pinned.ravel(), np.stack([np.asarray(one) for one in shown]).ravel())
            found[f"step {call.step}"] = {
                "together": round(float(together), 4),
                "mean of each image's": round(float(np.mean(own)), 4),
                "pixels": round(float(pixels), 4),
            }
        if call.step == looks[-1]:
            break
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--name", default="attribution", help="of the result file")
    parser.add_argument("--split", default="report", choices=("tune", "report"))
    args = parser.parse_args()
    pipe = GuardedStableDiffusionPipeline.from_pretrained(args.checkpoint, local_files_only=True, use_safetensors=True)
    pipe.disable_guard()
    rows = [row for row in load_truth(args.checkpoint) if row["split"] == args.split]
    verbatim, template = ([row for row in rows if row["family"] == family] for family in ("verbatim", "template"))
    result = {
        "settings": {"split": args.split, "steps": STEPS, "seeds": SEEDS, "probes": PROBES},
        "rare word first": {"prompts": len(verbatim), **named(pipe, verbatim)},
        "pinned places": {"prompts": len(template), **placed(pipe, template * SEEDS, args.checkpoint)},
    }
    print(write_result(args.name, result), result)


if __name__ == "__main__":
    main()
