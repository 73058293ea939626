"""`accelerate launch` with two CPU processes: they share the work, and a lost one costs no more than its batch."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.null_runs import null_settings
from sd_guard.screening.records import find_shards, read_run

SCRIPT = Path(__file__).with_name("launched.py")
ROOT = SCRIPT.parents[2]
LAUNCH = ["--multi_gpu", "--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no"]
QUIET = ["--dynamo_backend", "no", "--main_process_port", "0"]


def launch(folder: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine's processor; `--multi_gpu` is what accelerate calls several processes of a node."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *LAUNCH, *QUIET, str(SCRIPT)]
    run = ["screen", str(folder / "prompts.csv"), "--out", str(folder / "run"), "--model", str(folder / "model")]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [*command, *run, "--batch-size", "5", *more],
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def ranks(rows: list[Any]) -> Counter[str]:
    return Counter(row["fingerprint"] for row in rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    null_settings(tmp_path, [f"{i} prompt" + "s" * (i % 7) for i in range(100)])
    return tmp_path


def test_processes_share_the_work_and_rank_0_alone_speaks(folder: Path) -> None:
    done = launch(folder, SECONDS="0.2,0.01")
    assert done.returncode == 0, done.stderr
    rows = read_run(folder / "run")
    assert [row["index"] for row in rows] == list(range(100))
    shares = ranks(rows)
    assert 5 <= shares["rank 0"] < shares["rank 1"]  # the slow one does not hold the other
    assert done.stdout.count("total") == 1
    assert done.stderr.count("100 of 100 images") == 1
    assert (folder / "run" / "report.html").exists()


def test_a_lost_process_ends_the_launch_and_the_run_is_gone_on_with(folder: Path) -> None:
    lost = launch(folder, SECONDS="0.05,0.05", KILL="1")
    assert lost.returncode != 0
    kept = sum(len(shard.rows) for shard in find_shards(folder / "run"))
    assert 20 < kept < 100
    again = launch(folder, "--resume", SECONDS="0,0")
    assert again.returncode == 0, again.stderr
    rows = read_run(folder / "run")
    assert [row["index"] for row in rows] == list(range(100))
    assert set(ranks(rows)) == {"rank 0", "rank 1"}


def test_bad_arguments_are_said_once(folder: Path) -> None:
    done = launch(folder, "--seeds", "0", SECONDS="0,0")
    assert done.returncode != 0
    assert done.stderr.count("error: --seeds is 0; use a whole number >= 1") == 1
    assert not (folder / "run").exists()
