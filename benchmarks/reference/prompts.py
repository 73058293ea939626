"""Writes `prompts/reference.csv` (report rows) and `reference_tune.csv`: `python -m benchmarks.reference.prompts`."""

from __future__ import annotations

import csv
from pathlib import Path

from sd_guard.reference import load_truth

FOLDER = Path(__file__).parents[2] / "prompts"
FILES = {"report": "reference.csv", "tune": "reference_tune.csv"}


def main() -> None:
    """One file a split, the families interleaved as a stream of prompts would have them."""
    for split, name in FILES.items():
        rows = [row for row in load_truth() if row["split"] == split]
        with (FOLDER / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("prompt", "family"))
            writer.writerows((row["prompt"], row["family"]) for row in rows)


if __name__ == "__main__":
    main()
