"""Prompt lists: `.txt` (one a line), `.csv` and `.jsonl` (a `prompt` column; `family` and `seed` optional)."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

MAX_SEED: Final = 2**63 - 1
SUFFIXES: Final = (".txt", ".csv", ".jsonl")
_SHOWN: Final = 40  # characters of a bad value that an error message repeats


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt to screen.

    Attributes:
        prompt: The text; never blank.
        family: The label that the summary groups by, or None.
        seed: In [0, 2**63), or None for the run's own seed.
    """

    prompt: str
    family: str | None = None
    seed: int | None = None


def read_prompts(path: Path) -> list[PromptRow]:
    """Reads a prompt list; the file's extension names its format.

    In `.txt`, blank lines are skipped and prompts stripped. In `.csv` and `.jsonl`, prompts are kept as they are, blank
    `family` and `seed` mean none, and other columns are ignored.

    Raises:
        ValueError: One line that names the file, the place, what is wrong there, and what to do.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown extension {suffix!r}; use one of {', '.join(SUFFIXES)}")
    text = _read_text(path)
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    rows = list(readers[suffix](path, text))
    if not rows:
        raise ValueError(f"{path}: has no prompts; write at least one")
    return rows


def _read_text(path: Path) -> str:
    """Decodes the file, with or without a byte order mark."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a prompt file in it")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bom = 3 if data.startswith(b"\xef\xbb\xbf") else 0
        at = error.start + bom
        line = data.count(b"\n", 0, at) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{data[at]:02x} at offset {at} is not UTF-8; save the file as UTF-8"
        ) from None


def _read_txt(path: Path, text: str) -> Iterator[PromptRow]:
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if prompt := line.strip():
            yield _checked(f"{path}, line {number}", prompt, None, None)


def _read_csv(path: Path, text: str) -> Iterator[PromptRow]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    started = 1
    try:
        for fields in reader:
            place, started = f"{path}, line {started}", reader.line_num + 1
            if not fields:
                continue
            if not header:
                header = [name.strip() for name in fields]
                if header.count("prompt") != 1:
                    raise ValueError(
                        f"{place}: needs one column named 'prompt', found {_shown(', '.join(header))}; "
                        "name the columns in the first line"
                    )
                continue
            if len(fields) != len(header):
                raise ValueError(
                    f"{place}: has {len(fields)} fields where the header has {len(header)}; "
                    "put a prompt that contains a comma in double quotes"
                )
            row = dict(zip(header, fields, strict=True))
            yield _checked(place, row["prompt"], row.get("family"), row.get("seed"))
    except csv.Error as error:
        raise ValueError(f"{path}, line {started}: not valid CSV ({error}); check the double quotes") from None


def _read_jsonl(path: Path, text: str) -> Iterator[PromptRow]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not valid JSON ({error}); write one object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: holds a JSON {type(row).__name__}; write one object a line")
        fields = cast("dict[str, Any]", row)
        if "prompt" not in fields:
            found = _shown(", ".join(fields)) if fields else "none"
            raise ValueError(f"{place}: has no key 'prompt', found {found}; add it")
        yield _checked(place, fields["prompt"], fields.get("family"), fields.get("seed"))


def _checked(place: str, prompt: object, family: object, seed: object) -> PromptRow:
    """Validates the fields of one row, as text or as JSON values."""
    for name, value in (("prompt", prompt), ("family", family)):
        if not isinstance(value, str) and not (name == "family" and value is None):
            raise ValueError(f"{place}: {name} is a {type(value).__name__}; write it as text")
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise ValueError(f"{place}: {name} has half of a surrogate pair, which is no text; write the character")
    assert isinstance(prompt, str)
    if not prompt.strip():
        raise ValueError(f"{place}: the prompt is empty; fill it in or remove the row")
    label = family.strip() if isinstance(family, str) else ""
    return PromptRow(prompt=prompt, family=label or None, seed=_seed(place, seed))


def _seed(place: str, value: object) -> int | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    text = str(value).strip() if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    if not re.fullmatch(r"[+-]?[0-9]{1,4000}", text):
        raise ValueError(f"{place}: seed {_shown(str(value))} is no whole number; write one, or leave it empty")
    seed = int(text)
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"{place}: seed {_shown(text)} is out of range; write one from 0 to {MAX_SEED}")
    return seed


def _shown(value: str) -> str:
    return repr(value if len(value) <= _SHOWN else value[:_SHOWN] + "...")
