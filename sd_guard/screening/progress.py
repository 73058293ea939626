"""How far a run is: a bar on a terminal, plain lines elsewhere, and a file for Prometheus; and when to give it up."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from sd_guard.screening.processes import Processes
from sd_guard.screening.records import Shard

LINES_EVERY: Final = 30.0  # seconds between plain lines
METRICS_EVERY: Final = 5.0
ENOUGH: Final = 100  # images before the share of unscored ones says anything
_METRICS: Final = {
    "images": "Images of the run.",
    "images_done": "Images screened so far.",
    "images_flagged": "Of these, flagged.",
    "images_unscored": "Of these, without a score.",
    "images_per_second": "Rate since this start.",
    "seconds_left": "At this rate.",
}


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a run is; `seconds` since it was started or resumed, in which `fresh` of the images were screened."""

    total: int
    done: int
    flagged: int
    unscored: int
    fresh: int
    seconds: float

    @property
    def rate(self) -> float:
        """Images a second, of this start."""
        return self.fresh / max(self.seconds, 1e-9)

    @property
    def left(self) -> float:
        """Seconds at this rate; infinite before the first image."""
        return (self.total - self.done) / self.rate if self.fresh else float("inf")

    def line(self) -> str:
        """Plain text."""
        left = "?" if self.left == float("inf") else _duration(self.left)
        return f"{self.done:,} of {self.total:,} images, {self.flagged:,} flagged, {self.rate:,.1f}/s, {left} left"

    def metrics(self) -> dict[str, float]:
        """By the names of `_METRICS`."""
        numbers = (self.total, self.done, self.flagged, self.unscored, self.rate, self.left)
        return dict(zip(_METRICS, numbers, strict=True))


class Progress:
    """Counts the images of a run over all its processes, and shows them where this is rank 0. A context manager."""

    def __init__(
        self,
        total: int,
        shards: Sequence[Shard],
        *,
        processes: Processes,
        max_unscored: float = 1.0,
        metrics_file: Path | None = None,
        stream: IO[str] | None = None,
    ) -> None:
        """Counts from what there is.

        Args:
            total: Images of the run.
            shards: That are there already.
            processes: That screen it.
            max_unscored: As of `RunSettings`.
            metrics_file: For Prometheus' textfile collector, or None.
            stream: Where it is shown, or None for standard error.
        """
        self._total, self._processes = total, processes
        self._done = sum(len(shard.rows) for shard in shards)
        self._flagged = sum(shard.flagged for shard in shards)
        self._unscored = sum(shard.unscored for shard in shards)
        self._max_unscored = max_unscored
        self._metrics_file = metrics_file
        self._stream = stream or sys.stderr
        self._started = self._line_at = self._metrics_at = time.monotonic()
        self._bar = self._open_bar() if processes.rank == 0 and self._stream.isatty() else None

    def add(self, shard: Shard, reason: str | None) -> None:
        """Counts a batch.

        Args:
            shard: That was written.
            reason: Why one of its rows is unscored, if one is.

        Raises:
            ValueError: If more images than `max_unscored` allows could not be scored since this start.
        """
        add = self._processes.add
        fresh, unscored = add("images", len(shard.rows)), add("unscored", shard.unscored)
        add("flagged", shard.flagged)
        self._show()
        if fresh >= ENOUGH and unscored > self._max_unscored * fresh:
            raise ValueError(
                f"{unscored} of {fresh} images could not be scored, more than --max-unscored {self._max_unscored:g} "
                f"allows ({reason}); find the cause, and start anew in another folder: rows that are written stay"
            )

    def standing(self) -> Standing:
        """As of now."""
        fresh, flagged, unscored = (self._processes.add(name, 0) for name in ("images", "flagged", "unscored"))
        return Standing(
            total=self._total,
            done=self._done + fresh,
            flagged=self._flagged + flagged,
            unscored=self._unscored + unscored,
            fresh=fresh,
            seconds=time.monotonic() - self._started,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._show(last=True)
        if self._bar is not None:
            self._bar.close()

    def _show(self, *, last: bool = False) -> None:
        if self._processes.rank != 0:
            return
        now = time.monotonic()
        if self._bar is not None:
            standing = self.standing()
            self._bar.set_postfix(flagged=standing.flagged, refresh=False)
            self._bar.update(standing.done - self._bar.n)
        elif last or now - self._line_at >= LINES_EVERY:
            self._line_at = now
            with suppress(OSError):  # a log that nobody reads any more is no reason to end a run
                print(f"screening: {self.standing().line()}", file=self._stream, flush=True)
        if self._metrics_file is not None and (last or now - self._metrics_at >= METRICS_EVERY):
            self._metrics_at = now
            write_metrics(self._metrics_file, self.standing())

    def _open_bar(self) -> Any:
        from tqdm import tqdm

        return tqdm(total=self._total, initial=self._done, desc="screening", unit="image", file=self._stream)


def write_metrics(path: Path, standing: Standing) -> None:
    """Writes Prometheus' text format, whole or not at all; needs the extra `metrics`."""
    from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

    registry = CollectorRegistry()
    for name, value in standing.metrics().items():
        Gauge(f"sd_guard_{name}", _METRICS[name], registry=registry).set(value)
    write_to_textfile(str(path), registry)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
