"""Prompt lists: what is written is read back, and every bad input is one line that names file, place and remedy."""

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_guard.screening import prompts as module
from sd_guard.screening.prompts import (
    MAX_SEED,
    BadRowError,
    PromptRow,
    find_files,
    list_digest,
    read_prompts,
    stream_prompts,
)

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=40)
PROMPT = TEXT.filter(lambda text: text.strip() != "")
FAMILY = st.none() | PROMPT.map(str.strip)
ROWS = st.lists(st.builds(PromptRow, PROMPT, FAMILY, st.none() | st.integers(0, MAX_SEED)), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


def write(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@given(rows=ROWS, bom=st.booleans())
def test_csv_round_trip(shared: Path, rows: list[PromptRow], bom: bool) -> None:
    buffer = io.StringIO()
    table = csv.writer(buffer, quoting=csv.QUOTE_ALL)
    table.writerow(["other", "seed", "prompt", "family"])
    for row in rows:
        table.writerow(["x", "" if row.seed is None else row.seed, row.prompt, row.family or ""])
    data = buffer.getvalue().encode("utf-8-sig" if bom else "utf-8")
    assert read_prompts(write(shared, "p.csv", data)) == rows


@given(rows=ROWS, ascii_only=st.booleans())
def test_jsonl_round_trip(shared: Path, rows: list[PromptRow], ascii_only: bool) -> None:
    lines = [
        json.dumps({"prompt": r.prompt, "family": r.family, "seed": r.seed, "other": [1]}, ensure_ascii=ascii_only)
        for r in rows
    ]
    assert read_prompts(write(shared, "p.jsonl", "\n\n".join(lines))) == rows


@given(prompts=st.lists(PROMPT.map(str.strip), min_size=1, max_size=5), end=st.sampled_from(["\n", "\r\n"]))
def test_txt_round_trip(shared: Path, prompts: list[str], end: str) -> None:
    prompts = [" ".join(prompt.replace("\r", " ").replace("\n", " ").split(" ")) for prompt in prompts]
    path = write(shared, "p.TXT", end.join(["", *prompts, " ", ""]))
    assert read_prompts(path) == [PromptRow(prompt) for prompt in prompts]


@given(rows=ROWS)
def test_parquet_round_trip(shared: Path, rows: list[PromptRow]) -> None:
    columns = {"seed": [r.seed for r in rows], "prompt": [r.prompt for r in rows], "family": [r.family for r in rows]}
    pq.write_table(
        pa.table(columns, pa.schema([("seed", pa.int64()), ("prompt", "string"), ("family", "string")])),
        shared / "p.parquet",
    )
    assert read_prompts(shared / "p.parquet") == rows


@pytest.mark.parametrize("name", ["p.txt.gz", "p.CSV.gz", "p.jsonl.gz"])
def test_a_zipped_list_is_that_list(tmp_path: Path, name: str) -> None:
    content = {"t": "a\nb\n", "C": "prompt\na\nb\n", "j": '{"prompt": "a"}\n{"prompt": "b"}\n'}[name[2]]
    path = write(tmp_path, name, gzip.compress(content.encode()))
    assert read_prompts(path) == [PromptRow("a"), PromptRow("b")]
    plain = write(tmp_path, name.removesuffix(".gz"), content)
    assert list_digest(find_files(path)) == list_digest(find_files(plain))


def test_a_glob_is_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path, "b.txt", "b\n")
    write(tmp_path, "a.csv", "prompt,seed\na,7\n")
    (tmp_path / "c.csv").mkdir()
    files = find_files(str(tmp_path / "*"))
    assert list(stream_prompts(files)) == [PromptRow("a", None, 7), PromptRow("b")]
    assert list_digest(files) != list_digest(files[::-1])
    write(tmp_path, "[x].txt", "x\n")
    assert list(stream_prompts(find_files(tmp_path / "[x].txt"))) == [PromptRow("x")]
    with pytest.raises(ValueError, match="matches no file; check the pattern"):
        find_files(str(tmp_path / "*.jsonl"))


def test_standard_input_needs_a_format_and_can_be_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(b"prompt\na\n")

    module._spool.cache_clear()
    monkeypatch.setattr(module.sys, "stdin", Stdin)
    with pytest.raises(ValueError, match="standard input: its format is not known; name it by --format"):
        find_files("-")
    for _ in range(2):
        assert list(stream_prompts(find_files("-", "csv"))) == [PromptRow("a")]
    module._spool.cache_clear()


def test_bad_rows_are_told_of_and_left_out(tmp_path: Path) -> None:
    """Latin-1 in the middle of UTF-8, an open quote, a comma too many: what is good is still read."""
    data = b'prompt,seed\none,1\ncaf\xe9,2\ntwo,x\n"th"ree,3\nfo,ur,4\nfive,5\n'
    bad: list[BadRowError] = []
    rows = list(stream_prompts(find_files(write(tmp_path, "p.csv", data)), skip=bad.append))
    assert rows == [PromptRow("one", None, 1), PromptRow("five", None, 5)]
    assert [str(each).split(": ")[0].rpartition(", ")[2] for each in bad] == [f"line {n}" for n in (3, 4, 5, 6)]
    lines = b'{"prompt": "one"}\n{"prompt": "caf\xe9"}\nnull\n{"prompt": "two"}\n'
    bad.clear()
    rows = list(stream_prompts(find_files(write(tmp_path, "p.jsonl", lines)), skip=bad.append))
    assert rows == [PromptRow("one"), PromptRow("two")]
    assert len(bad) == 2


def test_a_list_is_read_as_a_stream(tmp_path: Path) -> None:
    """The first rows are there although the file goes wrong later."""
    rows = stream_prompts(find_files(write(tmp_path, "p.jsonl", b'{"prompt": "x"}\n' * 50_000 + b"[")))
    assert next(rows) == PromptRow("x")
    with pytest.raises(BadRowError, match="line 50001"):
        list(rows)


def test_multi_line_csv_field_keeps_line_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", 'prompt,seed\n"two\nlines",1\nx,-3\n')
    with pytest.raises(ValueError, match=r"p\.csv, line 4: seed '-3' is out of range"):
        read_prompts(path)
    path = write(tmp_path, "p.csv", 'prompt,seed\n"two\nlines",1\n')
    assert read_prompts(path) == [PromptRow("two\nlines", None, 1)]


BAD = {
    "empty.txt": (b"", "has no prompts"),
    "blank.txt": (b"\n  \n", "has no prompts"),
    "latin.txt": (b"ok\ncaf\xe9\n", r"latin\.txt, line 2: byte 0xe9 is not UTF-8; save"),
    "bom.txt": (b"\xef\xbb\xbfok\n\xff", r"line 2: byte 0xff"),
    "utf16.csv": ("prompt\nx".encode("utf-16"), "line 1: byte 0xff"),
    "p.xlsx": (b"x", r"unknown extension '\.xlsx'; use \.txt, .* or \.parquet, or name it by --format"),
    "columns.csv": (b"text,seed\nx,1\n", "line 1: needs one column named 'prompt', found 'text, seed'"),
    "twice.csv": (b"prompt,prompt\nx,y\n", "needs one column"),
    "header.csv": (b"prompt\n", "has no prompts"),
    "comma.csv": (b"prompt,seed\na cat, a dog,1\n", "line 2: has 3 fields where the header has 2; put"),
    "quote.csv": (b'prompt\n"open\n', "not valid CSV"),
    "empty.csv": (b"prompt,seed\n ,1\n", "line 2: the prompt is empty"),
    "seed.csv": (b"prompt,seed\nx,1.5\n", r"line 2: seed '1\.5' is no whole number"),
    "negative.jsonl": (b'{"prompt": "x", "seed": -1}', "line 1: seed '-1' is out of range"),
    "large.jsonl": (b'{"prompt": "x", "seed": 9223372036854775808}', "out of range"),
    "bool.jsonl": (b'{"prompt": "x", "seed": true}', "seed 'True' is no whole number"),
    "json.jsonl": (b'{"prompt": "x"}\n{"prompt": ', "line 2: not valid JSON"),
    "deep.jsonl": (b"[" * 100_000, "line 1: not valid JSON"),
    "list.jsonl": (b'["x"]', "line 1: holds a JSON list"),
    "keys.jsonl": (b'{"text": "x"}', "has no key 'prompt', found 'text'"),
    "number.jsonl": (b'{"prompt": 3}', "prompt is a int; write it as text"),
    "cut.csv.gz": (gzip.compress(b"prompt\nx\n")[:-4], "cannot be read"),
    "plain.csv.gz": (b"prompt\nx\n", "cannot be read"),
    "p.parquet": (b"PAR1", r"cannot be read .*is it Parquet"),
    "p.parquet.gz": (b"x", "unknown extension"),
    "surrogate.jsonl": (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_that_names_the_file(tmp_path: Path, name: str) -> None:
    data, message = BAD[name]
    path = write(tmp_path, name, data)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_parquet_without_the_column_or_with_another_type(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="needs one column named 'prompt', found 'text'"):
        read_prompts(tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": ["x", None]}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="row 2: the prompt is empty"):
        read_prompts(tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": [1]}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="row 1: prompt is a int; write it as text"):
        read_prompts(tmp_path / "p.parquet")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.txt: no such file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        read_prompts(tmp_path / "folder.csv")
