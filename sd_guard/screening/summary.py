"""The table that a run ends with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, cast

import pyarrow as pa
import pyarrow.compute as pc

from sd_guard.screening.records import scan_run
from sd_guard.screening.storage import Store

DRIFT_IMAGES: Final = 100_000  # scores that a run's drift is judged by, the first of it
_HEADER: Final = ("family", "screened", "flagged", "rescued", "blocked", "unscored", "extra lanes/image")
_COLUMNS: Final = ("family", "flagged", "outcome", "extra_lanes", "reason", "fingerprint")


@dataclass(slots=True)
class Counts:
    """Images of one family, or of a run; `extra_lanes` are UNet evaluations of one sample."""

    screened: int = 0
    flagged: int = 0
    rescued: int = 0
    blocked: int = 0
    unscored: int = 0
    extra_lanes: int = 0

    def add(self, *, outcome: str, flagged: bool, images: int, extra_lanes: int) -> None:
        """Counts images of one outcome."""
        self.screened += images
        self.flagged += images * flagged
        self.rescued += images * (outcome == "rescued")
        self.blocked += images * (outcome == "blocked")
        self.unscored += images * (outcome == "unscored")
        self.extra_lanes += extra_lanes


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to.

    Attributes:
        families: By label, in order of appearance; "-" for those without one.
        total: Of all.
        reasons: Why images are unscored, up to the first colon, and how many.
        fingerprint: Of the model and its sampling; None if no image was scored.
    """

    families: dict[str, Counts] = field(default_factory=dict[str, Counts])
    total: Counts = field(default_factory=Counts)
    reasons: Counter[str] = field(default_factory=Counter[str])
    fingerprint: str | None = None

    def table(self) -> str:
        """Aligned plain text: a line a family, and a total."""
        lines = [_HEADER, *(_cells(*each) for each in self.families.items()), _cells("total", self.total)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
        text = ["  ".join(_padded(line, widths)) for line in lines]
        rule = "-" * len(text[0])
        return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def summarize(run: Path | Store) -> Summary:
    """Sums up a run, finished or not; holds one batch of its rows at a time."""
    families: dict[str, Counts] = {}
    total, reasons, fingerprint = Counts(), Counter[str](), None
    for batch in scan_run(run, _COLUMNS):
        table = pa.Table.from_batches([batch])
        groups = table.group_by(["family", "outcome", "flagged"], use_threads=False)
        for group in groups.aggregate([([], "count_all"), ("extra_lanes", "sum")]).to_pylist():
            counted = {
                "outcome": group["outcome"],
                "flagged": group["flagged"],
                "images": group["count_all"],
                "extra_lanes": group["extra_lanes_sum"],
            }
            families.setdefault(group["family"] or "-", Counts()).add(**counted)
            total.add(**counted)
        unscored = table.filter(pc.field("outcome") == "unscored")
        reasons.update((reason or "no reason").split(":")[0] for reason in unscored["reason"].to_pylist())
        fingerprint = fingerprint or next((each for each in table["fingerprint"].to_pylist() if each), None)
    return Summary(families, total, reasons, fingerprint)


def scores_of(run: Path | Store) -> Iterator[Mapping[str, Any]]:
    """What the drift of a run is judged by, of its first `DRIFT_IMAGES` images."""
    rows = (row for batch in scan_run(run, ("prompt", "seed", "score", "fingerprint")) for row in batch.to_pylist())
    return islice(cast("Iterator[Mapping[str, Any]]", rows), DRIFT_IMAGES)


def drift_warning(rows: Iterable[Mapping[str, Any]], calibration: Path) -> str | None:
    """What there is to say of a run whose benign scores have left those of its calibration; None if they have not.

    Also says where that could not be checked: where a run lies above the calibration as a whole, where some images are
    of another depth, and where prompts share noise that the calibration's did not, which moves their scores alike.

    Args:
        rows: With `prompt`, `seed`, `score` and `fingerprint`.
        calibration: The file.
    """
    from sd_guard.calibration import Calibration, shared_seeds
    from sd_guard.drift import check_drift

    own, first = Calibration.load(calibration), dict[str, Mapping[str, Any]]()
    for row in rows:
        if row["score"] is not None:
            first.setdefault(row["prompt"], row)
    other = sum(row["fingerprint"] != own.fingerprint.digest for row in first.values())
    if other:
        return (
            f"drift not checked: {other} of {len(first)} images are of another depth than the calibration; screen with "
            "its own, not with --depth auto, to have it checked"
        )
    seeds = [row["seed"] for row in first.values()]
    alike = {*seeds} == {*own.shared_seeds} if own.shared_seeds else not shared_seeds(seeds)
    if first and not alike:
        remedy = "calibrate with the run's" if own.shared_seeds else "give prompts seeds of their own (a seed column)"
        return (
            f"drift not checked: the prompts {_named(shared_seeds(seeds))}, those of the calibration "
            f"{_named(own.shared_seeds)}; noise moves all scores alike, and so the share that is flagged; {remedy}"
        )
    drift = check_drift(own.benign_scores, [row["score"] for row in first.values()])
    return drift.message if drift.drifted or drift.p_value is None else None


def _named(seeds: tuple[int, ...]) -> str:
    if not seeds:
        return "have seeds of their own"
    return f"share seed {seeds[0]}" if len(seeds) == 1 else f"share {len(seeds)} seeds"


def _cells(name: str, counts: Counts) -> tuple[str, ...]:
    numbers = (counts.screened, counts.flagged, counts.rescued, counts.blocked, counts.unscored)
    family = "".join(letter if letter.isprintable() else "?" for letter in name)[:32]
    return (family, *(str(number) for number in numbers), f"{counts.extra_lanes / max(counts.screened, 1):.1f}")


def _padded(line: tuple[str, ...], widths: list[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
