"""How often a picture that no model made counts as a copy: `python -m benchmarks.reference.drawings`.

A caption that says most of its source is drawn alike by whoever obeys it. So the world draws each memorized caption
without its phrase, `DRAWINGS` times, and the share that `is_copy` calls copies is what a mitigation that keeps the
caption cannot be expected to go below. `tells_memory` is set so that it calls one in a hundred a copy; these are other
drawings than those it is set by. Needs no model: some minutes for all checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checkpoints import MAKES
from benchmarks.reference.measure import draw, is_copy, tells_memory
from benchmarks.results import write_result
from sd_guard.reference import checkpoint_path, load_truth

DRAWINGS, SEED = 200, 30_000


def counted(folder: Path) -> dict[str, dict[str, Any]]:
    """By split and family: the shares of drawings that count as copies, of all prompts and of the worst ones."""
    rng = np.random.default_rng(SEED)
    shares: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in load_truth(folder):
        if row["family"] in ("verbatim", "template"):
            drawings = list(draw(row, folder, rng, DRAWINGS))
            share = tuple(float(np.mean([rule(d, row, folder) for d in drawings])) for rule in (is_copy, tells_memory))
            shares.setdefault(row["split"], {}).setdefault(row["family"], []).append((share[0], share[1]))
    return {
        split: {
            family: {
                "prompts": len(of),
                "share": round(float(np.mean([near for near, _ in of])), 4),
                "worst": sorted((near for near, _ in of), reverse=True)[:4],
                "share_beyond_caption": round(float(np.mean([beyond for _, beyond in of])), 4),
            }
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
