"""The table that a run ends with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sd_guard.screening.records import Row

_HEADER = ("family", "screened", "flagged", "rescued", "blocked", "unscored", "extra lanes/image")


@dataclass(frozen=True, slots=True)
class Counts:
    """Images of one family, or of a run; `extra_lanes` is the mean of UNet evaluations of one sample an image."""

    family: str
    screened: int
    flagged: int
    rescued: int
    blocked: int
    unscored: int
    extra_lanes: float


def count(family: str, rows: Sequence[Row]) -> Counts:
    """Counts the rows of one family."""
    outcomes = [row["outcome"] for row in rows]
    return Counts(
        family=family,
        screened=len(rows),
        flagged=sum(row["flagged"] for row in rows),
        rescued=outcomes.count("rescued"),
        blocked=outcomes.count("blocked"),
        unscored=outcomes.count("unscored"),
        extra_lanes=sum(row["extra_lanes"] for row in rows) / max(len(rows), 1),
    )


def by_family(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each family, in order of appearance; "-" for those without one."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row["family"] or "-", []).append(row)
    return families


def summary_table(rows: Sequence[Row]) -> str:
    """Aligned plain text: a line a family, and a total."""
    counts = [count(family, members) for family, members in by_family(rows).items()]
    counts.append(count("total", rows))
    lines = [_HEADER, *(_cells(each) for each in counts)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    text = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (zip(line, widths, strict=True) for line in lines)
    ]
    rule = "-" * len(text[0])
    return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def _cells(counts: Counts) -> tuple[str, ...]:
    numbers = (counts.screened, counts.flagged, counts.rescued, counts.blocked, counts.unscored)
    family = "".join(letter if letter.isprintable() else "?" for letter in counts.family)[:32]
    return (family, *(str(number) for number in numbers), f"{counts.extra_lanes:.1f}")


def drift_warning(rows: Sequence[Row], calibration: Path) -> str | None:
    """What there is to say of a run whose benign scores have left those of its calibration; None if they have not.

    Also says where that could not be checked: a run that lies above the calibration as a whole is such a case.
    """
    from sd_guard.calibration import Calibration
    from sd_guard.drift import check_drift

    first = {row["prompt"]: row["score"] for row in reversed(rows) if row["score"] is not None}
    drift = check_drift(Calibration.load(calibration).benign_scores, list(first.values()))
    return drift.message if drift.drifted or drift.p_value is None else None
