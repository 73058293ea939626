"""Screens a prompt list: read, batch, screen, write, merge. Nothing that was done is lost, whatever ends the run.

`jobs.parquet` has every image of the run, in order. Batches are cut from it at multiples of the batch size, whoever
screens them and whatever was done before, and each becomes one shard, written while the next one is screened (and, but
on a CPU, its images decoded); of a process that is alone, the prompts of the next one are encoded meanwhile. So on
machines of one kind rows are bit for bit the same with any engine and number of workers, and after any interruption.
With another batch size, and in a batch that had to be halved, they differ by the rounding of the model's dtype; at
quick depth not even by that. A kill costs the batch in flight, and the one before where that was being written.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, TypeAlias

from sd_guard.screening.jobs import DUPLICATES_FILE, JOBS_FILE, Job, JobList, distinct, expand, write_jobs
from sd_guard.screening.loading import first_line
from sd_guard.screening.processes import Alone, Processes, share_out, wait_until
from sd_guard.screening.progress import Progress
from sd_guard.screening.prompts import BadRowError, find_files, stream_prompts
from sd_guard.screening.records import (
    RECORDS_FILE,
    Row,
    Shard,
    find_shards,
    merge_shards,
    unscored_row,
    write_shard,
)
from sd_guard.screening.screener import IMAGES_FOLDER, Screened, Screener, png
from sd_guard.screening.settings import (
    RUN_FILE,
    SKIPPED_FILE,
    RunSettings,
    check_run,
    finish_manifest,
    write_manifest,
)
from sd_guard.screening.storage import Lock, Store
from sd_guard.screening.summary import Summary, summarize

MakeScreener: TypeAlias = Callable[[RunSettings], Screener]


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked run: its folder, how many images it has, and what makes it this one and no other.

    A context manager that gives the folder up at its end.
    """

    settings: RunSettings
    store: Store
    total: int
    configuration: dict[str, Any]
    lock: Lock | None = None

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        if self.lock is not None:
            self.lock.close()

    def progress(self, shards: Sequence[Shard], processes: Processes, metrics_file: Path | None) -> Progress:
        """Counts on from the shards that are there."""
        limit = self.settings.max_unscored
        return Progress(self.total, shards, processes=processes, max_unscored=limit, metrics_file=metrics_file)


def plan_run(settings: RunSettings, *, resume: bool = False) -> Plan:
    """Reads the prompts and writes the list of jobs into the run folder; no model is loaded.

    Nothing is written unless all of the list can be used. A run that is resumed keeps its list of jobs.

    Raises:
        ValueError: If the prompts cannot be read, or the folder is in use, or `resume` finds another configuration.
    """
    store, configuration = Store.at(settings.out), settings.configuration()
    check_run(store, configuration, resume=resume)  # before anything is made in it
    with ExitStack() as stack:
        files = {} if store.exists(RUN_FILE) else _list_jobs(settings, stack)
        lock = store.lock()
        check_run(store, configuration, resume=resume)  # now that nobody else changes it
        for name, content in files.items():
            store.remove(name)  # of a run that ended before it began
            if content.tell():
                content.seek(0)
                with store.create(name) as sink:
                    shutil.copyfileobj(content, sink)
    return Plan(settings, store, _count_jobs(store), configuration, lock)


def join_run(settings: RunSettings) -> Plan:
    """The plan of a run that rank 0 has planned."""
    store = Store.at(settings.out)
    return Plan(settings, store, _count_jobs(store), {})


