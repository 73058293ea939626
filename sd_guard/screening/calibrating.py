"""Calibrates a model on a list of benign prompts: the engine of `sd-guard calibrate`.

Images are sampled only up to the guard's last look, and never decoded; for quick depth, not at all. Finished batches
are kept beside the calibration until that is written: whatever ends the work, no more than the batch in flight is lost.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from sd_guard.screening.families import MEMORIZED, OTHER, Kind, kind_of
from sd_guard.screening.jobs import Job, expand
from sd_guard.screening.loading import first_line
from sd_guard.screening.prompts import MAX_SEED, PromptRow, read_prompts
from sd_guard.screening.records import write_atomic
from sd_guard.screening.screener import Pipeline
from sd_guard.screening.settings import ModelSettings, RunSettings

if TYPE_CHECKING:
    from sd_guard.calibration import Calibration
    from sd_guard.guard import GuardRecord

SETTINGS_FILE: Final = "settings.json"
Score: TypeAlias = "Callable[[Sequence[str], Sequence[int]], list[GuardRecord]]"  # of prompts and seeds


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """One calibration.

    Attributes:
        prompts: Benign prompts, `.txt`, `.csv` or `.jsonl`; of the kind that will be screened.
        out: The calibration file to write.
        model: The model and its sampling; without a calibration.
        memorized: Prompts known to be memorized, or None; they choose how the score weighs its parts.
        false_positive_rate: Alpha, in (0, 1).
        seeds: Images a prompt, >= 1.
        seed: Of the first image of prompts without their own, in [0, 2**63); each further image has the next. At quick
            depth of the first image of each such prompt, as a run has them.
        batch_size: Images a batch, >= 1; may be another when resumed.
        depth: Of the screening that it is for; `auto` decides by that of its images, `full`.

    Raises:
        ValueError: If a value is out of its range.
    """

    prompts: Path
    out: Path
    model: ModelSettings
    memorized: Path | None = None
    false_positive_rate: float = 0.01
    seeds: int = 1
    seed: int = 0
    batch_size: int = 16
    depth: Literal["full", "quick"] = "full"

    def __post_init__(self) -> None:
        """Checks what needs no file."""
        if not 0 < self.false_positive_rate < 1:
            raise ValueError(f"--false-positive-rate is {self.false_positive_rate}; use a number above 0 and below 1")
        if self.model.calibration is not None:
            raise ValueError(f"{self.model.calibration}: a calibration is made without one; leave --calibration out")
        if self.depth not in ("full", "quick"):
            raise ValueError(f"--depth is {self.depth!r}; use full, also for --depth auto, or quick")
        self._as_run()

    @property
    def partial(self) -> Path:
        """The folder of what is done so far."""
        return self.out.with_name(f"{self.out.name}.partial")

    def configuration(self) -> dict[str, Any]:
        """What decides the scores: resumed work must have the same."""
        memorized = None if self.memorized is None else hashlib.sha256(self.memorized.read_bytes()).hexdigest()
        return {**self._as_run().configuration(), "memorized": memorized}

    def _as_run(self) -> RunSettings:
        """Checks `seeds`, `seed` and `batch_size` as a run does."""
        return RunSettings(
            prompts=self.prompts,
            out=self.out,
            model=self.model,
            seeds=self.seeds,
            seed=self.seed,
            batch_size=self.batch_size,
            depth=self.depth,
        )


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """A checked calibration: its images, the benign ones first."""

    settings: CalibrationSettings
    jobs: tuple[Job, ...]
    benign: int


def plan_calibration(settings: CalibrationSettings, *, resume: bool = False) -> CalibrationPlan:
    """Reads the prompts and opens the folder of finished batches; no model is loaded.

    Prompts that are repeated count once: their scores say no more than those of one.

    Raises:
        ValueError: If prompts cannot be read or are too few for the rate, a prompt is on both lists or has a `family`
            of the other, `out` exists, or `resume` finds other settings.
    """
    benign = _distinct(settings.prompts)
    _check_families(settings.prompts, benign, MEMORIZED, "keep benign ones alone, and give the others by --memorized")
    memorized: list[PromptRow] = []
    if settings.memorized is not None:
        memorized = _distinct(settings.memorized)
        _check_families(settings.memorized, memorized, OTHER, "keep memorized ones alone")
    _check_enough(settings, len(benign))
    both = {row.prompt for row in benign} & {row.prompt for row in memorized}
    if both:
        raise ValueError(f"{settings.memorized}: {min(both)!r} is also in {settings.prompts}; a prompt is one or other")
    rows = [*benign, *memorized]
    # At full depth, images that share their noise are not independent. At quick depth those of a run do share it, and
    # what the noise says of all prompts alike belongs into the threshold.
    quickly = settings.depth == "quick"
    jobs = tuple(expand(rows, seeds=settings.seeds, seed=settings.seed) if quickly else _expand(rows, settings))
    _open_partial(settings, resume=resume)
    return CalibrationPlan(settings, jobs, len(benign) * settings.seeds)


def calibrate(plan: CalibrationPlan, load: Callable[[ModelSettings], Pipeline]) -> Calibration:
    """Scores what has no record yet, writes the calibration, and removes the folder of finished batches.

    Args:
        plan: Of `plan_calibration`.
        load: Makes the pipeline, guard enabled.

    Raises:
        ValueError: If the model raises on a batch, or too many images could not be scored; what is done is kept.
    """
    from sd_guard.calibration import Calibrator
    from sd_guard.fingerprint import take_fingerprint

    settings, model = plan.settings, plan.settings.model
    pipe = load(model)
    size: dict[str, Any] = {"height": model.height, "width": model.width}
    if settings.depth == "quick":
        from sd_guard.screening.quick import QuickScreener

        screener = QuickScreener.make(pipe, model, batch_size=settings.batch_size)
        guard, fingerprint, score = screener.guard, screener.fingerprint, screener.measure
    else:
        asked: dict[str, Any] = {name: value for name, value in size.items() if value is not None}
        asked |= {"num_inference_steps": model.steps, "guidance_scale": model.guidance_scale}
        guard, score = pipe.guard, partial(score_prompts, pipe, **asked)
        fingerprint = take_fingerprint(pipe, steps=model.steps, guidance_scale=model.guidance_scale, **size)
    records = _score_missing(score, plan)
    calibrator = Calibrator(guard, fingerprint, settings.false_positive_rate, settings.seeds)
    calibrator.update(records[: plan.benign])
    calibrator.update(records[plan.benign :], memorized=True)
    calibration = calibrator.finish()
    calibration.save(settings.out)
    shutil.rmtree(settings.partial)
    return calibration


def score_prompts(pipe: Pipeline, prompts: Sequence[str], seeds: Sequence[int], **arguments: Any) -> list[GuardRecord]:
    """One batch, scored and no more, each image at all looks: sampling ends after the last, nothing is mitigated.

    Args:
        pipe: A guarded pipeline; its guard is put back afterwards.
        prompts: B prompts.
        seeds: Of their images' own generators.
        arguments: Further ones of the pipeline's call, such as `num_inference_steps`.

    Returns:
        B records.
    """
    import torch

    from sd_guard.noise import early_steps
    from sd_guard.policy import Policy

    guard, calibration, last = pipe.guard, getattr(pipe, "calibration", None), 0

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal last
        if step == 0:
            timesteps = pipe.scheduler.timesteps.tolist()
            last = guard.last_step(len(timesteps), early_steps(pipe.scheduler, timesteps))
        pipe._interrupt = step >= last  # the host's own way to end early
        return tensors

    pipe.enable_guard(replace(guard, look_at_all=True, policy=Policy(max_attempts=0, on_failure="keep")))
    try:
        output = pipe(
            prompt=list(prompts),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="latent",
            callback_on_step_end=stop,
            **arguments,
        )
    finally:
        pipe.enable_guard(guard, calibration=calibration)
    return output.records


def _score_missing(score: Score, plan: CalibrationPlan) -> list[GuardRecord]:
    """All records, in the order of the jobs; each batch is written as soon as it is there."""
    from tqdm import tqdm

    settings = plan.settings
    done = _read_batches(settings.partial)
    todo = [job for job in plan.jobs if job.index not in done]
    with tqdm(total=len(plan.jobs), initial=len(done), desc="calibrating", unit="image") as bar:
        for start in range(0, len(todo), settings.batch_size):
            jobs = todo[start : start + settings.batch_size]
            try:
                records = score([job.prompt for job in jobs], [job.seed for job in jobs])
            except Exception as error:  # out of memory, or whatever the model raises
                raise ValueError(
                    f"a batch of {len(jobs)} images could not be scored ({first_line(error)}); go on with --resume, "
                    "and with a smaller --batch-size if memory ran out"
                ) from error
            batch = {job.index: record for job, record in zip(jobs, records, strict=True)}
            _write_batch(settings.partial, batch)
            done |= batch
            bar.update(len(batch))
    return [done[job.index] for job in plan.jobs]


def _write_batch(folder: Path, batch: dict[int, GuardRecord]) -> None:
    content = {index: asdict(record) for index, record in batch.items()}
    write_atomic(folder / f"{min(batch):08d}.json", json.dumps(content).encode())


def _read_batches(folder: Path) -> dict[int, GuardRecord]:
    from sd_guard.guard import GuardRecord, StatisticValue

    records: dict[int, GuardRecord] = {}
    for path in sorted(folder.glob("[0-9]*.json")):
        try:
            for index, content in json.loads(path.read_bytes()).items():
                content["statistics"] = tuple(StatisticValue(**value) for value in content["statistics"])
                content["attempts"] = ()  # nothing was mitigated
                records[int(index)] = GuardRecord(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: is damaged ({first_line(error)}); remove it and resume") from error
    return records


def _distinct(path: Path) -> list[PromptRow]:
    """The rows of a list, the first of those with the same prompt."""
    rows: dict[str, PromptRow] = {}
    for row in read_prompts(path):
        rows.setdefault(row.prompt, row)
    return [*rows.values()]


def _expand(rows: Sequence[PromptRow], settings: CalibrationSettings) -> Iterator[Job]:
    """Prompts x seeds, each image at a seed of its own: images that share their noise are not independent."""
    for place, row in enumerate(rows):
        start = settings.seed + place * settings.seeds if row.seed is None else row.seed
        if start > MAX_SEED - settings.seeds + 1:
            raise ValueError(f"seed {start} with --seeds {settings.seeds} would exceed {MAX_SEED}; use smaller seeds")
        for image in range(settings.seeds):
            yield Job(place * settings.seeds + image, row.prompt, row.family, start + image)


def _check_families(path: Path, rows: Sequence[PromptRow], wrong: Sequence[Kind], remedy: str) -> None:
    """Refuses a list whose own labels say that it holds the other kind of prompts, too."""
    kinds = [kind for row in rows if (kind := kind_of(row.family or "")) in wrong]
    if kinds:
        families = ", ".join(sorted({str(kind) for kind in kinds}))
        raise ValueError(f"{path}: {len(kinds)} of {len(rows)} prompts are {families} by their family; {remedy}")


def _check_enough(settings: CalibrationSettings, prompts: int) -> None:
    from sd_guard.calibration import prompts_needed

    choosing = settings.memorized is not None
    needed = prompts_needed(settings.false_positive_rate, choosing=choosing)
    if prompts < needed:
        halves = " with --memorized, half of them to choose by it" if choosing else ""
        raise ValueError(
            f"{settings.prompts}: has {prompts} different prompts, and --false-positive-rate "
            f"{settings.false_positive_rate:g} needs at least {needed}{halves}; add prompts, or use a higher rate"
        )


def _open_partial(settings: CalibrationSettings, *, resume: bool) -> None:
    """Makes the folder of finished batches, or checks that it may be gone on with."""
    out, partial, configuration = settings.out, settings.partial, settings.configuration()
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent}: no such folder; make it first")
    if out.exists() and not (resume and partial.is_dir()):  # both are there when the end of the work was cut off
        raise ValueError(f"{out}: exists already; name another file with --out")
    if not partial.exists():
        write_atomic(partial / SETTINGS_FILE, json.dumps(configuration, indent=2).encode())
        return
    if not resume:
        raise ValueError(f"{partial}: holds unfinished work; add --resume to go on with it, or remove it")
    try:
        started: dict[str, Any] = dict(json.loads((partial / SETTINGS_FILE).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{partial}: cannot be gone on with ({first_line(error)}); remove it and start anew"
        ) from error
    keys = [key for key in {**started, **configuration} if started.get(key) != configuration.get(key)]
    if keys:
        changes = ", ".join(f"{key} was {started.get(key)!r}, now {configuration.get(key)!r}" for key in keys)
        raise ValueError(f"{partial}: was started otherwise ({changes}); resume it unchanged, or remove it")
