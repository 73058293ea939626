"""Public lists of prompts, fetched when asked for and never otherwise: the engine of `sd-guard prompts pull NAME`.

None of them is copied into this project. Where a list's checksum is not known here, `pull` refuses to write it until
the user pins one: addresses can change hands.
"""

from __future__ import annotations

import csv
import hashlib
import http.client
import io
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import pyarrow as pa
import pyarrow.parquet as pq

from sd_guard.screening.records import write_atomic

MAX_BYTES: Final = 64 << 20  # the largest list has some megabytes
TIMEOUT: Final = 30.0  # seconds without a byte
_CHUNK: Final = 1 << 16
_LOCAL: Final = ("localhost", "127.0.0.1", "::1")

Pairs: TypeAlias = "Iterable[tuple[object, str]]"  # prompt as it was found, family


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptList:
    """One public list.

    Attributes:
        url: Where it is.
        sha256: Of the file at that address; None where nobody has verified it for this project.
        about: One line: what is in it, whose, under which licence.
        read: The file's content to prompts and families.
    """

    url: str
    sha256: str | None
    about: str
    read: Callable[[bytes], Pairs]


def _read_csv(data: bytes) -> Iterator[tuple[object, str]]:
    """Of ml-research: semicolons; `Caption`, and `type` in the memorized list."""
    families = {"VM": "verbatim", "TM": "template", "no such column": "novel"}
    for row in csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), delimiter=";", strict=True):
        yield row["Caption"], families[row.get("type", "no such column")]


def _read_jsonl(data: bytes) -> Iterator[tuple[object, str]]:
    """Of Wen et al.: one object a line; `caption`."""
    for line in data.decode("utf-8").split("\n"):
        if line.strip():
            yield json.loads(line)["caption"], "memorized"


def _read_parquet(data: bytes) -> Iterator[tuple[object, str]]:
    """Of Webster: `caption` and `overfit_type`: matching, retrieved and template verbatims, or nothing found."""
    families = {"MV": "verbatim", "RV": "verbatim", "TV": "template", "N": "unmatched"}
    table = pq.read_table(pa.BufferReader(data), columns=["caption", "overfit_type"])
    for row in cast("list[dict[str, Any]]", table.to_pylist()):
        yield row["caption"], families[row["overfit_type"]]


_ML_RESEARCH: Final = (
    "https://raw.githubusercontent.com/ml-research/localizing_memorization_in_diffusion_models/"
    "c8de0c620ec511cdb9e937905d1503cd9758910b/prompts/"
)
_WEN: Final = (
    "https://raw.githubusercontent.com/YuxinWenRick/diffusion_memorization/ca60157f40a5d3bc41763e922ce27187fdf1adc4/"
)
_WEBSTER: Final = "https://huggingface.co/datasets/fraisdufour/templates-verbs/resolve/main/groundtruth_parquets/"

PROMPT_LISTS: Final[Mapping[str, PromptList]] = {
    "sd1-memorized": PromptList(
        url=_ML_RESEARCH + "memorized_laion_prompts.csv",
        sha256=None,
        about="500 captions that Stable Diffusion v1 memorized, verbatim or template (Hintersdorf et al. 2024; MIT)",
        read=_read_csv,
    ),
    "sd1-unmemorized": PromptList(
        url=_ML_RESEARCH + "unmemorized_laion_prompts.csv",
        sha256=None,
        about="500 LAION captions that it did not: benign prompts in the same style (Hintersdorf et al. 2024; MIT)",
        read=_read_csv,
    ),
    "sd1-memorized-wen": PromptList(
        url=_WEN + "examples/sdv1_500_memorized.jsonl",
        sha256=None,
        about="500 captions that Stable Diffusion v1 memorized, without their kind (Wen et al. 2024)",
        read=_read_jsonl,
    ),
    "sd1-webster": PromptList(
        url=_WEBSTER + "sdv1_bb_edge_groundtruth.parquet",
        sha256=None,
        about="captions of the black-box attack on Stable Diffusion v1, and what it found (Webster 2023)",
        read=_read_parquet,
    ),
    "sd2-webster": PromptList(
        url=_WEBSTER + "sdv2_bb_edge_groundtruth.parquet",
        sha256=None,
        about="the same on Stable Diffusion v2 (Webster 2023)",
        read=_read_parquet,
    ),
}


