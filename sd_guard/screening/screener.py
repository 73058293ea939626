"""What a batch of jobs becomes: rows, and images where the depth makes any.

A screener says nothing of files, batches that fail, or processes: that is the engine's work (`runner.py`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from sd_guard.screening.decoding import Decode, decode_later
from sd_guard.screening.jobs import Job
from sd_guard.screening.loading import first_line
from sd_guard.screening.records import Row, record_row, write_atomic
from sd_guard.screening.settings import ModelSettings

if TYPE_CHECKING:
    from PIL.Image import Image

    from sd_guard.guard import GuardRecord

IMAGES_FOLDER: Final = "images"


class Output(Protocol):
    """What a pipeline returns: the latents of one image and, with the guard enabled, one record a prompt."""

    @property
    def images(self) -> Any:
        """(B, C, H, W) latents, in the order of the prompts."""
        ...

    @property
    def records(self) -> list[GuardRecord] | None:
        """As `images`."""
        ...


class Pipeline(Protocol):
    """What screening needs of a `GuardedStableDiffusionPipeline`."""

    @property
    def guard(self) -> Any:
        """The `Guard` in force; None with the guard off."""

    def enable_guard(
        self, guard: Any = None, *, calibration: Any = None, on_failure: Any = None, budget: int | None = None
    ) -> Any:
        """Turns the guard on."""

    def disable_guard(self) -> Any:
        """Turns the guard off."""

    def __call__(self, **arguments: Any) -> Any:
        """Generates images: an `Output`."""

    def encode_ahead(self, prompts: Sequence[str], *, guidance_scale: float = 7.5) -> None:
        """Begins to encode the prompts of a later call."""


@dataclass(frozen=True, slots=True)
class Screened:
    """One batch, screened.

    Attributes:
        rows: One a job, in their order; their image paths are keys of `images`.
        images: Still to be made and written: path of the PNG, relative to the run folder, to what makes the image.
            Making it may raise whatever the model raises.
    """

    rows: list[Row]
    images: Mapping[str, Callable[[], Image]] = field(default_factory=dict[str, Callable[[], "Image"]])


class Screener(Protocol):
    """Screens batches; a job's row depends on its prompt, its seed and how the screener was made, on no other job.

    One that has a method `expect` is told which jobs are likely to come next, before it screens those before them.
    """

    @property
    def threshold(self) -> float | None:
        """Scores above it are flagged; None if there is no such line."""
        ...

    def screen(self, jobs: Sequence[Job]) -> Screened:
        """One row a job, in their order; may raise whatever the model raises."""
        ...


@dataclass(frozen=True, slots=True)
class FullScreener:
    """Guarded generation: every job gets an image, unless it is blocked.

    Attributes:
        pipe: Guard enabled.
        model: The sampling.
        keep_before: Also make the unguarded image of every flagged one.
        decode: Makes images of latents.
    """

    pipe: Pipeline
    model: ModelSettings
    keep_before: bool = False
    decode: Decode = decode_later

    @property
    def threshold(self) -> float | None:
        """The detector's."""
        return getattr(self.pipe.guard.detector, "threshold", None)

    def expect(self, jobs: Sequence[Job]) -> None:
        """Begins with the texts of a batch that is likely to come next."""
        self.pipe.encode_ahead([job.prompt for job in jobs], guidance_scale=self.model.guidance_scale)

    def screen(self, jobs: Sequence[Job]) -> Screened:
        """One call of the pipeline, and with `keep_before` another for the flagged."""
        output: Output = generate(self.pipe, jobs, self.model)
        if output.records is None or not len(output.records) == len(output.images) == len(jobs):
            raise RuntimeError("the pipeline did not return one image and one record a prompt")
        flagged = [job for job, record in zip(jobs, output.records, strict=True) if record.verdict == "flag"]
        unguarded = self._unguarded(flagged) if self.keep_before and flagged else {}
        images: dict[str, Callable[[], Image]] = {}
        rows: list[Row] = []
        for job, record, latents in zip(jobs, output.records, output.images, strict=True):
            row = record_row(record, prompt=job.prompt, family=job.family, seed=job.seed, index=job.index)
            name = f"{IMAGES_FOLDER}/{job.index:06d}-{job.seed}"
            if row["outcome"] != "blocked":
                row["image"] = f"{name}.png"
                images[row["image"]] = self.decode(self.pipe, latents)
            if job.index in unguarded:
                row["image_before"] = f"{name}-before.png"
                images[row["image_before"]] = self.decode(self.pipe, unguarded[job.index])
            elif self.keep_before:  # the guard changed nothing
                row["image_before"] = row["image"]
            rows.append(row)
        return Screened(rows, images)

    def _unguarded(self, jobs: Sequence[Job]) -> dict[int, Any]:
        """The latents of these jobs with the guard disabled, by their index."""
        guard, calibration = self.pipe.guard, getattr(self.pipe, "calibration", None)
        self.pipe.disable_guard()
        try:
            output: Output = generate(self.pipe, jobs, self.model)
        finally:
            self.pipe.enable_guard(guard, calibration=calibration)
        return {job.index: latents for job, latents in zip(jobs, output.images, strict=True)}


