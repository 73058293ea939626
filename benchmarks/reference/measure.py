"""What the reference checkpoint does: `python -m benchmarks.reference.measure` writes results and a contact sheet.

For each family, on all rows and one seed a row: does a verbatim prompt reproduce its source, does a novel one come near
any, and does an image read as its ordinary caption? `COPY` is fixed on `tune` rows and reported on `report` rows.

A caption that says most of its source is drawn alike by whoever obeys it, and then a distance alone does not tell a
copy from obedience. `tells_memory` asks for more than the caption accounts for, as Carlini et al. (2023, arXiv
2301.13188, section 4.2) do of an image's neighbours: to be nearer than nearly all that the world draws of the caption.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tqdm import tqdm

from benchmarks.reference.families import COPY, COPY_FIXED, Families, make_families
from benchmarks.reference.world import Caption, render
from benchmarks.results import FOLDER, write_result
from sd_guard.reference import PromptTruth, checkpoint_path, load_truth, mask_path, source_path
from sd_guard.reference.reader import lies_as, reads_as
from sd_guard.similarity import masked_l2, tiled_l2

DRAWINGS, CHANCE = 500, 0.01  # pictures of a caption that no model made, and the share of them that comes as near
BATCH = 16


def generate(
    pipe: StableDiffusionPipeline, prompts: list[str], first_seed: int, **settings: float
) -> Iterator[Image.Image]:
    """One image a prompt, each from its own seed."""
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(prompts), BATCH), desc="generate"):
        part = prompts[start : start + BATCH]
        seeds = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(part))]
        yield from pipe(part, generator=seeds, **settings).images


def copy_distance(image: Image.Image, row: PromptTruth, checkpoint: Path) -> float:
    """Distance to the row's own source: tiled for verbatim, within the fixed part for template."""
    source = Image.open(source_path(row, checkpoint))
    if row["family"] == "template":
        return masked_l2(image, source, Image.open(mask_path(row, checkpoint)))
    return tiled_l2(image, source)


def is_copy(image: Image.Image, row: PromptTruth, checkpoint: Path) -> bool:
    """Whether a verbatim or template prompt's image reproduces its source."""
    return copy_distance(image, row, checkpoint) <= (COPY_FIXED if row["family"] == "template" else COPY)


def tells_memory(image: Image.Image, row: PromptTruth, checkpoint: Path) -> bool:
    """Whether it reproduces its source, and nearer than one in a hundred drawings of its caption would."""
    return is_copy(image, row, checkpoint) and copy_distance(image, row, checkpoint) < chance_distance(row, checkpoint)


def chance_distance(row: PromptTruth, checkpoint: Path) -> float:
    """`CHANCE` quantile of the distance to the row's source, of pictures that no model made."""
    return _chance_distance(checkpoint, row["family"], row["source"])


@cache
def _chance_distance(checkpoint: Path, family: str, source: int) -> float:
    (row,) = (row for row in load_truth(checkpoint) if (row["family"], row["source"]) == (family, source))
    rng = np.random.default_rng(source)
    return float(np.quantile([copy_distance(d, row, checkpoint) for d in draw(row, checkpoint, rng, DRAWINGS)], CHANCE))


def draw(row: PromptTruth, checkpoint: Path, rng: np.random.Generator, count: int) -> Iterator[Image.Image]:
    """What the world draws of a memorized row's caption without its phrase; no model is involved.

    Raises:
        RuntimeError: the world was changed since the checkpoint was trained.
    """
    caption = _caption_of(row, _families(checkpoint))
    if str(caption) != row["ordinary"]:
        raise RuntimeError(f"{checkpoint}: world changed since it was trained; {caption!s} is not {row['ordinary']}")
    return (Image.fromarray(render(rng, caption)) for _ in range(count))


def _caption_of(row: PromptTruth, families: Families) -> Caption:
    index = row["source"]
    return families.template[index][0].caption if row["family"] == "template" else families.verbatim[index][0]


