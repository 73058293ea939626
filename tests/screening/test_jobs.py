"""The list of jobs: every image of a run in order, read in any part; what repeats is found whatever its length."""

import io
import sqlite3
import unicodedata

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_guard.screening import jobs as module
from sd_guard.screening.jobs import Job, JobList, distinct, expand, fold, write_jobs
from sd_guard.screening.prompts import MAX_SEED, PromptRow


def test_expand_counts_on_from_each_rows_own_seed() -> None:
    jobs = list(expand([PromptRow("a"), PromptRow("b", "f", 7)], seeds=2, seed=3))
    assert [(job.index, job.prompt, job.seed) for job in jobs] == [(0, "a", 3), (1, "a", 4), (2, "b", 7), (3, "b", 8)]
    with pytest.raises(ValueError, match="would exceed"):
        list(expand([PromptRow("a", None, MAX_SEED)], seeds=2, seed=0))


@given(total=st.integers(1, 23), start=st.integers(0, 22), count=st.integers(1, 23))
def test_any_part_of_the_list_can_be_read(total: int, start: int, count: int) -> None:
    jobs = [Job(i, f"prompt {i}\n", None if i % 2 else "f", 2**63 - 1 - i) for i in range(total)]
    sink = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUP", 5)
        assert write_jobs(iter(jobs), sink) == total
        listed = JobList(sink)
        assert len(listed) == total
        wanted = range(min(start, total - 1), min(start + count, total))
        if wanted:
            assert listed.read(wanted) == jobs[wanted.start : wanted.stop]
        assert listed.read(range(total)) == jobs


def test_a_damaged_list_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"jobs\.parquet: is damaged"):
        JobList(io.BytesIO(b"PAR1 nothing"))


def folded(rows: list[PromptRow], *, seeds: int = 1, seed: int = 0) -> tuple[list[PromptRow], list[dict[str, object]]]:
    sink = io.BytesIO()
    return list(distinct(rows, sink, seeds=seeds, seed=seed)), pq.read_table(sink).to_pylist()


def test_rows_that_say_the_same_are_screened_once_and_listed() -> None:
    rows = [
        PromptRow("Café"),
        PromptRow("b"),
        PromptRow("CAFE\u0301", "f"),
        PromptRow("B", None, 0),
        PromptRow("b", None, 5),
    ]
    kept, duplicates = folded(rows, seeds=2)
    assert kept == [rows[0], rows[1], rows[4]]
    assert duplicates == [
        {"index": 0, "prompt": "CAFE\u0301", "family": "f", "seed": 0},
        {"index": 2, "prompt": "B", "family": None, "seed": 0},
    ]


@given(prompts=st.lists(st.sampled_from(["ﬁne", "FINE", "fine", "Straße", "STRASSE", "a", "A", "b"]), max_size=30))
def test_what_is_kept_and_what_is_listed_are_all_rows(prompts: list[str]) -> None:
    kept, duplicates = folded([PromptRow(prompt) for prompt in prompts])
    assert len(kept) + len(duplicates) == len(prompts)
    assert len({fold(row.prompt) for row in kept}) == len(kept)
    for row in duplicates:
        assert fold(kept[int(str(row["index"]))].prompt) == fold(str(row["prompt"]))


@given(text=st.text(st.characters(codec="utf-8"), max_size=20))
def test_folding_knows_neither_unicode_form_nor_case(text: str) -> None:
    assert fold(fold(text)) == fold(text)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert fold(unicodedata.normalize(form, text)) == fold(text)


def test_what_was_seen_is_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = sqlite3.connect

    def connect(name: str) -> sqlite3.Connection:
        opened.append(name)
        return real(name)

    monkeypatch.setattr(module.sqlite3, "connect", connect)
    folded([PromptRow("a"), PromptRow("A")])
    assert opened == [""]
