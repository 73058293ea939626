"""Screens a prompt list in one process; nothing that was done is lost, whatever ends the run."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from sd_guard.screening.loading import first_line, guard_settings
from sd_guard.screening.prompts import MAX_SEED, PromptRow, read_prompts
from sd_guard.screening.records import (
    RECORDS_FILE,
    SHARDS_FOLDER,
    Row,
    merge_shards,
    read_run,
    record_row,
    unscored_row,
    write_atomic,
    write_shard,
)
from sd_guard.screening.settings import (
    RUN_FILE,
    ModelSettings,
    RunSettings,
    finish_manifest,
    open_run,
    write_manifest,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from sd_guard.guard import GuardRecord

IMAGES_FOLDER: Final = "images"


class Output(Protocol):
    """What a pipeline returns: one image and, with the guard enabled, one record a prompt."""

    @property
    def images(self) -> list[Image]:
        """In the order of the prompts."""
        ...

    @property
    def records(self) -> list[GuardRecord] | None:
        """As `images`."""
        ...


class Pipeline(Protocol):
    """What the runner needs of a `GuardedStableDiffusionPipeline`."""

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


@dataclass(frozen=True, slots=True)
class Job:
    """One image to make: its place in the run, prompt, family and seed."""

    index: int
    prompt: str
    family: str | None
    seed: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked run: every job, and what makes the run this one and no other."""

    settings: RunSettings
    jobs: tuple[Job, ...]
    configuration: dict[str, Any]


def expand(rows: Sequence[PromptRow], *, seeds: int, seed: int) -> tuple[Job, ...]:
    """Prompts x seeds, a prompt's images side by side, at seeds s, s + 1, ... from its own seed or the base seed.

    Raises:
        ValueError: If a seed would leave [0, 2**63).
    """
    starts = [(row, seed if row.seed is None else row.seed) for row in rows]
    if any(start > MAX_SEED - seeds + 1 for _, start in starts):
        raise ValueError(f"a seed with --seeds {seeds} would exceed {MAX_SEED}; use smaller seeds")
    jobs = [(row, start + i) for row, start in starts for i in range(seeds)]
    return tuple(Job(index, row.prompt, row.family, seed) for index, (row, seed) in enumerate(jobs))


def plan_run(settings: RunSettings, *, resume: bool = False) -> Plan:
    """Reads the prompts and opens the run folder; no model is loaded.

    Raises:
        ValueError: If the prompts cannot be read, or the folder is in use, or `resume` finds another configuration.
    """
    jobs = expand(read_prompts(settings.prompts), seeds=settings.seeds, seed=settings.seed)
    configuration = settings.configuration()
    open_run(settings, configuration, resume=resume)
    return Plan(settings=settings, jobs=jobs, configuration=configuration)


def screen(plan: Plan, load: Callable[[ModelSettings], Pipeline]) -> list[Row]:
    """Screens what the run folder has no row for yet, then merges the shards into `records.parquet`.

    Args:
        plan: Of `plan_run`.
        load: Makes the pipeline, guard enabled; not called if nothing is left to do.

    Returns:
        All rows of the run, in order.

    Raises:
        ValueError: If the first batch of a new run raises for every row, as it does with a scheduler or a calibration
            that does not fit; the folder is left free for another try.
    """
    from tqdm import tqdm

    settings, out = plan.settings, plan.settings.out
    started = (out / RECORDS_FILE).exists() or any((out / SHARDS_FOLDER).glob("*.parquet"))
    rows = {row["index"]: row for row in (read_run(out) if started else [])}
    todo = [job for job in plan.jobs if job.index not in rows]
    if todo:
        pipe = load(settings.model)
        threshold: float | None = getattr(pipe.guard.detector, "threshold", None)
        write_manifest(settings, plan.configuration, images=len(plan.jobs), threshold=threshold)
        flagged = sum(row["flagged"] for row in rows.values())
        with tqdm(total=len(plan.jobs), initial=len(rows), desc="screening", unit="image") as bar:
            bar.set_postfix(flagged=flagged)
            for batch in _batches(todo, settings.batch_size):
                done = _screen_batch(pipe, batch, settings)
                if not rows and len(done) > 1 and all(_nothing_made(row) for row in done):
                    (out / RUN_FILE).unlink()
                    raise ValueError(f"no image of the first batch could be made ({done[0]['reason']})")
                write_shard(out, done)
                rows |= {row["index"]: row for row in done}
                flagged += sum(row["flagged"] for row in done)
                bar.update(len(done))
                bar.set_postfix(flagged=flagged)
    merge_shards(out)
    finish_manifest(out)
    return [rows[index] for index in sorted(rows)]


