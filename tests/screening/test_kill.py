"""A real process, killed in the middle: what it had written stays, and the run goes on from there."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

PROMPTS = [f"a {size} red {shape} on a blue wall" for size in ("small", "large") for shape in ("ring", "star", "cross")]


def command(prompts: Path, out: Path, *more: str) -> list[str]:
    settings = ["--steps", "12", "--batch-size", "2", "--out", str(out), *more]
    return [sys.executable, "-m", "sd_guard.cli", "screen", str(prompts), *settings]


def test_a_killed_run_resumes_to_the_rows_of_an_unkilled_one(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    subprocess.run(command(prompts, tmp_path / "whole"), check=True, capture_output=True)

    killed = tmp_path / "killed"
    process = subprocess.Popen(command(prompts, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(killed.glob("shards/*.parquet")):
        assert process.poll() is None, "the run ended before its first shard was seen"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "records.parquet").exists()

    again = subprocess.run(command(prompts, killed), capture_output=True, text=True)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    assert "Traceback" not in again.stderr
    subprocess.run(command(prompts, killed, "--resume"), check=True, capture_output=True)
    rows = [pq.read_table(folder / "records.parquet").to_pylist() for folder in (tmp_path / "whole", killed)]
    assert rows[0] == rows[1]
    assert [row["prompt"] for row in rows[1]] == PROMPTS
    for row in rows[1]:
        if row["image"]:
            assert (killed / row["image"]).read_bytes() == (tmp_path / "whole" / row["image"]).read_bytes()
