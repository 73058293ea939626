"""The engine of `sd-guard evaluate`: nothing that was measured is lost, whatever ends it.

In the folder: `run.json` (settings), `shards/` while it runs, then `measurements.parquet` (one row a measurement),
`table.csv` and `table.parquet` (one row a statistic, step, question and number of images), `table.md` (each
statistic's best step) and `auroc.png`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from sd_guard.evaluation.settings import GUARD, EvaluationSettings, check_labels, image_seed
from sd_guard.screening.loading import first_line, load_pipeline
from sd_guard.screening.prompts import PromptRow, read_prompts
from sd_guard.screening.records import SHARDS_FOLDER, write_atomic
from sd_guard.screening.settings import RUN_FILE, ModelSettings, finish_manifest, open_run, write_manifest

if TYPE_CHECKING:
    from sd_guard.evaluation.collect import Table
    from sd_guard.statistics.base import SeedStatistic, Statistic

MEASUREMENTS_FILE: Final = "measurements.parquet"
MAX_LANES_UNASKED: Final = 100  # as many as an image of 50 guided steps


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """A checked evaluation: its prompts, what is measured, and what makes it this one and no other."""

    settings: EvaluationSettings
    rows: tuple[PromptRow, ...]
    statistics: tuple[Statistic, ...]
    seed_statistics: tuple[SeedStatistic, ...]
    with_guard: bool
    configuration: dict[str, Any]


def plan_evaluation(settings: EvaluationSettings) -> EvaluationPlan:
    """Reads the prompts, finds the statistics and opens the folder; no model is loaded.

    Raises:
        ValueError: In one line, if labels are missing, not known or one-sided, a statistic is not known or needs more
            seeds, a seed is too large, or the folder is in use or was started with other settings.
    """
    rows = read_prompts(settings.prompts)
    check_labels(settings.prompts, rows)
    with_guard, statistics, seed_statistics = _statistics(settings)
    for index, row in enumerate(rows):
        image_seed(row, index, settings.seeds - 1)
    own = [GUARD] if with_guard else []
    configuration = settings.configuration([*own, *(each.name for each in (*statistics, *seed_statistics))])
    open_run(settings.run, configuration, resume=settings.resume)
    return EvaluationPlan(settings, tuple(rows), statistics, seed_statistics, with_guard, configuration)


def evaluate(
    settings: EvaluationSettings | EvaluationPlan, load: Callable[[ModelSettings], Any] = load_pipeline
) -> Path:
    """Measures what the folder has no measurements of yet, then writes the tables and the figure.

    Args:
        settings: Or the plan of `plan_evaluation`.
        load: Makes the pipeline; not called if nothing is left to measure.

    Returns:
        The folder.

    Raises:
        ValueError: As `plan_evaluation`, or in one line what the model raised; what was measured is kept.
    """
    from sd_guard.evaluation.collect import Measurements, collect, describe

    plan = settings if isinstance(settings, EvaluationPlan) else plan_evaluation(settings)
    asked, out = plan.settings, plan.settings.out
    values = read_measurements(out)
    done = set(values["index"].to_pylist())
    if len(done) < len(plan.rows):
        pipe = load(asked.model)
        write_manifest(asked.run, plan.configuration, images=len(plan.rows) * asked.seeds, threshold=None)
        try:
            collect(
                pipe,
                plan.rows,
                plan.statistics,
                plan.seed_statistics,
                seeds=asked.seeds,
                steps=asked.model.steps,
                guidance_scale=asked.model.guidance_scale,
                observe_at=asked.observe_at,
                batch_size=asked.batch_size,
                guard=pipe.guard if plan.with_guard else None,
                done=done,
                sink=lambda table: _write_shard(out, table),
            )
        except Exception as error:  # out of memory, or whatever a model raises
            raise ValueError(f"measuring ended ({first_line(error)}); {_what_is_left(out)}") from error
        values = read_measurements(out)
    _write_parquet(out / MEASUREMENTS_FILE, values)
    _remove_shards(out)
    described = describe(
        plan.statistics,
        plan.seed_statistics,
        seeds=asked.seeds,
        observe_at=asked.observe_at,
        with_guard=plan.with_guard,
    )
    write_results(out, Measurements(values=values, statistics=described, seeds=asked.seeds))
    finish_manifest(out)
    return out


def write_results(out: Path, measurements: Any) -> None:
    """Writes the table as CSV, Parquet and Markdown, and the figure, of `Measurements`."""
    from sd_guard.evaluation.figure import draw
    from sd_guard.evaluation.table import markdown, tabulate

    table = tabulate(measurements)
    sink = pa.BufferOutputStream()
    pacsv.write_csv(table, sink)
    write_atomic(out / "table.csv", sink.getvalue().to_pybytes())
    _write_parquet(out / "table.parquet", table)
    write_atomic(out / "table.md", markdown(table).encode())
    draw(table, out / "auroc.png")


def read_measurements(out: Path) -> Table:
    """All measurements of a folder, finished or not; a prompt's all together or not at all.

    Raises:
        ValueError: A file of it is damaged.
    """
    from sd_guard.evaluation.collect import SCHEMA

    whole = out / MEASUREMENTS_FILE
    tables = [SCHEMA.empty_table()]
    for path in [whole] if whole.exists() else sorted((out / SHARDS_FOLDER).glob("*.parquet")):
        try:
            tables.append(pq.ParquetFile(path).read().cast(SCHEMA))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(f"{path}: cannot be read ({first_line(error)}); remove it and add --resume") from None
    return pa.concat_tables(tables)


def _statistics(settings: EvaluationSettings) -> tuple[bool, tuple[Statistic, ...], tuple[SeedStatistic, ...]]:
    """Those that are asked for, and whether the guard is among them.

    Without names, all that so many seeds allow, but those that cost more than an image itself.
    """
    from sd_guard.statistics import SEED_STATISTICS, STATISTICS

    names = settings.statistics
    if names is None:
        cheap = (name for name, kind in STATISTICS.items() if kind().lanes <= MAX_LANES_UNASKED)
        names = (GUARD, *cheap, *(SEED_STATISTICS if settings.seeds > 1 else ()))
    _check_names(names, (GUARD, *STATISTICS), SEED_STATISTICS, settings.seeds)
    return (
        GUARD in names,
        tuple(kind() for name, kind in STATISTICS.items() if name in names),
        tuple(kind() for name, kind in SEED_STATISTICS.items() if name in names),
    )


def _check_names(names: Sequence[str], single: Collection[str], seeded: Collection[str], seeds: int) -> None:
    unknown = [name for name in names if name not in single and name not in seeded]
    if unknown or not names or len(set(names)) < len(names):
        wrong = f"{unknown[0]!r} is no statistic" if unknown else "--statistics needs names, each once"
        raise ValueError(f"{wrong}; there are {', '.join([*single, *seeded])}")
    comparing = [name for name in names if name in seeded]
    if comparing and seeds < 2:
        raise ValueError(f"{comparing[0]} compares the seeds of a prompt, and --seeds is {seeds}; use 2 or more")


def _what_is_left(out: Path) -> str:
    """After an error: how to go on. A folder without measurements is left free for another try."""
    if (out / SHARDS_FOLDER).exists():
        return f"{out} keeps what was measured: add --resume to go on"
    (out / RUN_FILE).unlink()
    return "nothing was measured"


def _write_shard(out: Path, table: Table) -> None:
    _write_parquet(out / SHARDS_FOLDER / f"{table['index'][0].as_py():08d}.parquet", table)


def _write_parquet(path: Path, table: Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(path, sink.getvalue().to_pybytes())


def _remove_shards(out: Path) -> None:
    shards = out / SHARDS_FOLDER
    if shards.exists():
        for shard in shards.iterdir():
            shard.unlink()
        shards.rmdir()