def screen(
    plan: Plan,
    make: MakeScreener,
    *,
    processes: Processes | None = None,
    metrics_file: Path | None = None,
) -> Summary | None:
    """Screens what the run folder has no row for yet; rank 0 then merges the shards into `records.parquet`.

    Args:
        plan: Of `plan_run`, or of `join_run` where this is not rank 0.
        make: Makes the screener; not called if nothing is left to do.
        processes: That share the work; None for this one alone.
        metrics_file: Where progress is kept for Prometheus, if anywhere.

    Returns:
        What the run came to; None but in rank 0.

    Raises:
        KeyboardInterrupt: The run was interrupted; what was done is written.
        ValueError: If the first batch of a new run raises for every row, as it does with a scheduler or a calibration
            that does not fit (the folder is left free for another try); if too many images cannot be scored; or if
            there is no room to write.
    """
    processes = processes or Alone()
    with plan:
        shards = find_shards(plan.store)
        if not is_complete(plan, shards):
            screener = make(plan.settings)
            if processes.rank == 0:
                start_run(plan, screener.threshold)
            processes.add("ready", 1)
            wait_until(processes, "ready", processes.size)  # all have listed the same shards, and run.json is there
            batches = share_out(missing_batches(plan.total, shards, plan.settings.batch_size), processes)
            with (
                plan.store.open(JOBS_FILE) as file,
                room_to_write(plan.store),
                finish_when_interrupted() as interrupted,
                plan.progress(shards, processes, metrics_file) as progress,
            ):
                wanted = takewhile(lambda batch: not interrupted(), batches)
                jobs, alone = JobList(file), processes.size == 1
                for shard, reason in screen_batches(plan.store, jobs, screener, wanted, new=not shards, in_turn=alone):
                    progress.add(shard, reason)
                if interrupted():
                    raise KeyboardInterrupt
                processes.add("finished", 1)
                if processes.rank == 0:
                    wait_until(processes, "finished", processes.size)
        return finish_run(plan) if processes.rank == 0 else None


def is_complete(plan: Plan, shards: Sequence[Shard]) -> bool:
    """True if every image has its row."""
    return plan.store.exists(RECORDS_FILE) or next(missing_batches(plan.total, shards, 1), None) is None


