"""The state machine of one image: its end states, its bounds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_guard.policy import Attempt, Case, Policy


def attempt(*, passed: bool) -> Attempt:
    return Attempt("word_ablation", 1.0, 0, 0.0 if passed else 9.0, 0.1, passed, "a dog")


@pytest.mark.parametrize(
    ("case", "on_failure", "outcome"),
    [
        (Case("pass", 0.1, 100), "blank", "passed"),
        (Case("unscored", math.nan, 100), "keep", "unscored"),
        (Case("pass", math.nan, 100), "blank", "unscored"),  # a score that is none is never a pass
        (Case("flag", math.inf, 100), "blank", "unscored"),
        (Case("flag", 0.9, 100), "blank", "blocked"),
        (Case("flag", 0.9, 100), "raise", "blocked"),
        (Case("flag", 0.9, 100), "keep", "kept"),
        (Case("flag", 0.9, 100, attempts=[attempt(passed=False)]), "blank", "blocked"),
        (Case("flag", 0.9, 100, attempts=[attempt(passed=False), attempt(passed=True)]), "blank", "rescued"),
        (Case("flag", 0.9, 100, attempts=[attempt(passed=True)]), "keep", "rescued"),
    ],
)
def test_outcomes(case: Case, on_failure: str, outcome: str) -> None:
    assert case.outcome(Policy(on_failure=on_failure)) == outcome


@given(
    budget=st.integers(0, 500),
    spent=st.integers(0, 50),
    cost=st.integers(1, 60),
    max_attempts=st.integers(0, 8),
    passes=st.lists(st.booleans(), min_size=30, max_size=30),
)
def test_attempts_end(budget: int, spent: int, cost: int, max_attempts: int, passes: list[bool]) -> None:
    """Whatever is tried: within budget and number, nothing after a pass, and as many as these allow."""
    policy, case = Policy(budget=budget, max_attempts=max_attempts), Case("flag", 1.0, budget, lanes=spent)
    while case.may_attempt(policy, cost):
        case.lanes += cost
        case.close(attempt(passed=passes[len(case.attempts)]))
    affordable = min(max_attempts, max(0, budget - spent) // cost)
    until_pass = passes.index(True) + 1 if True in passes else len(passes)
    assert len(case.attempts) == min(affordable, until_pass)
    assert case.lanes <= max(budget, spent)
    assert case.rescued == (affordable >= until_pass)
    assert case.closed == case.rescued


@pytest.mark.parametrize("verdict", ["pass", "unscored"])
def test_only_flagged_images_are_attempted(verdict: str) -> None:
    assert not Case(verdict, 0.0, 100).may_attempt(Policy(), 1)


def test_nothing_left_to_try() -> None:
    case = Case("flag", 1.0, 100)
    assert case.may_attempt(Policy(), 1)
    case.close()
    assert not case.may_attempt(Policy(), 1)
    assert case.outcome(Policy()) == "blocked"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": -1}, "budget=-1 is negative"),
        ({"max_attempts": -1}, "max_attempts=-1 is negative"),
        ({"on_failure": "shrug"}, "on_failure='shrug' is not one of"),
    ],
)
def test_settings_that_no_run_could_use(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(**options)
