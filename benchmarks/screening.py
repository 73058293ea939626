"""What screening costs beside the model, and how it shares and keeps its work: `python -m benchmarks.screening`.

The pipeline alone, with a screener that does nothing: time and memory by the number of prompts. The bundled checkpoint:
two workers against one, each with one thread, under Ray and under accelerate. And runs killed at random moments.
`--smoke` does a little of each, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.null_runs import NullScreener, null_settings
from sd_guard import cli
from sd_guard.screening import loading
from sd_guard.screening.jobs import Job
from sd_guard.screening.prompts import read_prompts
from sd_guard.screening.runner import plan_run, screen
from sd_guard.screening.screener import Screened, Screener
from sd_guard.screening.settings import RunSettings

ROOT = Path(__file__).parents[1]
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
BATCH = 1024  # of the screener that does nothing
SCREEN = ["--steps", "20", "--batch-size", "8"]  # of the bundled checkpoint
LAUNCH = (
    "-m accelerate.commands.accelerate_cli launch --multi_gpu --num_machines 1 --num_processes 2 --main_process_port 0"
    " --mixed_precision no --dynamo_backend no"
).split()


def main() -> None:
    """Command line; `null` and `command` are what it calls itself with."""
    if sys.argv[1:2] == ["null"]:
        print(json.dumps(_null_run(int(sys.argv[2]))))
        return
    if sys.argv[1:2] == ["command"]:
        sys.exit(_timed_command(Path(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a little of each, to see that it runs")
    parser.add_argument("--images", type=int, default=320, help="of a run with the bundled checkpoint")
    parser.add_argument("--kills", type=int, default=150)
    options = parser.parse_args()
    images, kills = (32, 10) if options.smoke else (options.images, options.kills)
    result = {
        "scale": measure_scale(SIZES[:2] if options.smoke else SIZES),
        "workers": {engine: measure_workers(engine, images) for engine in ("ray", "accelerate")},
        "kills": json.loads(_run("-m", "benchmarks.null_runs", str(kills), "20")),
    }
    print(json.dumps(result, indent=1))
    if not options.smoke:
        from benchmarks.results import write_result

        print(write_result("screening", result))


def measure_scale(sizes: Sequence[int]) -> dict[str, Any]:
    """Time and memory of runs without a model, each in a process of its own.

    Returns:
        `runs`; `exponent`, of time by prompts; `overhead`, microseconds a prompt of the largest; `memory_ratio`, the
        largest peak of resident memory over that of the smallest run.
    """
    runs = [json.loads(_run("-m", "benchmarks.screening", "null", str(size))) for size in sizes]
    seconds, memory = ([run[name] for run in runs] for name in ("seconds", "megabytes"))
    return {
        "runs": runs,
        "exponent": round(float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0]), 3),
        "overhead": round(1e6 * seconds[-1] / sizes[-1], 2),
        "memory_ratio": round(max(memory) / memory[0], 3),
    }


def measure_workers(engine: str, images: int) -> dict[str, float]:
    """Images a second of one worker and of two, and how many times the one the other is.

    Each worker's own, from the start of its first batch to the end of its last: what it takes to start is left out.
    """
    rates: list[float] = []
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            rows = random.Random(0).choices(read_prompts(ROOT / "prompts" / "reference.csv"), k=images)
            (folder / "prompts.txt").write_text("\n".join(row.prompt for row in rows))
            asked = ["screen", str(folder / "prompts.txt"), "--out", str(folder / "run"), *SCREEN]
            if engine == "ray":
                asked += ["--engine", "ray", "--workers", str(workers)]
            launcher = LAUNCH if engine == "accelerate" and workers == 2 else []
            _run(*launcher, "-m", "benchmarks.screening", "command", str(folder), *asked)
            process, began, ended, count = np.loadtxt(folder / "notes", ndmin=2).T
            each = [process == number for number in np.unique(process)]
            assert (len(each), count.sum()) == (workers, images)
            rates.append(sum(float(count[own].sum() / (ended[own].max() - began[own].min())) for own in each))
    return {"one": round(rates[0], 3), "two": round(rates[1], 3), "speedup": round(rates[1] / rates[0], 3)}


def _null_run(size: int) -> dict[str, float]:
    """A whole run, from the list to the merged records, but for the report."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with (folder / "prompts.txt").open("w") as file:
            file.writelines(f"a photograph of subject number {i} in the style of somebody\n" for i in range(size))
        settings = replace(null_settings(folder, ["x"], batch_size=BATCH), prompts=folder / "prompts.txt")
        began = time.perf_counter()
        screen(plan_run(settings), lambda _: NullScreener())
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"prompts": size, "seconds": round(seconds, 3), "megabytes": round(peak, 1)}


@dataclass(frozen=True)
class Timed:
    """A screener that notes for each batch its process, when it began and ended, and how many images it had."""

    inner: Screener
    notes: Path

    @property
    def threshold(self) -> float | None:
        return self.inner.threshold

    def screen(self, jobs: Sequence[Job]) -> Screened:
        began = time.time()
        screened = self.inner.screen(jobs)
        with self.notes.open("ab", buffering=0) as file:
            file.write(f"{os.getpid()} {began} {time.time()} {len(jobs)}\n".encode())
        return screened


@dataclass(frozen=True)
class LoadTimed:
    """Loads the model as the command does."""

    notes: Path

    def __call__(self, settings: RunSettings) -> Screener:
        return Timed(_LOAD(settings), self.notes)


_LOAD = loading.load_screener


def _timed_command(folder: Path, arguments: list[str]) -> int:
    loading.load_screener = LoadTimed(folder / "notes")
    return cli.main(arguments)


def _run(*arguments: str) -> str:
    """Standard output of Python with these arguments, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
