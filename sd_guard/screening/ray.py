"""`--engine ray`: the same screener in the workers of a Ray cluster, as an actor class under Ray Data.

    sd-guard screen prompts.txt --out run --engine ray --workers 2                             a cluster on this machine
    sd-guard screen prompts.txt --out s3://bucket/run --engine ray --ray-address HOST:6379     one that runs

Ray Data hands out batches by their places alone. A worker reads a batch from the run's `jobs.parquet` and writes its
shard, as the local engine does, so every node must reach the run folder: a shared file system, or an address. What is
lost with a worker is the batch that it had; Ray starts another one, and hands that batch out again.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, cast

import pyarrow as pa

from sd_guard.screening.jobs import JOBS_FILE, JobList
from sd_guard.screening.loading import first_line
from sd_guard.screening.processes import Alone
from sd_guard.screening.progress import Progress
from sd_guard.screening.records import Shard, find_shards
from sd_guard.screening.runner import (
    MakeScreener,
    Plan,
    finish_run,
    finish_when_interrupted,
    is_complete,
    missing_batches,
    room_to_write,
    screen_batches,
    start_run,
)
from sd_guard.screening.screener import Screener
from sd_guard.screening.settings import ClusterSettings
from sd_guard.screening.summary import Summary

BLOCKS: Final = 1024  # parts that the work is handed out in, at most
STOP_FILE: Final = "stop"  # while it is in the run folder, workers begin no batch
_OBJECT_STORE: Final = 80 << 20  # bytes, the least that Ray takes: only places go through it
_WRITTEN: Final = pa.schema(
    [
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("flagged", pa.int64()),
        ("unscored", pa.int64()),
        ("reason", pa.string()),
        ("error", pa.string()),
    ]
)


@dataclass(slots=True)
class Worker:
    """One actor: a screener of its own, given the places of some batches at a time.

    Attributes:
        plan: Of the run.
        make: Makes the screener. That happens with the first batch: an actor that fails when it is made is made again.
        new: Nothing of this run was ever written.
        screener: Once it is made.
        done: Shards that were there then: where this worker replaces one that was lost, some of what it is given.
    """

    plan: Plan
    make: MakeScreener
    new: bool
    screener: Screener | None = None
    done: dict[int, Shard] = field(default_factory=dict[int, Shard])

    def __call__(self, places: Any) -> Any:
        """A table of `start` and `stop` to a table of what was written; an error is a row of it, for Ray blurs them."""
        try:
            written = self._screen([range(each["start"], each["stop"]) for each in places.to_pylist()])
        except Exception as error:
            line = str(error) if isinstance(error, ValueError) else first_line(error)
            return pa.Table.from_pylist([{"error": line}], schema=_WRITTEN)
        columns = {
            "start": [shard.rows.start for shard, _ in written],
            "stop": [shard.rows.stop for shard, _ in written],
            "flagged": [shard.flagged for shard, _ in written],
            "unscored": [shard.unscored for shard, _ in written],
            "reason": [reason for _, reason in written],
            "error": [None] * len(written),
        }
        return pa.table(columns, schema=_WRITTEN)

    def _screen(self, batches: Sequence[range]) -> list[tuple[Shard, str | None]]:
        """What was written now, or had been before."""
        store = self.plan.store
        if self.screener is None:
            self.done = {shard.rows.start: shard for shard in find_shards(store)}
            self.screener = self.make(self.plan.settings)
            start_run(self.plan, self.screener.threshold)
        written: list[tuple[Shard, str | None]] = []
        written += ((self.done[batch.start], None) for batch in batches if batch.start in self.done)
        missing = (batch for batch in batches if batch.start not in self.done)
        wanted = takewhile(lambda batch: not store.exists(STOP_FILE), missing)
        with store.open(JOBS_FILE) as file, room_to_write(store):
            written += screen_batches(store, JobList(file), self.screener, wanted, new=self.new)
        self.new = False
        return written


def screen_with_ray(
    plan: Plan,
    cluster: ClusterSettings,
    make: MakeScreener,
    *,
    metrics_file: Path | None = None,
) -> Summary:
    """As `runner.screen`, by the workers of a cluster.

    Raises:
        KeyboardInterrupt: The run was interrupted; every worker has finished its batch.
        ValueError: As `runner.screen`, or if the cluster cannot be reached or has too little room.
    """
    with plan:
        shards = find_shards(plan.store)
        if not is_complete(plan, shards):
            plan.store.remove(STOP_FILE)
            problem: ValueError | None = None
            with (
                _connected(cluster) as (workers, gpus),
                room_to_write(plan.store),
                finish_when_interrupted() as interrupted,
                plan.progress(shards, Alone(), metrics_file) as progress,
            ):
                for row in _hand_out(plan, shards, make, workers, gpus):
                    try:
                        _count(row, progress)
                    except ValueError as error:
                        problem = problem or error
                    if (problem or interrupted()) and not plan.store.exists(STOP_FILE):
                        plan.store.write(STOP_FILE, b"")  # and take what the workers still have to say
                plan.store.remove(STOP_FILE)
                if problem is not None:
                    raise problem
                if interrupted():
                    raise KeyboardInterrupt
        return finish_run(plan)


def _hand_out(
    plan: Plan, shards: Sequence[Shard], make: MakeScreener, workers: int, gpus: int
) -> Iterator[dict[str, Any]]:
    """Gives the missing batches to the workers, block by block; yields the rows that they answer with."""
    import ray.data

    batches = list(missing_batches(plan.total, shards, plan.settings.batch_size))
    size = -(-len(batches) // BLOCKS)
    blocks = [_places(batches[start : start + size]) for start in range(0, len(batches), size)]
    answers = ray.data.from_arrow(blocks).map_batches(
        Worker,
        fn_constructor_args=(replace(plan, lock=None), make, not shards),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=gpus,
    )
    for table in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from cast("Any", table).to_pylist()


def _count(row: dict[str, Any], progress: Progress) -> None:
    """Counts a batch that a worker has written, or raises what it could not do."""
    if row["error"] is not None:
        raise ValueError(row["error"])
    progress.add(Shard(range(row["start"], row["stop"]), row["flagged"], row["unscored"]), row["reason"])


def _places(batches: Sequence[range]) -> Any:
    return pa.table({"start": [batch.start for batch in batches], "stop": [batch.stop for batch in batches]})


@contextmanager
def _connected(cluster: ClusterSettings) -> Generator[tuple[int, int], None, None]:
    """Connects to the cluster, or starts one; a connection that there is already is used and kept.

    Yields:
        How many workers to start, and how many GPUs each.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no report to the makers of Ray
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    here = ray.is_initialized()
    if not here:
        _connect(cluster)
    try:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        ray.data.DataContext.get_current().enable_progress_bars = False
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        workers = cluster.workers or gpus or 2
        if workers > (gpus or cpus):
            raise ValueError(f"--workers {workers}: the cluster has {cpus} CPUs and {gpus} GPUs; use fewer")
        yield workers, min(gpus, 1)
    finally:
        if not here:
            ray.shutdown()


def _connect(cluster: ClusterSettings) -> None:
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address is None:
        options |= {"num_cpus": cluster.workers or 2, "include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    try:
        if cluster.address is not None:
            _check_reachable(cluster.address)
        ray.init(cluster.address, **options)
    except Exception as error:  # whatever Ray raises when there is no cluster
        where = "no local cluster could be started" if cluster.address is None else f"--ray-address {cluster.address}"
        raise ValueError(f"{where}: cannot be reached ({first_line(error)})") from None


def _check_reachable(address: str) -> None:
    """Raises OSError within seconds where Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()
