"""Prompt lists, read as a stream.

`.txt` has a prompt a line; `.csv`, `.jsonl` and `.parquet` have a column `prompt`, and may have `family` and `seed`.
All but Parquet may be gzipped (`.csv.gz`). A list may be several files by a glob, or standard input (`-`).
"""

from __future__ import annotations

import atexit
import csv
import glob
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Final, Literal, TypeAlias, cast, get_args

Format: TypeAlias = Literal["txt", "csv", "jsonl", "parquet"]
MAX_SEED: Final = 2**63 - 1
STANDARD_INPUT: Final = "-"
_SHOWN: Final = 40  # characters of a bad value that an error message repeats
_PARQUET_ROWS: Final = 1024


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


@dataclass(frozen=True, slots=True)
class PromptFile:
    """One file of a prompt list.

    Attributes:
        name: As messages show it.
        format: Of its rows.
        open: Opens it, from its beginning, unzipped.
    """

    name: str
    format: Format
    open: Callable[[], IO[bytes]]


class BadRowError(ValueError):
    """One row that cannot be used; those after it can still be read. The message is one line with the place."""


def find_files(source: Path | str, format: Format | None = None) -> list[PromptFile]:
    """The files of a prompt list.

    Args:
        source: A file, a glob (files in the order of their names), or `-`.
        format: Of all the files; None for what their extensions say.

    Raises:
        ValueError: One line: no such file, no extension that is known, standard input without a format.
    """
    if str(source) == STANDARD_INPUT:
        if format is None:
            raise ValueError(f"standard input: its format is not known; name it by --format {_or(get_args(Format))}")
        return [_standard_input(format)]
    paths = [Path(source)]
    if not paths[0].exists() and glob.has_magic(str(source)):
        paths = [Path(each) for each in sorted(glob.glob(str(source), recursive=True)) if Path(each).is_file()]
        if not paths:
            raise ValueError(f"{source}: matches no file; check the pattern")
    return [_file(path, format) for path in paths]


def list_digest(files: Sequence[PromptFile]) -> str:
    """SHA-256 of the content of a prompt list."""
    whole = hashlib.sha256()
    for file in files:
        with _readable(file) as raw:
            whole.update(f"{file.format} ".encode() + hashlib.file_digest(cast("Any", raw), "sha256").digest())
    return whole.hexdigest()


def stream_prompts(
    files: Sequence[PromptFile], *, skip: Callable[[BadRowError], None] | None = None
) -> Iterator[PromptRow]:
    """The rows of a list, in order.

    In `.txt`, blank lines are skipped and prompts stripped. Elsewhere prompts are kept as they are, blank `family` and
    `seed` mean none, and other columns are ignored.

    Args:
        files: Of `find_files`.
        skip: Told of every bad row, which is then left out; None raises at the first.

    Raises:
        BadRowError: One line that names the file, the place, what is wrong there, and what to do.
        ValueError: A file cannot be read (on), or there is no row.
    """
    empty = True
    for file in files:
        for row in _read(file):
            if isinstance(row, PromptRow):
                empty = False
                yield row
            elif skip is None:
                raise row
            else:
                skip(row)
    if empty:
        raise ValueError(f"{files[0].name if len(files) == 1 else 'the list'}: has no prompts; write at least one")


def read_prompts(path: Path) -> list[PromptRow]:
    """All rows of a list, as `find_files` and `stream_prompts`."""
    return list(stream_prompts(find_files(path)))


def _file(path: Path, format: Format | None) -> PromptFile:
    name = path.name.lower()
    zipped = name.endswith(".gz")
    suffix = name.removesuffix(".gz").rpartition(".")[2]
    if format is None and (suffix not in get_args(Format) or (zipped and suffix == "parquet")):
        kinds = _or([f".{each}" for each in get_args(Format)])
        raise ValueError(f"{path}: unknown extension {path.suffix.lower()!r}; use {kinds}, or name it by --format")

    def open_file() -> IO[bytes]:
        if path.is_dir():
            raise ValueError(f"{path}: is a folder; name a prompt file in it, or several as '{path}/*.csv'")
        try:
            return cast("IO[bytes]", gzip.open(path)) if zipped else path.open("rb")
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; check the path") from None

    return PromptFile(str(path), format or cast("Format", suffix), open_file)


def _standard_input(format: Format) -> PromptFile:
    return PromptFile("standard input", format, lambda: open(_spool(), "rb"))


