"""Prompt lists against a server on this machine: what appears is verified and whole, or nothing does."""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sd_guard import prompt_lists
from sd_guard.prompt_lists import PROMPT_LISTS, pull
from sd_guard.screening.prompts import PromptRow, read_prompts

CSV = (
    b";Caption;URL;type;mean_sscd;max_sscd;Index\n"
    b"0;The Podcast;https://a.b/c.jpg;VM;0.8;0.8;1\n"
    b'1;"""Say, ""hi""; and go";https://a.b/d.jpg;TM;;;2\n'
    b"2;  ;https://a.b/e.jpg;TM;;;3\n"
)
BENIGN = ";Caption;URL;Index\n0;Pagoda, in 京都;https://a.b;396\n".encode()
JSONL = b"".join(json.dumps({"caption": text, "index": 1}).encode() + b"\n" for text in ("a\u00ae", "b"))


def parquet() -> bytes:
    sink = io.BytesIO()
    rows = [("m", "MV"), ("r", "RV"), ("t", "TV"), ("n", "N"), (None, "N")]
    table = pa.table({"caption": [row[0] for row in rows], "overfit_type": [row[1] for row in rows], "url": [""] * 5})
    pq.write_table(table, sink)
    return sink.getvalue()


class Server(BaseHTTPRequestHandler):
    """Answers from `answers`: path to status, headers and body."""

    answers: dict[str, tuple[int, dict[str, str], bytes]]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        status, headers, body = self.answers.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def serve() -> Iterator[Any]:
    """Puts an answer at a path of a server, and returns the address; `serve.asked` holds the requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Server,), {"answers": {}}))
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def put(body: bytes, path: str = "/list", status: int = 200, **headers: str) -> str:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        server.RequestHandlerClass.answers[path] = (status, names, body)  # type: ignore[attr-defined]
        return f"http://127.0.0.1:{server.server_port}{path}"

    put.asked = server.asked  # type: ignore[attr-defined]
    yield put
    server.shutdown()
    server.server_close()
    thread.join()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("name", "data", "rows"),
    [
        ("sd1-memorized", CSV, [("The Podcast", "verbatim"), ('"Say, "hi"; and go', "template")]),
        ("sd1-unmemorized", BENIGN, [("Pagoda, in 京都", "novel")]),
        ("sd1-memorized-wen", JSONL, [("a®", "memorized"), ("b", "memorized")]),
        ("sd1-webster", parquet(), [("m", "verbatim"), ("r", "verbatim"), ("t", "template"), ("n", "unmatched")]),
    ],
)
def test_each_form_becomes_a_prompt_file(tmp_path: Path, serve: Any, name: str, data: bytes, rows: Any) -> None:
    path = pull(name, tmp_path, url=serve(data), sha256=sha256(data).upper())
    assert path == tmp_path / f"{name}.csv"
    assert read_prompts(path) == [PromptRow(prompt, family) for prompt, family in rows]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_known_address_and_checksum_are_taken(tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = replace(PROMPT_LISTS["sd1-memorized-wen"], url=serve(JSONL), sha256=sha256(JSONL))
    monkeypatch.setattr(prompt_lists, "PROMPT_LISTS", {"mine": own})
    assert [row.prompt for row in read_prompts(pull("mine", tmp_path))] == ["a®", "b"]
    assert serve.asked == ["/list"]


def refused(folder: Path, match: str, name: str = "sd1-memorized-wen", **arguments: Any) -> str:
    """The one line of a refused pull, which left nothing behind."""
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=match) as caught:
        pull(name, folder, **arguments)
    assert "\n" not in str(caught.value)
    assert sorted(folder.iterdir()) == before
    return str(caught.value)


def test_another_checksum(tmp_path: Path, serve: Any) -> None:
    line = refused(tmp_path, "nothing was written", url=serve(JSONL), sha256="0" * 64)
    assert sha256(JSONL) in line


def test_an_unknown_checksum_is_told_and_can_be_pinned(tmp_path: Path, serve: Any) -> None:
    line = refused(tmp_path, "its checksum is not known to sd-guard, so nothing was written", url=serve(JSONL))
    pinned = line.rsplit("--sha256 ", 1)[1]
    assert pull("sd1-memorized-wen", tmp_path, url=serve(JSONL), sha256=pinned).is_file()


def test_nothing_is_asked_for_where_the_request_makes_no_sense(tmp_path: Path, serve: Any) -> None:
    url = serve(JSONL)
    refused(tmp_path, "no prompt list is called 'mine'; there are sd1-memorized, ", name="mine", url=url)
    refused(tmp_path, "--sha256 is 'abc'; give 64 hexadecimal digits", url=url, sha256="abc")
    with pytest.raises(ValueError, match="no such folder; make it first"):
        pull("sd1-memorized", tmp_path / "none", url=url)
    (tmp_path / "sd1-memorized-wen.csv").write_text("mine")
    refused(tmp_path, "exists already", url=url, sha256=sha256(JSONL))
    assert (tmp_path / "sd1-memorized-wen.csv").read_text() == "mine"
    assert serve.asked == []


@pytest.mark.parametrize("url", ["http://example.org/list", "file:///etc/passwd", "ftp://127.0.0.1/list", "list.csv"])
def test_addresses_that_are_not_asked(tmp_path: Path, url: str) -> None:
    refused(tmp_path, "is no https address; use one", url=url, sha256="0" * 64)


@pytest.mark.parametrize("url", ["https://[bad", "https://a..b/list"])
def test_addresses_that_are_none(tmp_path: Path, url: str) -> None:
    refused(tmp_path, re.escape(f"{url}: "), url=url, sha256="0" * 64)


def test_redirects(tmp_path: Path, serve: Any) -> None:
    """To this machine or to https; not to a file, nor to plain http elsewhere."""
    path = urlsplit(serve(JSONL)).path
    assert pull("sd1-memorized-wen", tmp_path, url=serve(b"", "/moved", 302, Location=path), sha256=sha256(JSONL))
    (tmp_path / "sd1-memorized-wen.csv").unlink()
    away = serve(b"", "/away", 302, Location="http://example.org/list")
    refused(tmp_path, r"http://example\.org/list: is no https address", url=away, sha256=sha256(JSONL))
    around = serve(b"", "/around", 302, Location="/around")
    refused(tmp_path, "could not be fetched", url=around, sha256=sha256(JSONL))


def test_failures_of_the_network(tmp_path: Path, serve: Any) -> None:
    address = serve(JSONL)
    refused(tmp_path, r"could not be fetched \(HTTP Error 404: Not Found\)", url=f"{address}/none", sha256="0" * 64)
    refused(tmp_path, "could not be fetched", url="http://127.0.0.1:1/list", sha256="0" * 64)
    cut = serve(JSONL, "/cut", Content_Length=str(len(JSONL) + 7))
    refused(tmp_path, f"ended after {len(JSONL)} of {len(JSONL) + 7} bytes|could not be fetched", url=cut)


def test_a_file_too_large(tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_lists, "MAX_BYTES", 1 << 20)
    refused(tmp_path, "is larger than 1 MiB", url=serve(b"x" * ((1 << 20) + 1)), sha256="0" * 64)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("sd1-memorized", b"\xff\xfe"),
        ("sd1-memorized", b"prompt\nx\n"),
        ("sd1-memorized", b";Caption;type\n0;x;XX\n"),
        ("sd1-memorized", b";Caption;URL;type\n0;cut off\n"),
        ("sd1-memorized", b";Caption;type\n"),
        ("sd1-memorized", b""),
        ("sd1-memorized-wen", b"{"),
        ("sd1-memorized-wen", b"[1]\n"),
        ("sd1-memorized-wen", b'{"prompt": "x"}\n'),
        ("sd1-webster", b"PAR1"),
        ("sd1-webster", b"<html>not found</html>"),
    ],
)
def test_a_file_of_another_form(tmp_path: Path, serve: Any, name: str, data: bytes) -> None:
    message = "is not in the form of this list|holds no prompts"
    refused(tmp_path, message, name, url=serve(data), sha256=sha256(data))


def test_the_table() -> None:
    for name, each in PROMPT_LISTS.items():
        assert each.url.startswith("https://")
        assert each.sha256 is None or len(each.sha256) == 64
        assert "\n" not in each.about
        assert name in (Path(__file__).parents[1] / "prompts" / "README.md").read_text()
