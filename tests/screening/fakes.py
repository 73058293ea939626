"""Screeners and pipelines that only pretend."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from benchmarks.null_runs import NullScreener
from sd_guard.screening.jobs import Job
from sd_guard.screening.screener import FullScreener, Screened, Screener
from sd_guard.screening.settings import RunSettings


class Pretender:
    """A pipeline: flags "memorized", blocks "hopeless", raises on "broken", is interrupted after `kill_at` images."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.guarded = True
        self.calls: list[tuple[str, int, bool]] = []
        self.expected: list[list[str]] = []
        self.kill_at = kill_at

    @property
    def guard(self) -> Any:
        return SimpleNamespace(detector=SimpleNamespace(threshold=0.5), mine=True) if self.guarded else None

    def enable_guard(self, guard: Any = None, *, calibration: Any = None) -> None:
        assert guard.mine
        assert calibration is None
        self.guarded = True

    def disable_guard(self) -> None:
        self.guarded = False

    def encode_ahead(self, prompts: list[str], *, guidance_scale: float) -> None:
        self.expected.append(prompts)

    def __call__(self, *, prompt: list[str], generator: list[Any], **arguments: Any) -> Any:
        seeds = [each.initial_seed() for each in generator]
        self.calls += [(text, seed, self.guarded) for text, seed in zip(prompt, seeds, strict=True)]
        if self.kill_at is not None and len(self.calls) > self.kill_at:
            raise KeyboardInterrupt
        if any("broken" in text for text in prompt):
            raise RuntimeError("CUDA out of memory\nsecond line")
        images = [
            Image.new("RGB", (8, 8), (seed % 256, 200 if self.guarded and "memorized" in text else 0, 0))
            for text, seed in zip(prompt, seeds, strict=True)
        ]
        records = [self.record(text) for text in prompt] if self.guarded else None
        return SimpleNamespace(images=images, records=records)

    @staticmethod
    def record(text: str) -> Any:
        flagged, hopeless = "memorized" in text, "hopeless" in text
        return SimpleNamespace(
            verdict="flag" if flagged else "pass",
            outcome="blocked" if hopeless else "rescued" if flagged else "passed",
            score=0.9 if flagged else 0.1,
            decided_at_step=3,
            statistics=(),
            attempts=(),
            extra_lanes=10 if flagged else 2,
            fingerprint="f",
            reason="no attempt passed" if hopeless else None,
        )

    def screener(self, settings: RunSettings) -> Screener:
        return FullScreener(self, settings.model, settings.keep_before, lambda _, image: lambda: image)


@dataclass(frozen=True)
class Eventful(NullScreener):
    """Notes every batch that it is given; at the one that holds `place` sends a signal, once, to `target` or itself."""

    folder: Path = Path()
    place: int = -1
    sent: int | None = None
    target: int | None = None

    def screen(self, jobs: Sequence[Job]) -> Screened:
        with (self.folder / "screened").open("a") as file:
            file.write(f"{jobs[0].index} {len(jobs)}\n")
        if self.place in {job.index for job in jobs} and self.sent is not None:
            try:
                (self.folder / "done").touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(self.target or os.getpid(), self.sent)
        return super().screen(jobs)
