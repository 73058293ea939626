"""Measures statistics on the trajectories of labelled prompts, without images or mitigation.

One row a measurement, in Arrow:

| column | type | meaning |
|---|---|---|
| `index` | int32 | place of the prompt in its list, from 0 |
| `prompt` | string | as it was read |
| `family` | string, nullable | its label, as it was read |
| `seed` | int64, nullable | of the image's own generator; null where several seeds were compared |
| `statistic` | string | its name |
| `step` | int32 | index into the scheduler's timesteps |
| `value` | float64 | in the statistic's own unit; NaN if it could not be measured |
| `lanes` | float64 | lane evaluations an image beyond the sampler's own |
| `milliseconds` | float64 | of measuring, an image: of its batch, divided by the images in it |
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from sd_guard.evaluation.settings import DEFAULT_SHARES, GUARD, image_seed
from sd_guard.guard import Guard, step_at
from sd_guard.noise import early_steps
from sd_guard.pipelines.trajectory import denoiser_of, walk
from sd_guard.pipelines.watching import Watching
from sd_guard.screening.prompts import PromptRow
from sd_guard.statistics.base import SeedStatistic, Statistic

Table: TypeAlias = Any  # a pyarrow.Table: pyarrow declares no types
Row: TypeAlias = dict[str, Any]  # of SCHEMA
T = TypeVar("T")

SCHEMA: Final = pa.schema(
    [
        pa.field("index", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("family", pa.string()),
        pa.field("seed", pa.int64()),
        pa.field("statistic", pa.string(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("lanes", pa.float64(), nullable=False),
        pa.field("milliseconds", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Described:
    """What a table has to know of a statistic: its name and its direction."""

    name: str
    higher_is_memorized: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What was measured.

    Attributes:
        values: Of `SCHEMA`.
        statistics: Each statistic that was asked for.
        seeds: Images a prompt.
    """

    values: Table
    statistics: tuple[Described, ...]
    seeds: int


