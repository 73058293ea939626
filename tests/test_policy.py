"""The state machine of one image: its end states, its bounds."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_guard.policy import Attempt, Case, Policy


def attempt(*, passed: bool) -> Attempt:
    return Attempt("word_ablation", 1.0, 0, 0.0 if passed else 9.0, 0.1, passed, "a dog")


@pytest.mark.parametrize(
    ("case", "on_failure", "outcome"),
    [
        (Case("pass", 0.1, 3, 100), "blank", "passed"),
        (Case("unscored", math.nan, 3, 100), "keep", "unscored"),
        (Case("pass", math.nan, 3, 100), "blank", "unscored"),  # a score that is none is never a pass
        (Case("flag", math.inf, 3, 100), "blank", "unscored"),
        (Case("flag", 0.9, 3, 100), "blank", "blocked"),
        (Case("flag", 0.9, 3, 100), "raise", "blocked"),
        (Case("flag", 0.9, 3, 100), "keep", "kept"),
        (Case("flag", 0.9, 3, 100, attempts=[attempt(passed=False)]), "blank", "blocked"),
        (Case("flag", 0.9, 3, 100, attempts=[attempt(passed=False), attempt(passed=True)]), "blank", "rescued"),
        (Case("flag", 0.9, 3, 100, attempts=[attempt(passed=True)]), "keep", "rescued"),
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
    policy, case = Policy(budget=budget, max_attempts=max_attempts), Case("flag", 1.0, 3, budget, lanes=spent)
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
    assert not Case(verdict, 0.0, 3, 100).may_attempt(Policy(), 1)


def test_nothing_left_to_try() -> None:
    case = Case("flag", 1.0, 3, 100)
    assert case.may_attempt(Policy(), 1)
    case.close()
    assert not case.may_attempt(Policy(), 1)
    assert case.outcome(Policy()) == "blocked"


numbers, cosines = st.floats(-9.0, 9.0), st.floats(-1.0, 1.0)
policies = st.builds(Policy, margin=st.floats(0.0, 3.0), max_resemblance=st.floats(0.01, 1.0))


@given(policies, numbers, numbers, numbers, cosines, cosines)
def test_less_of_either_evidence_is_never_worse(
    policy: Policy, threshold: float, score: float, other: float, near: float, nearer: float
) -> None:
    """Where a trajectory is accepted, so is one that scores less, one that resembles less, and under a higher line."""
    low, high = sorted((score, other))
    far, close = sorted((near, nearer))
    if policy.accepts(high, threshold, close):
        assert policy.accepts(low, threshold, close)
        assert policy.accepts(high, threshold, far)
        assert policy.accepts(low, threshold, far)
        assert policy.accepts(high, threshold + 1.0, close)


@given(policies, numbers)
def test_the_bar_moves_from_above_the_threshold_to_below_it(policy: Policy, threshold: float) -> None:
    """By the margin: above where nothing is left of the picture, below where as much is left as may be."""
    for resemblance, bar in (
        (0.0, threshold + policy.margin),
        (-0.7, threshold + policy.margin),  # opposed edges are no copy either
        (policy.max_resemblance, threshold - policy.margin),
    ):
        assert policy.accepts(bar, threshold, resemblance)
        assert not policy.accepts(math.nextafter(bar, math.inf), threshold, resemblance)
    half = policy.max_resemblance / 2
    assert policy.accepts(threshold - 1e-6, threshold, half)
    assert not policy.accepts(threshold + 1e-6, threshold, half)


@given(policies, numbers, st.floats(0.0, 1.0, exclude_min=True))
def test_the_picture_itself_is_refused_whatever_it_scores(policy: Policy, threshold: float, share: float) -> None:
    beyond = policy.max_resemblance + share * (1 - policy.max_resemblance)
    if beyond > policy.max_resemblance:
        assert not policy.accepts(-1e9, threshold, beyond)
        assert not policy.accepts(-1e9, math.inf, beyond)


@given(policies, numbers)
def test_what_is_not_finite_is_refused(policy: Policy, threshold: float) -> None:
    """Whatever a verdict would call unscored is no pass of a resumed trajectory either."""
    for score in (math.nan, math.inf, -math.inf):
        assert not policy.accepts(score, threshold, 0.0)
    assert not policy.accepts(-9.0, threshold, math.nan)
    assert not policy.accepts(math.nan, threshold, math.nan)


anything = st.floats() | numbers


@given(policies, numbers, st.tuples(anything, cosines), st.tuples(anything, cosines))
def test_what_is_accepted_is_nearer_to_it_than_what_is_not(
    policy: Policy, threshold: float, one: tuple[float, float], other: tuple[float, float]
) -> None:
    if policy.accepts(one[0], threshold, one[1]) and not policy.accepts(other[0], threshold, other[1]):
        assert policy.excess(one[0], threshold, one[1]) < policy.excess(other[0], threshold, other[1])


def test_the_order_of_what_failed() -> None:
    """By how far the score is above its bar; then by what is too much of that picture; then what is no number."""
    policy = Policy(margin=0.2, max_resemblance=0.6)
    order = [(1.0, 0.0), (0.9, 0.3), (1.2, 0.0), (1.0, 0.6), (0.3, 0.61), (9.0, 0.7), (0.0, 0.99), (math.nan, 0.0)]
    assert sorted(reversed(order), key=lambda each: policy.excess(each[0], 0.5, each[1])) == order
    assert not any(policy.accepts(score, 0.5, near) for score, near in order)
    assert policy.excess(0.0, 0.5, math.nan) == policy.excess(math.inf, 0.5, 0.0) == (True, math.inf)


@given(numbers, numbers, st.floats(0.0, 1.0))
def test_without_a_margin_the_threshold_decides(score: float, threshold: float, resemblance: float) -> None:
    policy = Policy(margin=0.0, max_resemblance=1.0)
    assert policy.accepts(score, threshold, resemblance) == (score <= threshold)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": -1}, "budget=-1 is negative"),
        ({"max_attempts": -1}, "max_attempts=-1 is negative"),
        ({"margin": -0.1}, "margin=-0.1 is negative"),
        ({"margin": math.nan}, "margin=nan is negative"),
        ({"max_resemblance": 0.0}, "max_resemblance=0.0 is not above 0"),
        ({"max_resemblance": -0.5}, "max_resemblance=-0.5 is not above 0"),
        ({"max_resemblance": 1.1}, "max_resemblance=1.1 is not above 0 and up to 1"),
        ({"max_resemblance": math.nan}, "max_resemblance=nan"),
        ({"on_failure": "shrug"}, "on_failure='shrug' is not one of"),
    ],
)
def test_settings_that_no_run_could_use(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(**options)


@pytest.mark.parametrize(("share", "bar"), [(0.0, 0.75), (0.2, 0.72), (0.5, 0.675), (1.0, 0.6)])
def test_a_rescue_may_look_like_the_flagged_picture_early_on(share: float, bar: float) -> None:
    policy = Policy(max_resemblance=0.6)
    assert not policy.may_relapse(bar - 1e-6, share)
    assert policy.may_relapse(bar + 1e-6, share)
    assert policy.may_relapse(math.nan, share)  # what could not be measured proves nothing


def test_a_case_keeps_one_of_two_attempts() -> None:
    first, second = attempt(passed=True), replace(attempt(passed=True), resemblance=0.3)
    case = Case("flag", 1.0, 3, 100, attempts=[first, second])
    case.prefer(second, first)
    assert (case.rescued, case.closed) == (True, True)
    assert case.attempts == [replace(first, passed=False), second]
    case.prefer(first, second)
    assert case.attempts == [replace(second, passed=False), first]


def test_a_case_says_which_attempt_is_in_the_place_of_the_flagged_image() -> None:
    first, second = attempt(passed=False), replace(attempt(passed=False), score=2.0)
    case = Case("flag", 1.0, 3, 100, attempts=[first, second])
    case.place()
    assert case.attempts == [first, replace(second, kept=True)]
    case.keep(first, 8.0, 0.3)
    assert case.told(Policy(on_failure="keep"))[-1] == replace(second, kept=True)  # until the other is in its place
    case.place()
    kept = (second, replace(first, kept=True, score=8.0, resemblance=0.3))
    assert (case.told(Policy(on_failure="keep")), case.rescued) == (kept, False)
    assert case.outcome(Policy(on_failure="keep")) == "kept"
    assert [each.kept for each in case.told(Policy())] == [False, False]  # the image is black


@pytest.mark.parametrize(("lanes", "attempts", "affords"), [(60, 0, True), (61, 0, False), (0, 3, True), (0, 4, False)])
def test_what_an_image_affords(lanes: int, attempts: int, affords: bool) -> None:
    case = Case("flag", 1.0, 3, 100, lanes=lanes, attempts=[attempt(passed=True)] * attempts, closed=True)
    assert case.affords(Policy(), 40) is affords
    assert not case.may_attempt(Policy(), 40)
