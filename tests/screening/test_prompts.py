"""Prompt lists: what is written is read back, and every bad input is one line that names file, place and remedy."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_guard.screening.prompts import MAX_SEED, PromptRow, read_prompts

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


def test_multi_line_csv_field_keeps_line_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", 'prompt,seed\n"two\nlines",1\nx,-3\n')
    with pytest.raises(ValueError, match=r"p\.csv, line 4: seed '-3' is out of range"):
        read_prompts(path)
    path = write(tmp_path, "p.csv", 'prompt,seed\n"two\nlines",1\n')
    assert read_prompts(path) == [PromptRow("two\nlines", None, 1)]


BAD = {
    "empty.txt": (b"", "has no prompts"),
    "blank.txt": (b"\n  \n", "has no prompts"),
    "latin.txt": (b"ok\ncaf\xe9\n", r"latin\.txt, line 2: byte 0xe9 at offset 6 is not UTF-8; save"),
    "bom.txt": (b"\xef\xbb\xbfok\n\xff", r"line 2: byte 0xff at offset 6"),
    "utf16.csv": ("prompt\nx".encode("utf-16"), "line 1: byte 0xff at offset 0"),
    "p.xlsx": (b"x", r"unknown extension '\.xlsx'; use one of \.txt"),
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


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.txt: no such file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        read_prompts(tmp_path / "folder.csv")
