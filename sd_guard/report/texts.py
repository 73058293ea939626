"""Hostile text and plain numbers, as a page shows them."""

from __future__ import annotations

import html
import math
import re
from dataclasses import dataclass
from typing import Final

SHORT: Final = 140  # characters shown before the rest is folded away
LONG: Final = 20_000  # characters shown at all
BUDGET: Final = 2_000_000  # bytes of folded text a page, as HTML
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class PromptText:
    """A prompt to show: its beginning, all of it where that is not all, and a note where not even that is."""

    short: str
    full: str | None = None
    note: str | None = None


class Texts:
    """Prompts of one page; once its folded texts fill `BUDGET`, only beginnings, with a note."""

    def __init__(self) -> None:
        self._left = BUDGET

    def get(self, prompt: str) -> PromptText:
        """The prompt, safe to be escaped and shown."""
        if len(prompt) <= SHORT:
            return PromptText(clean(prompt))
        beginning = f"{clean(prompt[:SHORT]).rstrip()}…"
        cut = clean(prompt[:LONG])
        self._left -= (cost := len(html.escape(cut).encode()))
        if self._left < 0:
            self._left += cost
            return PromptText(beginning, note=f"the first {SHORT} of {len(prompt)} characters")
        note = f"the first {LONG} of {len(prompt)} characters" if len(prompt) > LONG else None
        return PromptText(beginning, cut, note)


def clean(text: object) -> str:
    """Text without control characters, which HTML has no place for: each becomes a visible sign."""
    return _CONTROL.sub("\ufffd", str(text))


def short(text: object, length: int = SHORT) -> str:
    """`clean`, cut with an ellipsis."""
    line = str(text)
    return clean(line if len(line) <= length else f"{line[:length].rstrip()}…")


def number(value: float | None) -> str:
    """Three significant digits, or a dash."""
    return "–" if value is None or not math.isfinite(value) else f"{value:#.3g}"


def count(value: int) -> str:
    """Digits in groups of three."""
    return f"{value:,}".replace(",", "\u202f")
