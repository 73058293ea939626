"""Real processes, killed in the middle: what they had written stays, and their runs end as if nothing had been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.null_runs import NullScreener, null_settings
from sd_guard.screening.records import find_shards, read_run
from sd_guard.screening.runner import plan_run, screen

ROOT = Path(__file__).parents[2]
PROMPTS = [f"a {size} red {shape} on a blue wall" for size in ("small", "large") for shape in ("ring", "star", "cross")]


def command(prompts: Path, out: Path, *more: str) -> list[str]:
    settings = ["--steps", "12", "--batch-size", "2", "--out", str(out), *more]
    return [sys.executable, "-m", "sd_guard.cli", "screen", str(prompts), *settings]


def wait_for_a_shard(process: "subprocess.Popen[bytes]", out: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(out.glob("shards/*.parquet")):
        assert process.poll() is None, "the run ended before its first shard was seen"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_run_resumes_to_the_rows_and_images_of_an_unkilled_one(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    subprocess.run(command(prompts, tmp_path / "whole"), check=True, capture_output=True)

    killed = tmp_path / "killed"
    process = subprocess.Popen(command(prompts, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_a_shard(process, killed)
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


def test_fifty_kills_at_random_moments_lose_and_repeat_no_row() -> None:
    """In memory where there is such a folder: what is tested is the order of writes, not the disk."""
    environment = os.environ | {"TMPDIR": "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.null_runs", "50", "8"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["kills"] >= 50
    assert found["resumed"] == found["runs"] > 0
    # The batch that was being written, and where writing is slower than screening the one after it.
    assert found["repeated_most"] <= 2


def test_an_interrupted_command_finishes_its_batch_and_says_how_to_go_on(tmp_path: Path) -> None:
    null_settings(tmp_path, [f"prompt {i}" for i in range(100)])
    script = (
        "import sys; from benchmarks.null_runs import NullScreener; from sd_guard.screening import loading;"
        "loading.load_screener = lambda settings: NullScreener(0.2);"
        "from sd_guard.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    asked = ["screen", "prompts.csv", "--out", "run", "--model", "model", "--batch-size", "3"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *asked],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_a_shard(process, tmp_path / "run")  # type: ignore[arg-type]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: what was done is kept in run; add --resume to go on" in err
    assert "Traceback" not in err
    shards = find_shards(tmp_path / "run")
    assert [shard.rows.start for shard in shards] == list(range(0, 3 * len(shards), 3))
    assert 1 <= len(shards) < 34


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    mounted = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("no file system can be mounted here, so that none can be filled")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_ends_the_run_which_goes_on_when_there_is_room(tmp_path: Path, small_disk: Path) -> None:
    settings = null_settings(tmp_path, [f"{i} prompt" for i in range(300)], out=small_disk / "run")
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\); make room, and go on with"):
        screen(plan_run(settings), lambda asked: NullScreener())
    kept = find_shards(small_disk / "run")
    assert 0 < len(kept) < 100
    assert [row["index"] for row in read_run(small_disk / "run")] == [place for shard in kept for place in shard.rows]
    subprocess.run(["mount", "-o", "remount,size=5m", small_disk], check=True)
    assert screen(plan_run(settings, resume=True), lambda asked: NullScreener()) is not None
    assert [row["index"] for row in read_run(small_disk / "run")] == list(range(300))
    assert not [path for path in (small_disk / "run").iterdir() if path.suffix == ".tmp"]