@cache
def _spool() -> str:
    """Standard input, which can be read only once, as a temporary file that lasts as long as the process."""
    handle, path = tempfile.mkstemp()
    atexit.register(os.unlink, path)
    with open(handle, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return path


def _or(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


@contextmanager
def _readable(file: PromptFile) -> Generator[IO[bytes], None, None]:
    """The open file; what goes wrong while it is read becomes one line."""
    try:
        with file.open() as raw:
            yield raw
    except (OSError, EOFError, zlib.error) as error:  # also a damaged or cut-off gzip file
        raise ValueError(f"{file.name}: cannot be read ({str(error).splitlines()[0]})") from None


def _read(file: PromptFile) -> Iterator[PromptRow | BadRowError]:
    with _readable(file) as raw:
        yield from _READERS[file.format](file.name, raw)


def _text(raw: IO[bytes], newline: str | None) -> io.TextIOWrapper:
    """UTF-8 with or without a byte order mark; a byte that is not UTF-8 becomes half of a surrogate pair."""
    return io.TextIOWrapper(cast("Any", raw), encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _read_txt(name: str, raw: IO[bytes]) -> Iterator[PromptRow | BadRowError]:
    for number, line in enumerate(_text(raw, None), start=1):
        if prompt := line.strip():
            yield _row(name, number, _decoded(prompt), None, None)


def _read_csv(name: str, raw: IO[bytes]) -> Iterator[PromptRow | BadRowError]:
    reader = csv.reader(_text(raw, ""), strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1  # a row may have several lines: its first one is named
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRowError(f"{name}, line {line}: not valid CSV ({error}); check the double quotes")
            continue
        if not fields:
            continue
        if not header:
            header = [field.strip() for field in fields]
            _check_header(f"{name}, line {line}", header)
        elif len(fields) != len(header):
            yield BadRowError(
                f"{name}, line {line}: has {len(fields)} fields where the header has {len(header)}; "
                "put a prompt that contains a comma in double quotes"
            )
        else:
            row = dict(zip(header, fields, strict=True))
            yield _row(name, line, _decoded(row["prompt"]), _decoded(row.get("family")), row.get("seed"))


def _check_header(place: str, header: Sequence[str]) -> None:
    if isinstance(bad := _decoded(", ".join(header)), BadRowError):
        raise ValueError(f"{place}: {bad}")
    if header.count("prompt") != 1:
        raise ValueError(
            f"{place}: needs one column named 'prompt', found {_shown(', '.join(header))}; "
            "name the columns in the first line"
        )


def _read_jsonl(name: str, raw: IO[bytes]) -> Iterator[PromptRow | BadRowError]:
    for number, line in enumerate(_text(raw, "\n"), start=1):
        if not line.strip():
            continue
        fields = _object(line)
        if isinstance(fields, BadRowError):
            yield BadRowError(f"{name}, line {number}: {fields}")
        else:
            yield _row(name, number, fields["prompt"], fields.get("family"), fields.get("seed"))


def _object(line: str) -> dict[str, Any] | BadRowError:
    """The JSON object of a line, with a prompt."""
    if isinstance(bad := _decoded(line), BadRowError):
        return bad
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRowError(f"not valid JSON ({error}); write one object a line")
    if not isinstance(row, dict):
        return BadRowError(f"holds a JSON {type(row).__name__}; write one object a line")
    fields = cast("dict[str, Any]", row)
    if "prompt" not in fields:
        found = _shown(", ".join(fields)) if fields else "none"
        return BadRowError(f"has no key 'prompt', found {found}; add it")
    return fields


def _read_parquet(name: str, raw: IO[bytes]) -> Iterator[PromptRow | BadRowError]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(raw)
        columns = file.schema_arrow.names
        if columns.count("prompt") != 1:
            raise ValueError(f"{name}: needs one column named 'prompt', found {_shown(', '.join(columns))}; rename it")
        wanted = [column for column in ("prompt", "family", "seed") if column in columns]
        number = 0
        for batch in file.iter_batches(_PARQUET_ROWS, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield _row(name, number, row["prompt"], row.get("family"), row.get("seed"), unit="row")
    except pa.ArrowException as error:
        raise ValueError(f"{name}: cannot be read ({str(error).splitlines()[0]}); is it Parquet?") from None


_READERS: Final[dict[Format, Callable[[str, IO[bytes]], Iterator[PromptRow | BadRowError]]]] = {
    "txt": _read_txt,
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
FORMATS: Final = tuple(_READERS)


def _decoded(text: str | None) -> str | BadRowError | None:
    """The text, unless it holds a byte that was not UTF-8."""
    if text is None or text.isascii() or not (byte := re.search("[\udc80-\udcff]", text)):
        return text
    return BadRowError(f"byte 0x{ord(byte[0]) - 0xDC00:02x} is not UTF-8; save the file as UTF-8")


def _row(
    name: str, number: int, prompt: object, family: object, seed: object, *, unit: str = "line"
) -> PromptRow | BadRowError:
    """The fields of one row, as text or as JSON values, checked."""
    try:
        label = _checked_text("family", family)
        text = _checked_text("prompt", prompt)
        if text is None or not text.strip():
            raise BadRowError("the prompt is empty; fill it in or remove the row")
        return PromptRow(prompt=text, family=(label or "").strip() or None, seed=_seed(seed))
    except BadRowError as error:
        return BadRowError(f"{name}, {unit} {number}: {error}")


def _checked_text(name: str, value: object) -> str | None:
    if isinstance(value, BadRowError):
        raise value
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadRowError(f"{name} is a {type(value).__name__}; write it as text")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise BadRowError(f"{name} has half of a surrogate pair, which is no text; write the character")
    return value


def _seed(value: object) -> int | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    text = str(value).strip() if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    if not re.fullmatch(r"[+-]?[0-9]{1,4000}", text):
        raise BadRowError(f"seed {_shown(str(value))} is no whole number; write one, or leave it empty")
    seed = int(text)
    if not 0 <= seed <= MAX_SEED:
        raise BadRowError(f"seed {_shown(text)} is out of range; write one from 0 to {MAX_SEED}")
    return seed


def _shown(value: str) -> str:
    return repr(value if len(value) <= _SHOWN else value[:_SHOWN] + "...")
