"""How often a picture that no model made counts as a copy: `python -m benchmarks.reference.drawings`.

A caption that says most of its source is drawn alike by whoever obeys it. So the world draws each memorized caption
without its phrase, `DRAWINGS` times, and the share that `is_copy` calls copies is what a mitigation that keeps the
caption cannot be expected to go below. Needs no model: some minutes for all checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.checkpoints import MAKES
from benchmarks.reference.families import Families, make_families
from benchmarks.reference.measure import is_copy
from benchmarks.reference.world import Caption, render
from benchmarks.results import write_result
from sd_guard.reference import PromptTruth, checkpoint_path, load_truth

DRAWINGS, SEED = 200, 30_000


def caption_of(row: PromptTruth, families: Families) -> Caption:
    """The caption that the row's phrase was added to."""
    index = row["source"]
    return families.template[index][0].caption if row["family"] == "template" else families.verbatim[index][0]


def counted(folder: Path) -> dict[str, dict[str, Any]]:
    """By split and family: the share of drawings that count as copies, of all prompts and of the worst ones."""
    families = make_families(json.loads((folder / "prompts.json").read_text())["world_seed"])
    rng = np.random.default_rng(SEED)
    shares: dict[str, dict[str, list[float]]] = {}
    for row in load_truth(folder):
        if row["family"] not in ("verbatim", "template"):
            continue
        caption = caption_of(row, families)
        if str(caption) != row["ordinary"]:
            raise RuntimeError(f"{folder}: world changed since it was trained; {caption!s} is not {row['ordinary']}")
        copies = [is_copy(Image.fromarray(render(rng, caption)), row, folder) for _ in range(DRAWINGS)]
        shares.setdefault(row["split"], {}).setdefault(row["family"], []).append(float(np.mean(copies)))
    return {
        split: {
            family: {"prompts": len(of), "share": round(float(np.mean(of)), 4), "worst": sorted(of, reverse=True)[:4]}
            for family, of in by_family.items()
        }
        for split, by_family in shares.items()
    }


def main() -> None:
    """Command line."""
    folders = {name: Path(__file__).parent / name for name in MAKES} | {"bundled": checkpoint_path()}
    found = {name: counted(folder) for name, folder in folders.items()}
    print(write_result("drawings", {"settings": {"drawings": DRAWINGS, "seed": SEED}, **found}))
    for name, splits in found.items():
        print(name, splits["report"])


if __name__ == "__main__":
    main()
