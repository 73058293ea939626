"""Rows that say why: of each flagged image, the words that carry what its prompt adds, and where it is pinned.

An explanation costs about as much as the image itself: it is asked for (`--explain`), and of flagged images only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from sd_guard.screening.jobs import Job
from sd_guard.screening.screener import IMAGES_FOLDER, Pipeline, Screened, Screener
from sd_guard.screening.settings import ModelSettings

if TYPE_CHECKING:
    from PIL.Image import Image

    from sd_guard.pipelines.explanation import Explanation

_RED = (193, 39, 45)


@dataclass(frozen=True, slots=True)
class ExplainedScreener:
    """Another screener's rows, the flagged ones with `words` and `map`.

    Attributes:
        screener: Whose rows.
        pipe: Behind it.
        model: The sampling.
    """

    screener: Screener
    pipe: Pipeline
    model: ModelSettings

    @property
    def threshold(self) -> float | None:
        """The other's."""
        return self.screener.threshold

    def expect(self, jobs: Sequence[Job]) -> None:
        """As the other does."""
        if expect := getattr(self.screener, "expect", None):
            expect(jobs)

    def screen(self, jobs: Sequence[Job]) -> Screened:
        """The other's rows; an explanation that cannot be given leaves its row without."""
        from sd_guard.pipelines.explanation import look

        screened = self.screener.screen(jobs)
        images = dict(screened.images)
        for job, row in zip(jobs, screened.rows, strict=True):
            if not row["flagged"]:
                continue
            steps, guidance_scale = self.model.steps, self.model.guidance_scale
            try:
                found = look(self.pipe, job.prompt, steps=steps, guidance_scale=guidance_scale, seed=job.seed)
            except Exception:  # whatever the model raises: the row is worth more than its explanation
                continue
            row["words"] = [
                {"word": word, "weight": weight}
                for word, weight in zip(found.words.words, found.words.scores, strict=True)
            ]
            row["map"] = f"{IMAGES_FOLDER}/{job.index:06d}-{job.seed}-map.png"
            images[row["map"]] = partial(draw_map, found)
        return Screened(screened.rows, images)


def draw_map(found: Explanation) -> Image:
    """The predicted image in grey, red where the model leaves little open: the share of the most that it leaves."""
    from PIL import Image as images

    grey = np.asarray(found.image.mean(0), dtype=np.float64)[..., None] * np.full(3, 255.0)
    top = float(max(found.left_open.max(), found.left_open_without.max(), 1e-3))
    closed = 1 - np.clip(np.asarray(found.left_open, dtype=np.float32) / top, 0, 1)
    size = (grey.shape[1], grey.shape[0])
    alpha = 0.6 * np.asarray(images.fromarray(closed).resize(size, images.Resampling.BILINEAR))[..., None]
    return images.fromarray((grey * (1 - alpha) + np.array(_RED) * alpha).round().clip(0, 255).astype(np.uint8))