@dataclass(frozen=True, slots=True)
class _Image:
    """One trajectory: the place of its prompt, the prompt, its label, its seed."""

    index: int
    row: PromptRow
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How trajectories are sampled, and which statistics are taken at which step."""

    steps: int
    guidance_scale: float
    batch_size: int
    single: Mapping[int, Sequence[Statistic]]
    seeded: Mapping[int, Sequence[SeedStatistic]]
    guard: Guard | None
    watched: list[int]
    later_steps: list[int]

    @property
    def last(self) -> int:
        """The last step that anything is measured at."""
        return max([*self.single, *self.seeded, *self.watched, *self.later_steps])


def collect(
    pipe: Any,
    rows: Sequence[PromptRow],
    statistics: Sequence[Statistic],
    seed_statistics: Sequence[SeedStatistic] = (),
    *,
    seeds: int = 1,
    steps: int = 50,
    guidance_scale: float = 7.5,
    observe_at: Sequence[float] = DEFAULT_SHARES,
    batch_size: int = 16,
    guard: Guard | None = None,
    done: Collection[int] = (),
    sink: Callable[[Table], None] | None = None,
    progress: bool = True,
) -> Measurements:
    """Measures each statistic on `seeds` trajectories of each prompt.

    A statistic with places of its own (`at`) is taken there, and nowhere else; the others at `observe_at`. Sampling
    ends after the last step that anything is measured at. Seeds are those of `image_seed`, and probe vectors depend on
    nothing but the image's seed, so that neither depends on the batch.

    Args:
        pipe: A `StableDiffusionPipeline`.
        rows: The prompts.
        statistics: Measured on every image.
        seed_statistics: Measured on every prompt, over its seeds.
        seeds: Images a prompt.
        steps: Sampling steps.
        guidance_scale: At most 1 means none. What a statistic then costs does not hold the lane without a prompt, which
            the sampler has no use for; what the guard costs does.
        observe_at: Shares of the schedule in [0, 1]; 1 is the last step.
        batch_size: Images a batch at most.
        guard: Measured as one more statistic, `guard`: the score that it decides by.
        done: Places of prompts to leave out.
        sink: Given the rows of some prompts as soon as these are complete; what it was given need not be done again.
        progress: Whether to show a bar.

    Returns:
        Of all prompts but those `done`.

    Raises:
        ValueError: A setting is out of its range, two statistics share a name, or one returned no value for each image.
    """
    described = describe(statistics, seed_statistics, seeds=seeds, observe_at=observe_at, with_guard=guard is not None)
    plan = _plan(pipe, statistics, seed_statistics, steps, guidance_scale, observe_at, batch_size, guard)
    todo = [(index, row) for index, row in enumerate(rows) if index not in done]
    prompts_a_time = max(1, batch_size // seeds)
    total, behind = len(rows) * seeds, (len(rows) - len(todo)) * seeds
    tables: list[Table] = []
    with tqdm(total=total, initial=behind, desc="measuring", unit="image", disable=not progress) as bar:
        for start in range(0, len(todo), prompts_a_time):
            part = todo[start : start + prompts_a_time]
            images = [_Image(index, row, image_seed(row, index, j)) for index, row in part for j in range(seeds)]
            tables.append(pa.Table.from_pylist(list(_measure(pipe, images, plan, seeds)), schema=SCHEMA))
            if sink is not None:
                sink(tables[-1])
            bar.update(len(images))
    values = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    return Measurements(values=values, statistics=described, seeds=seeds)


def describe(
    statistics: Sequence[Statistic],
    seed_statistics: Sequence[SeedStatistic],
    *,
    seeds: int,
    observe_at: Sequence[float],
    with_guard: bool = False,
) -> tuple[Described, ...]:
    """Checks what is to be measured; no model is needed.

    Raises:
        ValueError: Nothing to measure, two of one name, a share out of range, or one seed where seeds are compared.
    """
    asked = [*statistics, *seed_statistics]
    names = [*([GUARD] if with_guard else []), *(statistic.name for statistic in asked)]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"statistics {', '.join(names) or 'none'}: give at least one, and each once")
    if not observe_at or not all(0 <= share <= 1 for share in observe_at):
        raise ValueError(f"observe_at={tuple(observe_at)} must hold shares of the schedule in [0, 1], at least one")
    if seeds < 1 or (seed_statistics and seeds < 2):
        raise ValueError(f"seeds={seeds} is too few; give 1, or 2 where seeds are compared, or more")
    own = (Described(GUARD, True),) if with_guard else ()
    return (*own, *(Described(each.name, each.higher_is_memorized) for each in asked))


def _plan(
    pipe: Any,
    statistics: Sequence[Statistic],
    seed_statistics: Sequence[SeedStatistic],
    steps: int,
    guidance_scale: float,
    observe_at: Sequence[float],
    batch_size: int,
    guard: Guard | None,
) -> _Plan:
    scheduler = deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    count = len(scheduler.timesteps)  # second-order schedulers have more of them than steps
    early = early_steps(scheduler, scheduler.timesteps.tolist())

    def by_step(asked: Sequence[T]) -> dict[int, list[T]]:
        found: defaultdict[int, list[T]] = defaultdict(list)
        for statistic in asked:
            shares = getattr(statistic, "at", None)
            for step in {step_at(share, count) for share in (observe_at if shares is None else shares)}:
                found[step].append(statistic)
        return found

    return _Plan(
        steps=steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        single=by_step(statistics),
        seeded=by_step(seed_statistics),
        guard=guard,
        watched=guard.steps(count, early) if guard is not None else [],
        later_steps=guard.later_steps(count, early) if guard is not None else [],
    )


def _measure(pipe: Any, images: Sequence[_Image], plan: _Plan, seeds: int) -> Iterator[Row]:
    """All rows of some prompts, of which `images` has all seeds, a prompt's side by side."""
    features: defaultdict[tuple[int, str], list[Tensor]] = defaultdict(list)
    spent: defaultdict[tuple[int, str], float] = defaultdict(float)
    for start in range(0, len(images), plan.batch_size):
        batch = images[start : start + plan.batch_size]
        own_seeds = [image.seed for image in batch]
        model = denoiser_of(pipe, [(seed + 0x9E3779B97F4A7C15) % 2**64 for seed in own_seeds])
        prompts = [image.row.prompt for image in batch]
        watching = Watching(plan.guard, model, plan.watched, plan.later_steps) if plan.guard is not None else None
        watched = 0.0
        for call in walk(pipe, prompts, own_seeds, steps=plan.steps, guidance_scale=plan.guidance_scale):
            if watching is not None:
                decided, elapsed = _timed(call.x.device, watching.watch, call)
                watched += elapsed
                for image, score, lanes in zip(batch, *(decided or ((), ())), strict=decided is not None):
                    yield _row(image, image.seed, GUARD, call.step, score, lanes, watched / len(batch))
            for statistic in plan.single.get(call.step, ()):
                values, elapsed = _timed(call.x.device, statistic.measure, call, model)
                if values.shape != (len(batch),):
                    raise ValueError(f"{statistic.name} gave {tuple(values.shape)} for {len(batch)} images; mend it")
                for image, value in zip(batch, values.tolist(), strict=True):
                    yield _row(
                        image, image.seed, statistic.name, call.step, value, statistic.lanes, elapsed / len(batch)
                    )
            for statistic in plan.seeded.get(call.step, ()):
                feature, elapsed = _timed(call.x.device, statistic.feature, call, model)
                features[call.step, statistic.name].append(feature)
                spent[call.step, statistic.name] += elapsed
            if call.step == plan.last:
                break
    for step, asked in plan.seeded.items():
        for statistic in asked:
            feature = torch.cat(features[step, statistic.name])
            cost = spent[step, statistic.name] / len(images)
            for start in range(0, len(images), seeds):
                value, elapsed = _timed(feature.device, statistic.compare, feature[start : start + seeds])
                yield _row(images[start], None, statistic.name, step, value, statistic.lanes, cost + elapsed / seeds)


def _row(image: _Image, seed: int | None, statistic: str, step: int, *measured: float) -> Row:
    values = (image.index, image.row.prompt, image.row.family, seed, statistic, step, *measured)
    return dict(zip(SCHEMA.names, values, strict=True))


def _timed(device: torch.device, work: Callable[..., T], *arguments: Any) -> tuple[T, float]:
    """What `work` returns, without gradients, and its milliseconds until the device was done."""

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.no_grad():
        settle()
        started = time.perf_counter()
        result = work(*arguments)
        settle()
    return result, (time.perf_counter() - started) * 1e3
