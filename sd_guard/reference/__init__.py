"""The bundled checkpoint of known truth: where it is, and what is true of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

_FOLDER = Path(__file__).parent / "checkpoint"


class PromptTruth(TypedDict):
    """One labelled prompt.

    Attributes:
        family: `verbatim`, `template`, `plain` or `novel`.
        prompt: the caption.
        ordinary: the caption without its rare phrase; empty for plain ones.
        source: index of the source image within its family.
        split: `tune` or `report`.
    """

    family: str
    prompt: str
    ordinary: str
    source: int
    split: str


def checkpoint_path() -> Path:
    """Folder of the checkpoint; `StableDiffusionPipeline.from_pretrained` loads it."""
    return _FOLDER


def calibration_path() -> Path:
    """Its calibration, made from `tune` rows: DDIM, 50 steps, guidance 7.5, float32."""
    return _FOLDER / "calibration.json"


def load_truth(checkpoint: Path = _FOLDER) -> list[PromptTruth]:
    """The labelled prompts of a reference checkpoint."""
    return json.loads((checkpoint / "prompts.json").read_text(encoding="utf-8"))["rows"]


def source_path(row: PromptTruth, checkpoint: Path = _FOLDER) -> Path:
    """PNG of the image that a verbatim or template prompt is a memory of."""
    return checkpoint / "sources" / f"{row['family']}_{row['source']:02d}.png"


def mask_path(row: PromptTruth, checkpoint: Path = _FOLDER) -> Path:
    """PNG that is white where the picture of a template prompt is fixed."""
    return checkpoint / "sources" / f"{row['family']}_{row['source']:02d}_mask.png"
