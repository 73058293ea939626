"""Near-duplicates join the first of them, and ordinary prompts stay apart."""

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_guard.report.clusters import near_duplicates

REFERENCE = Path(__file__).parents[2] / "prompts" / "reference.csv"


@pytest.mark.parametrize(
    ("first", "second", "joined"),
    [
        ("Living in the Light with Ann Graham Lotz", "living in the light,  with Ann Graham Lotz!", True),
        ("Living in the Light with Ann Graham Lotz", "Living in the Light with Anne Graham Lotz", True),
        ("Living in the Light with Ann Graham Lotz", "Living in the Dark with Ann Graham", False),
        ("a cat on a red mat", "a cat on a blue mat", False),
        ("\uff43\uff41\uff54", "CAT", True),
        ("!!!", "!!!", True),
        ("", "a", False),
    ],
)
def test_small_changes_join(first: str, second: str, joined: bool) -> None:
    assert near_duplicates([first, "something else entirely", second]) == [0, 1, 0 if joined else 2]


def test_chains_of_small_changes_do_not_grow() -> None:
    words = [f"word{i:02d}" for i in range(40)]
    chain = [" ".join(words[i : i + 20]) for i in range(21)]
    leaders = near_duplicates(chain)
    assert leaders[1] == 0
    assert leaders[20] != 0
    assert len(set(leaders)) > 2


@given(st.lists(st.text(max_size=30), max_size=12))
def test_leaders_come_first_and_lead_themselves(prompts: list[str]) -> None:
    leaders = near_duplicates(prompts)
    assert len(leaders) == len(prompts)
    for place, leader in enumerate(leaders):
        assert leader <= place
        assert leaders[leader] == leader


def test_of_the_reference_prompts_only_two_that_differ_by_a_word_join() -> None:
    with REFERENCE.open(newline="") as file:
        prompts = [line["prompt"] for line in csv.DictReader(file)]
    joined = {prompts[i]: prompts[leader] for i, leader in enumerate(near_duplicates(prompts)) if leader != i}
    assert joined == {"a print of a small red star on a yellow wall": "a print of a red star on a yellow wall"}
