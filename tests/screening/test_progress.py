"""Progress: what it counts, what it shows where, and what Prometheus reads."""

import io
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sd_guard.screening import progress as module
from sd_guard.screening.processes import Alone
from sd_guard.screening.progress import Progress, Standing
from sd_guard.screening.records import Shard


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_come_at_their_interval_and_at_the_end(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(10_000, [Shard(range(1000), 5, 0)], processes=Alone(), stream=stream) as progress:
        for batch in range(4):
            clock[0] += module.LINES_EVERY / 2
            progress.add(Shard(range(batch * 1000, batch * 1000 + 1000), 10, 0), None)
    assert stream.getvalue().splitlines() == [
        "screening: 3,000 of 10,000 images, 25 flagged, 66.7/s, 1 min 45 s left",
        "screening: 5,000 of 10,000 images, 45 flagged, 66.7/s, 1 min 15 s left",
        "screening: 5,000 of 10,000 images, 45 flagged, 66.7/s, 1 min 15 s left",
    ]


def test_a_log_that_nobody_reads_ends_no_run(clock: list[float]) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Progress(10, [], processes=Alone(), stream=Closed()) as progress:
        clock[0] += module.LINES_EVERY
        progress.add(Shard(range(10), 0, 0), None)
    assert progress.standing().done == 10


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with Progress(20, [Shard(range(5), 1, 0)], processes=Alone(), stream=stream) as progress:
        progress.add(Shard(range(5, 20), 2, 0), None)
    last = stream.getvalue().split("\r")[-1]
    assert "20/20" in last
    assert "flagged=3" in last


def test_only_rank_0_shows_anything_and_it_counts_all(tmp_path: Path) -> None:
    counters = Alone()
    other = Alone(rank=1, size=2, counters=counters.counters)
    streams = io.StringIO(), io.StringIO()
    path = tmp_path / "metrics.prom"
    with Progress(20, [], processes=other, stream=streams[1], metrics_file=path) as progress:
        progress.add(Shard(range(5), 1, 0), None)
    assert not path.exists()
    with Progress(20, [], processes=counters, stream=streams[0]) as progress:
        progress.add(Shard(range(5, 10), 1, 0), None)
    assert streams[0].getvalue().startswith("screening: 10 of 20 images, 2 flagged")
    assert streams[1].getvalue() == ""


def test_prometheus_reads_the_metrics(tmp_path: Path, clock: list[float]) -> None:
    path = tmp_path / "metrics.prom"
    with Progress(100, [], processes=Alone(), stream=io.StringIO(), metrics_file=path) as progress:
        clock[0] += 2
        progress.add(Shard(range(40), 3, 2), "x")
    samples = {s.name: s.value for family in text_string_to_metric_families(path.read_text()) for s in family.samples}
    assert samples == {
        "sd_guard_images": 100,
        "sd_guard_images_done": 40,
        "sd_guard_images_flagged": 3,
        "sd_guard_images_unscored": 2,
        "sd_guard_images_per_second": 20,
        "sd_guard_seconds_left": 3,
    }


@pytest.mark.parametrize(("seconds", "left"), [(2, "8 s"), (80, "5 min 20 s"), (9000, "10 h 0 min")])
def test_what_is_left_is_said_in_words(seconds: float, left: str) -> None:
    assert (
        Standing(total=50, done=10, flagged=0, unscored=0, fresh=10, seconds=seconds).line().endswith(f", {left} left")
    )


def test_before_the_first_image_nothing_is_known() -> None:
    assert Standing(total=5, done=0, flagged=0, unscored=0, fresh=0, seconds=9).line().endswith("0.0/s, ? left")