def missing_batches(total: int, shards: Sequence[Shard], size: int) -> Iterator[range]:
    """What no shard holds of so many images, cut at multiples of the batch size."""
    place = 0
    for done in (*(shard.rows for shard in shards), range(total, total)):
        while place < done.start:
            stop = min((place // size + 1) * size, done.start)
            yield range(place, stop)
            place = stop
        place = max(place, done.stop)


def start_run(plan: Plan, threshold: float | None) -> None:
    """Writes `run.json`, unless the run is being resumed."""
    write_manifest(plan.settings, plan.configuration, images=plan.total, threshold=threshold)


def finish_run(plan: Plan) -> Summary:
    """Merges the shards, sums the run up, and notes that it is finished."""
    with room_to_write(plan.store):
        merge_shards(plan.store, plan.total)
        summary = summarize(plan.store)
        finish_manifest(plan.store, fingerprint=summary.fingerprint)
        for folder in ("", IMAGES_FOLDER):
            plan.store.sweep(folder)
    return summary


def screen_batches(
    store: Store, jobs: JobList, screener: Screener, batches: Iterable[range], *, new: bool, in_turn: bool = False
) -> Iterator[tuple[Shard, str | None]]:
    """Screens one batch while the one before is written; yields what was written, as of `write_batch`.

    Args:
        store: The run folder.
        jobs: Of the run.
        screener: Screens them.
        batches: Places of jobs.
        new: Nothing of this run was ever written.
        in_turn: Batches mostly follow one another, so that the screener may begin with the texts of the next.

    Raises:
        ValueError: If the screener raises for every row of the first batch of a new run, which is then no run.
    """
    with ThreadPoolExecutor(1) as thread:
        writing: Future[tuple[Shard, str | None]] | None = None
        for batch in batches:
            following = range(batch.stop, min(batch.stop + len(batch), len(jobs)))
            if in_turn and following and (expect := getattr(screener, "expect", None)):
                with suppress(Exception):  # what is wrong is said when they are screened
                    expect(jobs.read(following))
            screened = screen_batch(screener, jobs.read(batch))
            if new and len(batch) > 1 and _nothing_made(screened.rows) and not find_shards(store):
                store.remove(RUN_FILE)
                raise ValueError(f"no image of the first batch could be made ({screened.rows[0]['reason']})")
            new = False
            if writing is not None:
                yield writing.result()
            writing = thread.submit(write_batch, store, screened)
        if writing is not None:
            yield writing.result()


def screen_batch(screener: Screener, jobs: Sequence[Job]) -> Screened:
    """One batch; where the screener raises, its halves, down to the job that raises, which becomes `unscored`."""
    try:
        screened = screener.screen(jobs)
        if len(screened.rows) != len(jobs):
            raise RuntimeError(f"{len(screened.rows)} rows came back for {len(jobs)} jobs")
        return screened
    except Exception as error:  # out of memory, or whatever the model raises: the other rows must not be lost
        reason = first_line(error)
    _free_memory()
    if len(jobs) > 1:
        halves = [screen_batch(screener, part) for part in (jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :])]
        return Screened([*halves[0].rows, *halves[1].rows], {**halves[0].images, **halves[1].images})
    (job,) = jobs
    return Screened([unscored_row(prompt=job.prompt, family=job.family, seed=job.seed, index=job.index, reason=reason)])


def write_batch(store: Store, screened: Screened) -> tuple[Shard, str | None]:
    """Makes and writes a batch's images, and then its rows, so that none names a file that is not there.

    Returns:
        The shard, and why one of its rows is unscored, if one is.
    """
    failed: dict[str, str] = {}
    for name, make in screened.images.items():
        try:
            content = png(make())
        except Exception as error:  # whatever the model raises
            failed[name] = first_line(error)
        else:
            store.write(name, content)
    rows = [_without_images(row, failed) for row in screened.rows]
    reason = next((row["reason"] for row in rows if row["outcome"] == "unscored"), None)
    return write_shard(store, rows), reason


def _without_images(row: Row, failed: Mapping[str, str]) -> Row:
    """The row without the images that could not be made; without its own, it is `unscored`."""
    if (reason := failed.get(row["image"] or "")) is not None:
        return unscored_row(
            prompt=row["prompt"], family=row["family"], seed=row["seed"], index=row["index"], reason=reason
        )
    before, where = (None if row[key] in failed else row[key] for key in ("image_before", "map"))
    return {**row, "image_before": before, "map": where}


@contextmanager
def room_to_write(store: Store) -> Generator[None, None, None]:
    """Turns a failure to write into one line that says how to go on."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise ValueError(f"{store.address}: cannot be written ({reason}); make room, and go on with --resume") from None


@contextmanager
def finish_when_interrupted() -> Generator[Callable[[], bool], None, None]:
    """While entered, an interrupt (or a request to end) is only noted; a second one takes effect at once."""
    signals: list[int] = []

    def note(number: int, frame: object) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _list_jobs(settings: RunSettings, stack: ExitStack) -> dict[str, IO[bytes]]:
    """Reads the whole list into temporary files, named as in the run's folder: a bad row leaves no trace there."""
    options = {"seeds": settings.seeds, "seed": settings.seed}
    jobs, duplicates, skipped = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))  # noqa: SIM115 - the stack closes them

    def skip(row: BadRowError) -> None:
        skipped.write(f"{row}\n".encode())

    rows = stream_prompts(find_files(settings.prompts, settings.format), skip=skip if settings.skip_bad else None)
    if settings.fold_duplicates:
        rows = distinct(rows, duplicates, **options)
    write_jobs(expand(rows, **options), jobs)
    return {SKIPPED_FILE: skipped, DUPLICATES_FILE: duplicates, JOBS_FILE: jobs}


def _count_jobs(store: Store) -> int:
    with store.open(JOBS_FILE) as file:
        return len(JobList(file))


def _free_memory() -> None:
    torch = sys.modules.get("torch")  # not imported: nothing of it is in use
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _nothing_made(rows: Sequence[Row]) -> bool:
    """True if the screener raised for every row."""
    return all(row["outcome"] == "unscored" and row["fingerprint"] is None for row in rows)
