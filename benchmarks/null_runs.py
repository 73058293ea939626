"""Runs without a model, to measure and to kill: what a row says depends on its prompt and seed alone."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sd_guard.screening.jobs import Job
from sd_guard.screening.records import Row, read_run, unscored_row
from sd_guard.screening.runner import plan_run, screen
from sd_guard.screening.screener import Screened
from sd_guard.screening.settings import ModelSettings, RunSettings


@dataclass(frozen=True)
class NullScreener:
    """A screener without a model. Takes `seconds` a batch, and notes in a file, if there is one, what it finished."""

    seconds: float = 0.0
    notes: Path | None = None
    threshold: float | None = 0.9

    def screen(self, jobs: Sequence[Job]) -> Screened:
        if self.seconds:
            time.sleep(self.seconds)
        rows = [null_row(job) for job in jobs]
        if self.notes is not None:
            with self.notes.open("ab", buffering=0) as file:
                file.write(f"{jobs[0].index}\n".encode())
        return Screened(rows)


def null_row(job: Job) -> Row:
    """As of quick depth."""
    score = ((len(job.prompt) * 31 + job.seed) % 97) / 97
    flagged = score > 0.9
    row = unscored_row(prompt=job.prompt, family=job.family, seed=job.seed, index=job.index, reason="")
    row.update(score=score, flagged=flagged, outcome="flagged" if flagged else "passed", reason=None)
    row.update(decided_at_step=2, extra_lanes=1, fingerprint="null")
    return row


def null_settings(folder: Path, prompts: Sequence[str], **changes: Any) -> RunSettings:
    """Of a run in this folder, with a list and a model folder that are there; batches of three."""
    path, model = folder / "prompts.csv", folder / "model"
    path.write_text("prompt,family\n" + "".join(f"{text},{text[0]}\n" for text in prompts))
    model.mkdir(exist_ok=True)
    (model / "model_index.json").write_text("{}")
    options: dict[str, Any] = {"model": ModelSettings(model=str(model)), "batch_size": 3}
    return RunSettings(**{"prompts": path, "out": folder / "run", **options, **changes})


@dataclass(frozen=True)
class Kills:
    """What came of runs that were killed.

    Attributes:
        runs: That were killed, each at least once.
        kills: In all.
        resumed: Runs that ended with exactly the rows of one that was not killed.
        repeated: Finished batches that had to be screened again, in all.
        repeated_most: After any one kill.
    """

    runs: int
    kills: int
    resumed: int
    repeated: int
    repeated_most: int


def kill_runs(folder: Path, *, kills: int, batches: int = 20, size: int = 16, seconds: float = 0.005) -> Kills:
    """Kills runs at random moments, up to three times each, resumes them, and compares what they end with.

    Goes on with new runs until there were so many kills, or a few more.

    Every run is a process of its own, forked: this one must not have used Arrow's threads before.
    """
    asked = null_settings(folder, [f"{i} prompt" + "s" * (i % 7) for i in range(batches * size)], batch_size=size)
    began = time.monotonic()
    whole = _Killed(folder / "whole")
    whole.go_on(asked, seconds)
    longest, chance = time.monotonic() - began, random.Random(0)
    done: list[_Killed] = []
    resumed = 0
    while sum(run.kills for run in done) < kills:
        run = _Killed(folder / str(len(done)))
        while run.kills < 3 and run.go_on(asked, seconds, kill_after=chance.uniform(0, longest)):
            run.count_lost(batches)
        run.go_on(asked, seconds)
        done.append(run)
        resumed += run.kills > 0 and _in_child(lambda: read_run(run.out) != read_run(whole.out)) == 0  # noqa: B023
    return Kills(
        runs=sum(run.kills > 0 for run in done),
        kills=sum(run.kills for run in done),
        resumed=resumed,
        repeated=sum(run.lost for run in done),
        repeated_most=max(run.lost_most for run in done),
    )


@dataclass
class _Killed:
    """One run, and what it lost so far."""

    folder: Path
    kills: int = 0
    lost: int = 0
    lost_most: int = 0

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def go_on(self, asked: RunSettings, seconds: float, kill_after: float | None = None) -> bool:
        """Starts or resumes it; True if it was killed before it was done."""
        self.folder.mkdir(exist_ok=True)
        screener = NullScreener(seconds=seconds, notes=self.folder / "notes")

        def work() -> int:
            screen(plan_run(replace(asked, out=self.out), resume=self.out.exists()), lambda _: screener)
            return 0

        status = _in_child(work, kill_after)
        if status not in (0, -signal.SIGKILL):
            raise RuntimeError(f"a run in {self.folder} ended with {status}")
        self.kills += status != 0
        return status != 0

    def count_lost(self, batches: int) -> None:
        """Finished batches that no shard holds."""
        notes, shards = self.folder / "notes", self.out / "shards"
        finished = len(notes.read_bytes().splitlines()) if notes.exists() else 0
        kept = batches if (self.out / "records.parquet").exists() else sum(1 for _ in shards.glob("[0-9]*"))
        lost = finished - kept - self.lost
        self.lost, self.lost_most = self.lost + lost, max(self.lost_most, lost)


def _in_child(work: Callable[[], int], kill_after: float | None = None) -> int:
    """Exit status of `work` in a forked process, killed after so many seconds; negative: the signal that ended it."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress
        status = 1
        try:
            status = work()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(asdict(kill_runs(Path(temporary), kills=int(sys.argv[1]), batches=int(sys.argv[2])))))
