"""The images of a run, as `jobs.parquet` in its folder: any worker reads any part of it.

With `--fold-duplicates`, `duplicates.parquet` holds the rows of the list that were not screened: `prompt`, `family`,
`seed` (of their first image), and `index`, the first image of the row that stands for them.
"""

from __future__ import annotations

import hashlib
import sqlite3
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from sd_guard.screening.prompts import MAX_SEED, PromptRow

JOBS_FILE: Final = "jobs.parquet"
DUPLICATES_FILE: Final = "duplicates.parquet"
GROUP: Final = 4096  # jobs of a row group: what is read, and held, at once

_SCHEMA: Final = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("family", pa.string()),
        pa.field("seed", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Job:
    """One image to make: its place in the run, prompt, family and seed."""

    index: int
    prompt: str
    family: str | None
    seed: int


def expand(rows: Iterable[PromptRow], *, seeds: int, seed: int) -> Iterator[Job]:
    """Prompts x seeds, a prompt's images side by side, at seeds s, s + 1, ... from its own seed or the base seed.

    Raises:
        ValueError: If a seed would leave [0, 2**63).
    """
    for place, row in enumerate(rows):
        start = seed if row.seed is None else row.seed
        if start > MAX_SEED - seeds + 1:
            raise ValueError(f"seed {start} with --seeds {seeds} would exceed {MAX_SEED}; use smaller seeds")
        for image in range(seeds):
            yield Job(place * seeds + image, row.prompt, row.family, start + image)


def write_jobs(jobs: Iterable[Job], sink: IO[bytes]) -> int:
    """Writes jobs as Parquet, one row group in memory at a time; returns how many there were."""
    with _Writer(sink) as writer:
        for job in jobs:
            writer.add(job)
        return writer.total


def distinct(rows: Iterable[PromptRow], duplicates: IO[bytes], *, seeds: int, seed: int) -> Iterator[PromptRow]:
    """The rows that are the first to say what they say, seed included.

    Prompts are compared after Unicode normalisation (NFKC) and case folding. What was seen is kept in a temporary file:
    memory does not grow with the list.

    Args:
        rows: Of a list.
        duplicates: Where the other rows go, as Parquet; whole once the iterator has ended.
        seeds: Images a prompt.
        seed: First seed of rows without their own.
    """
    kept = 0
    with closing(sqlite3.connect("")) as seen, _Writer(duplicates) as others:  # "": a file that is gone when closed
        seen.execute("CREATE TABLE seen (said BLOB PRIMARY KEY, place INTEGER) WITHOUT ROWID")
        for row in rows:
            start = seed if row.seed is None else row.seed
            said = hashlib.blake2b(f"{start} {fold(row.prompt)}".encode(), digest_size=16).digest()
            if seen.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (said, kept)).rowcount:
                kept += 1
                yield row
            else:
                (place,) = seen.execute("SELECT place FROM seen WHERE said = ?", (said,)).fetchone()
                others.add(Job(place * seeds, row.prompt, row.family, start))


def fold(prompt: str) -> str:
    """A prompt without what Unicode normalisation (NFKC) and case folding take away."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", prompt).casefold())


class JobList:
    """The jobs of a file that `write_jobs` wrote, by their index; one row group is held at a time."""

    def __init__(self, file: IO[bytes]) -> None:
        """Reads no jobs yet.

        Raises:
            ValueError: If the file is damaged.
        """
        try:
            self._file = pq.ParquetFile(file)
        except pa.ArrowException as error:
            raise ValueError(f"{JOBS_FILE}: is damaged ({error}); start anew in another folder") from None
        self._held = (-1, _SCHEMA.empty_table())

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def read(self, wanted: range) -> list[Job]:
        """The jobs at these places, which count on from one to the next."""
        jobs: list[Job] = []
        for number in range(wanted.start // GROUP, (wanted.stop - 1) // GROUP + 1):
            start = max(wanted.start - number * GROUP, 0)
            part = self._group(number).slice(start, wanted.stop - number * GROUP - start).to_pydict()
            jobs += map(Job, *(part[name] for name in _SCHEMA.names))
        return jobs

    def _group(self, number: int) -> Any:
        if self._held[0] != number:
            self._held = (number, self._file.read_row_group(number))
        return self._held[1]


class _Writer:
    """Jobs to Parquet, in row groups of `GROUP`."""

    def __init__(self, sink: IO[bytes]) -> None:
        self.total = 0
        self._file = pq.ParquetWriter(sink, _SCHEMA, compression="zstd")
        self._group: list[Job] = []

    def add(self, job: Job) -> None:
        self._group.append(job)
        self.total += 1
        if len(self._group) == GROUP:
            self._flush()

    def _flush(self) -> None:
        columns = {name: [getattr(job, name) for job in self._group] for name in _SCHEMA.names}
        self._file.write_table(pa.table(columns, schema=_SCHEMA), row_group_size=GROUP)
        self._group.clear()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._group:
            self._flush()
        self._file.close()
