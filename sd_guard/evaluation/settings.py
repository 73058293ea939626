"""What an evaluation is asked to do: checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from sd_guard.screening.families import FAMILIES, MEMORIZED, kind_of
from sd_guard.screening.prompts import MAX_SEED, PromptRow
from sd_guard.screening.settings import ModelSettings, RunSettings

GUARD: Final = "guard"  # the guard's own score, as one more statistic
SEED_STRIDE: Final = 1_000_000  # torch's CPU generator reads the low 32 bits of a seed: a stride of 2^32 repeats images
DEFAULT_SHARES: Final = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.14, 0.2, 0.3, 0.4, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """One evaluation: labelled prompts x seeds, each statistic, one model.

    Attributes:
        prompts: `.csv` or `.jsonl` with the columns `prompt` and `family` (a key of
            `screening.families.FAMILIES`); `seed` is optional.
        out: The folder to write.
        model: The model and its sampling; images of the model's own size.
        statistics: Names; None for all that `seeds` allows, but the dearest.
        seeds: Images a prompt, >= 1; the table has one image of them, and all of them together.
        observe_at: Shares of the schedule in [0, 1], 1 being the last step, for statistics with no step of their own.
        batch_size: Images a batch, >= 1; a resumed evaluation may change it.
        resume: Go on with an evaluation that was ended.

    Raises:
        ValueError: If a value is out of its range, or the extra `eval` is not installed.
    """

    prompts: Path
    out: Path
    model: ModelSettings
    statistics: tuple[str, ...] | None = None
    seeds: int = 1
    observe_at: tuple[float, ...] = DEFAULT_SHARES
    batch_size: int = 16
    resume: bool = False

    def __post_init__(self) -> None:
        """Checks every value that can be checked without torch."""
        _ = self.run
        if self.model.height is not None or self.model.width is not None:
            raise ValueError("an evaluation samples at the model's own size; leave --height and --width out")
        if not self.observe_at or not all(0 <= share <= 1 for share in self.observe_at):
            raise ValueError(f"observe_at is {self.observe_at}; give shares of the schedule in [0, 1], at least one")
        missing = [name for name in ("matplotlib", "sklearn") if find_spec(name) is None]
        if missing:
            raise ValueError(f"{' and '.join(missing)} not installed; pip install 'sd-guard[eval]'")

    @property
    def run(self) -> RunSettings:
        """The part that is as of any run."""
        return RunSettings(
            prompts=self.prompts, out=self.out, model=self.model, seeds=self.seeds, batch_size=self.batch_size
        )

    def configuration(self, statistics: Sequence[str]) -> dict[str, Any]:
        """What decides the measurements: a resumed evaluation must have the same."""
        shares = [float(share) for share in self.observe_at]
        return {**self.run.configuration(), "statistics": list(statistics), "observe_at": shares}


def image_seed(row: PromptRow, index: int, number: int) -> int:
    """Seed of image `number` of the prompt at `index`: its own seed or else `index`, plus `number` SEED_STRIDE.

    Raises:
        ValueError: It would leave [0, 2^63).
    """
    seed = (index if row.seed is None else row.seed) + number * SEED_STRIDE
    if seed > MAX_SEED:
        raise ValueError(f"seed {row.seed} of prompt {index} is too large for {number + 1} images; use a smaller one")
    return seed


def check_labels(path: Path, rows: Sequence[PromptRow]) -> None:
    """Refuses prompts that nothing could be compared on.

    Raises:
        ValueError: If labels are missing, not known, or all of memorized prompts, or all of others.
    """
    words = ", ".join(FAMILIES)
    bare = sum(row.family is None for row in rows)
    if bare:
        raise ValueError(f"{path}: {bare} of {len(rows)} prompts have no family; add a column 'family' of {words}")
    families = sorted({row.family for row in rows if row.family is not None})
    unknown = [family for family in families if kind_of(family) is None]
    if unknown:
        raise ValueError(f"{path}: family {unknown[0]!r} is not known; use one of {words}")
    sides = {kind_of(family) in MEMORIZED for family in families}
    if len(sides) == 1:
        side, lacking = ("memorized", "others") if sides == {True} else ("other", "memorized ones")
        raise ValueError(f"{path}: has only {side} prompts ({', '.join(families)}); add {lacking} to compare with")