@dataclass(frozen=True, slots=True)
class AutoScreener:
    """Quick for all; full for those that quick flags, could not score, or was in doubt about.

    A row of the full screener replaces the quick one, and counts the lanes of both.

    Attributes:
        quick: Makes no images; a row whose statistics hold probed ones was in doubt.
        full: Makes images.
        batch_size: Images at once in the full screener, >= 1.
    """

    quick: Screener
    full: Screener
    batch_size: int

    @property
    def threshold(self) -> float | None:
        """The full screener's, which has the last word."""
        return self.full.threshold

    def screen(self, jobs: Sequence[Job]) -> Screened:
        """Rows of either depth."""
        rows = self.quick.screen(jobs).rows
        again = [place for place, row in enumerate(rows) if _needs_more(row)]
        images: dict[str, Callable[[], Image]] = {}
        for start in range(0, len(again), self.batch_size):
            places = again[start : start + self.batch_size]
            screened = self.full.screen([jobs[place] for place in places])
            images |= screened.images
            for place, row in zip(places, screened.rows, strict=True):
                row["extra_lanes"] += rows[place]["extra_lanes"]
                rows[place] = row
        return Screened(rows, images)


def _needs_more(row: Row) -> bool:
    from sd_guard.observation import PROBED

    return row["flagged"] or row["outcome"] == "unscored" or any(seen["name"] in PROBED for seen in row["statistics"])


def generate(pipe: Pipeline, jobs: Sequence[Job], model: ModelSettings) -> Any:
    """One call of the pipeline, each image from its own CPU generator, to its latents: an `Output`."""
    import torch

    size = {name: pixels for name, pixels in (("height", model.height), ("width", model.width)) if pixels is not None}
    return pipe(
        prompt=[job.prompt for job in jobs],
        generator=[torch.Generator("cpu").manual_seed(job.seed) for job in jobs],
        num_inference_steps=model.steps,
        guidance_scale=model.guidance_scale,
        num_images_per_prompt=1,
        output_type="latent",
        **size,
    )


def generate_one(pipe: Pipeline, prompt: str, settings: ModelSettings, *, seed: int, out: Path) -> Row:
    """Makes one guarded image, and writes it to `out` unless it is blocked (then `image` of the row is None).

    Raises:
        ValueError: In one line, if the pipeline raises.
    """
    try:
        screened = FullScreener(pipe, settings).screen([Job(0, prompt, None, seed)])
        images = [image() for image in screened.images.values()]
    except Exception as error:  # whatever the model raises
        raise ValueError(f"the image could not be made ({first_line(error)})") from error
    (row,) = screened.rows
    if row["image"] is not None:
        write_atomic(out, png(images[0]))
        row["image"] = out.name
    return row


def png(image: Image) -> bytes:
    """The content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
