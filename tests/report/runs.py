"""Run folders that no model has made."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from sd_guard.screening.records import Row, unscored_row, write_shard

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '" onload="alert(1)',
    "\u202ereversed \u05e9\u05dc\u05d5\u05dd",
    "nul \x00 bell \x07 escape \x1b[31m",
    "{{ 7 * 7 }}",
    "long " * 2000,
    "http://evil.example/x.png",
]


def row(index: int, **changes: Any) -> Row:
    """A passed image without pictures."""
    base = unscored_row(prompt=prompt_of(index), family="f", seed=0, index=index, reason="")
    known: dict[str, Any] = {"outcome": "passed", "score": index / 1000, "reason": None, "fingerprint": "x"}
    return {**base, **known, **changes}  # type: ignore[typeddict-item,return-value]


def prompt_of(index: int) -> str:
    """Prompts that are no near-duplicates of each other."""
    return f"{index * 7919 % 9973:04d} prompt {index * 6007 % 9967:04d}-{index}"


def flagged_row(index: int, **changes: Any) -> Row:
    """A rescued image with one attempt and a statistic at two steps."""
    values = [
        {"step": step, "name": "added_detail", "point": "noisy", "lane": "conditional", "value": index / 100 + step}
        for step in (1, 2)
    ]
    known = {"flagged": True, "outcome": "rescued", "extra_lanes": 30, "score": 1 + index / 1000}
    return row(index, **{**known, "statistics": values, "attempts": [attempt()], **changes})


def attempt(**changes: Any) -> dict[str, Any]:
    """A passed attempt."""
    return {
        "mitigation": "word_ablation",
        "strength": 1.0,
        "resumed_from_step": 2,
        "score": -0.5,
        "resemblance": 0.25,
        "passed": True,
        "prompt": "rewritten",
        "kept": True,
        **changes,
    }


def make_run(folder: Path, rows: list[Row], **changes: Any) -> Path:
    """Writes the rows, and a manifest with changes."""
    folder.mkdir(exist_ok=True)
    write_shard(folder, rows)
    manifest = {
        "prompts": "list.csv",
        "images": len(rows),
        "threshold": 0.5,
        "configuration": {"steps": 50, "guidance_scale": 7.5, "model": "<b>model</b>"},
        "versions": {"torch": "2"},
        "started": "2026-11-24T06:00:00+00:00",
        "finished": None,
        **changes,
    }
    (folder / "run.json").write_text(json.dumps(manifest))
    return folder


def save_image(run: Path, name: str, side: int = 16) -> str:
    """Writes a PNG into a run; returns its relative path."""
    (run / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (200, 30, 30)).save(run / "images" / name)
    return f"images/{name}"