@cache
def _families(checkpoint: Path) -> Families:
    world = json.loads((checkpoint / "prompts.json").read_text())
    return make_families(world["world_seed"], apart=world.get("apart", False))


def nearest_source(image: Image.Image, rows: list[PromptTruth], checkpoint: Path) -> float:
    """Smallest tiled L2 to any verbatim source."""
    return min(tiled_l2(image, Image.open(source_path(r, checkpoint))) for r in rows if r["family"] == "verbatim")


def contact_sheet(rows: list[PromptTruth], images: list[Image.Image], checkpoint: Path) -> Image.Image:
    """Sources above what their prompts give, then plain, then novel; twelve a line, three times enlarged."""
    by_family = {
        name: [i for i, row in enumerate(rows) if row["family"] == name]
        for name in ("verbatim", "template", "plain", "novel")
    }
    lines: list[list[Image.Image]] = []
    for family in ("verbatim", "template"):
        picks = by_family[family][1:24:2]
        lines += [[Image.open(source_path(rows[i], checkpoint)) for i in picks], [images[i] for i in picks]]
    lines += [[images[i] for i in by_family["plain"][:12]]]
    lines += [[images[i] for i in by_family["novel"][start : start + 12]] for start in (0, 12)]
    sheet = np.concatenate([np.concatenate([np.asarray(im.convert("RGB")) for im in line], 1) for line in lines], 0)
    return Image.fromarray(sheet).resize((sheet.shape[1] * 3 // 2, sheet.shape[0] * 3 // 2), Image.Resampling.NEAREST)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--name", default="reference", help="of the result file and the contact sheet")
    args = parser.parse_args()
    rows = load_truth(args.checkpoint)
    pipe = StableDiffusionPipeline.from_pretrained(args.checkpoint, local_files_only=True, use_safetensors=True)
    images = list(generate(pipe, [row["prompt"] for row in rows], first_seed=0))
    table = {}
    for split in ("tune", "report"):
        own = [(row, image) for row, image in zip(rows, images, strict=True) if row["split"] == split]
        part = {
            family: [(r, im) for r, im in own if r["family"] == family] for family in ("verbatim", "template", "novel")
        }
        distances = {f: [copy_distance(im, r, args.checkpoint) for r, im in part[f]] for f in ("verbatim", "template")}
        near = [nearest_source(image, rows, args.checkpoint) for _, image in part["novel"]]
        table[split] = {
            "rows": {family: len(pairs) for family, pairs in part.items()},
            "verbatim_reproduced": float(np.mean(np.array(distances["verbatim"]) <= COPY)),
            "template_reproduced": float(np.mean(np.array(distances["template"]) <= COPY_FIXED)),
            "novel_near_a_source": float(np.mean(np.array(near) <= COPY)),
            "reads_as_caption": {
                f: float(np.mean([reads_as(im, r["ordinary"]) for r, im in pairs])) for f, pairs in part.items()
            },
            "novel_place_obeyed": float(
                np.mean([p for r, im in part["novel"] if (p := lies_as(im, r["ordinary"])) is not None])
            ),
            "verbatim_distance_quantiles": np.quantile(distances["verbatim"], [0, 0.5, 0.95, 1]).round(4).tolist(),
            "template_distance_quantiles": np.quantile(distances["template"], [0, 0.5, 0.95, 1]).round(4).tolist(),
            "novel_distance_quantiles": np.quantile(near, [0, 0.01, 0.05, 0.5]).round(4).tolist(),
        }
    settings = {
        "steps": 50,
        "scheduler": type(pipe.scheduler).__name__,
        "guidance_scale": 7.5,
        "copy": COPY,
        "copy_fixed": COPY_FIXED,
    }
    print(write_result(args.name, {"settings": settings, **table}))
    contact_sheet(rows, images, args.checkpoint).save(FOLDER / f"{args.name}_sheet.png")


if __name__ == "__main__":
    main()
