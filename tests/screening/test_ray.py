"""The Ray engine on a local cluster of two CPU workers: the same rows, whatever happens to a worker."""

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from screening.fakes import Eventful

from benchmarks.null_runs import NullScreener, null_settings
from sd_guard.cli import main
from sd_guard.screening.records import find_shards, read_run
from sd_guard.screening.runner import plan_run, screen
from sd_guard.screening.settings import ClusterSettings, RunSettings
from sd_guard.screening.storage import Store

ray = pytest.importorskip("ray", reason="needs ray: pip install 'sd-guard[ray]'")

from sd_guard.screening.ray import screen_with_ray  # noqa: E402

TWO = ClusterSettings(workers=2)
PROMPTS = [f"{i} prompt" + "s" * (i % 7) for i in range(60)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One for all tests: starting it takes longer than any of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (Path(__file__).parents[2], Path(__file__).parents[1]))))
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=40, object_store_memory=80 << 20
        )
        yield
        ray.shutdown()


@pytest.fixture
def settings(tmp_path: Path) -> RunSettings:
    return null_settings(tmp_path, PROMPTS)


def started(notes: Path) -> list[int]:
    return sorted(int(line.split()[0]) for line in (notes / "screened").read_text().splitlines())


def local_rows(settings: RunSettings) -> list[Any]:
    alone = replace(settings, out=f"{settings.out}-local")
    screen(plan_run(alone), lambda asked: NullScreener())
    return read_run(Path(str(alone.out)))


def test_rows_are_those_of_one_process_and_a_lost_worker_costs_its_batch_alone(settings: RunSettings) -> None:
    notes = Path(settings.out).parent
    screener = Eventful(seconds=0.02, folder=notes, place=31, sent=signal.SIGKILL)
    summary = screen_with_ray(plan_run(settings), TWO, lambda asked: screener)
    rows = read_run(Path(settings.out))
    assert rows == local_rows(settings)
    assert summary.total.screened == 60
    assert (notes / "done").exists()
    assert started(notes) == sorted([*range(0, 60, 3), 30])


def test_an_interrupt_lets_every_worker_finish_its_batch(settings: RunSettings) -> None:
    notes = Path(settings.out).parent
    screener = Eventful(seconds=0.1, folder=notes, place=6, sent=signal.SIGINT, target=os.getpid())
    with pytest.raises(KeyboardInterrupt):
        screen_with_ray(plan_run(settings), TWO, lambda asked: screener)
    written = [shard.rows.start for shard in find_shards(Path(settings.out))]
    assert written == started(notes)
    assert 0 < len(written) < 20
    screen_with_ray(plan_run(settings, resume=True), TWO, lambda asked: screener)
    assert started(notes) == list(range(0, 60, 3))
    assert [row["index"] for row in read_run(Path(settings.out))] == list(range(60))
    assert not (Path(settings.out) / "stop").exists()


def test_what_goes_wrong_in_a_worker_is_one_line_and_leaves_the_folder_free(settings: RunSettings) -> None:
    def broken(asked: RunSettings) -> NullScreener:
        raise ValueError("model: cannot be loaded (it is broken)")

    with pytest.raises(ValueError, match=r"^model: cannot be loaded \(it is broken\)$"):
        screen_with_ray(plan_run(settings), TWO, broken)
    assert Store.at(settings.out).names() == ["jobs.parquet"]
    assert plan_run(settings).total == 60


def test_the_command_screens_with_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a red ring on a blue wall\na large star\na cross\n")
    quick = ["--depth", "quick", "--batch-size", "2"]
    assert main(["screen", str(tmp_path / "p.txt"), "--out", str(tmp_path / "local"), *quick]) == 0
    command = ["screen", str(tmp_path / "p.txt"), "--out", str(tmp_path / "ray"), *quick]
    assert main([*command, "--engine", "ray", "--workers", "1"]) == 0
    assert read_run(tmp_path / "ray") == read_run(tmp_path / "local")
    out, _ = capsys.readouterr()
    tables = [part.split("report:")[0] for part in out.split("family")[1:]]
    assert tables[0] == tables[1]


def test_a_cluster_that_is_too_small_is_one_line(settings: RunSettings) -> None:
    with pytest.raises(ValueError, match="--workers 3: the cluster has 2 CPUs and 0 GPUs; use fewer"):
        screen_with_ray(plan_run(settings), ClusterSettings(workers=3), lambda asked: NullScreener())


def test_an_address_that_cannot_be_reached_is_one_line(settings: RunSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for each in (address, f"ray://{address}"):
        with pytest.raises(ValueError, match=f"--ray-address {each}: cannot be reached .*ConnectionRefused") as caught:
            screen_with_ray(plan_run(settings), ClusterSettings(address=each), lambda asked: NullScreener())
        assert "\n" not in str(caught.value)
    shutil.rmtree(settings.out)