def pull(name: str, folder: Path, *, url: str | None = None, sha256: str | None = None) -> Path:
    """Fetches a list and writes it as `NAME.csv`, with columns `prompt` and `family`.

    Args:
        name: A key of `PROMPT_LISTS`.
        folder: An existing folder, where no such file is yet.
        url: Another address of the same file; https, or http on this very machine.
        sha256: Checksum of the fetched file, 64 hexadecimal digits; None takes the known one.

    Returns:
        The file. It appears complete, and only after its checksum was verified.

    Raises:
        ValueError: In one line: an unknown name, an address that fails or is too large, another checksum than asked
            for, none known and none given (the message then says which was found), or a file of another form.
    """
    known = PROMPT_LISTS.get(name)
    if known is None:
        raise ValueError(f"no prompt list is called {name!r}; there are {', '.join(PROMPT_LISTS)}")
    expected = (sha256 or known.sha256 or "").lower()
    if sha256 is not None and (len(expected) != 64 or set(expected) - set("0123456789abcdef")):
        raise ValueError(f"--sha256 is {sha256!r}; give 64 hexadecimal digits")
    path, address = folder / f"{name}.csv", url or known.url
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; make it first")
    if path.exists():
        raise ValueError(f"{path}: exists already; remove it, or name another folder")
    data = _fetch(address)
    found = hashlib.sha256(data).hexdigest()
    if not expected:
        raise ValueError(
            f"{address}: its checksum is not known to sd-guard, so nothing was written; what came has sha256 {found}: "
            f"if you trust it, pull again with --sha256 {found}"
        )
    if found != expected:
        raise ValueError(f"{address}: has sha256 {found}, not {expected}; nothing was written")
    write_atomic(path, _as_csv(known, address, data))
    return path


def _as_csv(known: PromptList, address: str, data: bytes) -> bytes:
    """Prompts word for word; rows without one are left out."""
    try:
        rows = [(prompt, family) for prompt, family in known.read(data) if isinstance(prompt, str) and prompt.strip()]
    except (ValueError, KeyError, TypeError, csv.Error, pa.ArrowException) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{address}: is not in the form of this list ({reason}); nothing was written") from error
    if not rows:
        raise ValueError(f"{address}: holds no prompts; nothing was written")
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([("prompt", "family"), *rows])
    return text.getvalue().encode()


def _fetch(address: str) -> bytes:
    """What is at an address, read piece by piece up to `MAX_BYTES`."""
    _check_address(address)
    request = urllib.request.Request(address, headers={"User-Agent": "sd-guard"})
    data = bytearray()
    try:
        with urllib.request.build_opener(_SafeRedirects).open(request, timeout=TIMEOUT) as response:
            length = response.headers.get("Content-Length")
            while piece := response.read(_CHUNK):
                data += piece
                if len(data) > MAX_BYTES:
                    raise ValueError(f"{address}: is larger than {MAX_BYTES >> 20} MiB, which no prompt list is")
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise ValueError(
            f"{address}: could not be fetched ({' '.join(str(reason).split()) or type(error).__name__})"
        ) from error
    if length is not None and length != str(len(data)):
        raise ValueError(f"{address}: ended after {len(data)} of {length} bytes; try again")
    return bytes(data)


def _check_address(address: str) -> None:
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError as error:
        raise ValueError(f"{address}: is no address ({error}); check it") from None
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOCAL):
        raise ValueError(f"{address}: is no https address; use one")


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect to where no request may go in the first place."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_address(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