def generate_one(pipe: Pipeline, prompt: str, settings: ModelSettings, *, seed: int, out: Path) -> Row:
    """Makes one guarded image, and writes it to `out` unless it is blocked (then `image` of the row is None).

    Raises:
        ValueError: In one line, if the pipeline raises.
    """
    try:
        output: Output = _generate(pipe, [Job(0, prompt, None, seed)], settings)
    except Exception as error:  # whatever the model raises
        raise ValueError(f"the image could not be made ({first_line(error)})") from error
    if not output.records:
        raise ValueError("the pipeline returned no record")
    row = record_row(output.records[0], prompt=prompt, family=None, seed=seed, index=0)
    if row["outcome"] != "blocked":
        write_atomic(out, _png(output.images[0]))
        row["image"] = out.name
    return row


def _nothing_made(row: Row) -> bool:
    """True for a row whose generation raised."""
    return row["outcome"] == "unscored" and row["fingerprint"] is None


def _batches(jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    return (jobs[start : start + size] for start in range(0, len(jobs), size))


def _screen_batch(pipe: Pipeline, jobs: Sequence[Job], settings: RunSettings) -> list[Row]:
    """One batch; if the pipeline raises, its jobs one by one, and the one that raises becomes `unscored`."""
    try:
        made = _make(pipe, jobs, settings)
    except Exception as error:  # out of memory, or whatever the model raises: the other rows must not be lost
        reason = first_line(error)
    else:
        return [_save(settings.out, job, *images_and_record) for job, images_and_record in zip(jobs, made, strict=True)]
    _free_memory()
    if len(jobs) > 1:
        return [row for job in jobs for row in _screen_batch(pipe, [job], settings)]
    (job,) = jobs
    return [unscored_row(prompt=job.prompt, family=job.family, seed=job.seed, index=job.index, reason=reason)]


def _make(pipe: Pipeline, jobs: Sequence[Job], settings: RunSettings) -> list[tuple[GuardRecord, Image, Image | None]]:
    """Record, final image, and with `keep_before` the unguarded image: the same object if the guard changed nothing."""
    output: Output = _generate(pipe, jobs, settings.model)
    if output.records is None or not len(output.records) == len(output.images) == len(jobs):
        raise RuntimeError("the pipeline did not return one image and one record a prompt")
    before: list[Image | None] = [*output.images] if settings.keep_before else [None] * len(jobs)
    flagged = [place for place, record in enumerate(output.records) if record.verdict == "flag"]
    if settings.keep_before and flagged:
        for place, image in zip(flagged, _unguarded(pipe, [jobs[place] for place in flagged], settings), strict=True):
            before[place] = image
    return list(zip(output.records, output.images, before, strict=True))


def _generate(pipe: Pipeline, jobs: Sequence[Job], model: ModelSettings) -> Any:
    import torch

    size = {name: pixels for name, pixels in (("height", model.height), ("width", model.width)) if pixels is not None}
    return pipe(
        prompt=[job.prompt for job in jobs],
        generator=[torch.Generator("cpu").manual_seed(job.seed) for job in jobs],
        num_inference_steps=model.steps,
        guidance_scale=model.guidance_scale,
        num_images_per_prompt=1,
        output_type="pil",
        **size,
    )


def _save(out: Path, job: Job, record: GuardRecord, image: Image, before: Image | None) -> Row:
    """Writes the images first, so that a row never names a file that is not there."""
    row = record_row(record, prompt=job.prompt, family=job.family, seed=job.seed, index=job.index)
    name = f"{job.index:06d}-{job.seed}"
    if row["outcome"] != "blocked":
        row["image"] = _save_png(out, f"{name}.png", image)
    if before is image:
        row["image_before"] = row["image"]
    elif before is not None:
        row["image_before"] = _save_png(out, f"{name}-before.png", before)
    return row


def _unguarded(pipe: Pipeline, jobs: Sequence[Job], settings: RunSettings) -> list[Image]:
    """The same images with the guard disabled."""
    guard = pipe.guard
    pipe.disable_guard()
    try:
        return _generate(pipe, jobs, settings.model).images
    finally:
        pipe.enable_guard(guard, **guard_settings(settings.model))


def _save_png(out: Path, name: str, image: Image) -> str:
    relative = f"{IMAGES_FOLDER}/{name}"
    write_atomic(out / relative, _png(image))
    return relative


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _free_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
