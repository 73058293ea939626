"""Guard settings survive the way through JSON, or do not leave at all."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_guard.detection import PrematureDetail
from sd_guard.guard import Guard
from sd_guard.mitigation import MITIGATIONS, DelayedGuidance, EmbeddingNoise, WordAblation
from sd_guard.noise import EarlySteps
from sd_guard.policy import Policy
from sd_guard.settings import guard_from_json, guard_to_json

shares = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4, unique=True)
mitigations = st.one_of(
    st.builds(WordAblation, max_words=st.integers(1, 6), widen=st.booleans()),
    st.builds(EmbeddingNoise, strengths=st.lists(st.floats(0.1, 9), min_size=1, max_size=3).map(tuple)),
    st.builds(DelayedGuidance, until=st.lists(st.floats(0.01, 1), min_size=1, max_size=3).map(tuple)),
)


@given(
    observed=shares,
    probes=st.integers(0, 5),
    other_seeds=st.integers(0, 5),
    detector=st.builds(
        PrematureDetail,
        threshold=st.floats(allow_nan=False),
        doubt=st.floats(allow_nan=False),
        undecided=st.lists(st.floats(allow_nan=False), min_size=2, max_size=2).map(sorted).map(tuple),
        lid_weight=st.floats(0, 90),
        ordinary_deficit=st.floats(-1, 1),
    ),
    plan=st.lists(mitigations, max_size=4),
    policy=st.builds(
        Policy,
        budget=st.none() | st.integers(0, 999),
        max_attempts=st.integers(0, 9),
        margin=st.floats(0, 9),
        max_resemblance=st.floats(0, 1, exclude_min=True),
        on_failure=st.sampled_from(["blank", "keep", "raise"]),
    ),
    seed=st.integers(0, 2**40),
)
def test_round_trip(
    observed: list[float],
    probes: int,
    other_seeds: int,
    detector: PrematureDetail,
    plan: list,
    policy: Policy,
    seed: int,
) -> None:
    guard = Guard(
        observe_at=tuple(observed),
        probes=probes,
        other_seeds=other_seeds,
        detector=detector,
        plan=tuple(plan),
        policy=policy,
        seed=seed,
    )
    assert guard_from_json(guard_to_json(guard)) == guard


def test_default_round_trip() -> None:
    assert guard_from_json(guard_to_json(Guard())) == Guard()


def test_every_mitigation_is_saved_by_its_name() -> None:
    plan = tuple(kind() for kind in MITIGATIONS.values())
    content = json.loads(guard_to_json(Guard(plan=plan)))
    assert [item["name"] for item in content["plan"]] == list(MITIGATIONS)


def test_what_is_not_registered_cannot_be_saved() -> None:
    @dataclass(frozen=True)
    class Mine:
        pass

    with pytest.raises(ValueError, match=r"Mine is not among word_ablation, .* cannot be saved"):
        guard_to_json(Guard(plan=(Mine(),)))


def without(name: str) -> str:
    return json.dumps({key: value for key, value in json.loads(guard_to_json(Guard())).items() if key != name})


def changed(**values: object) -> str:
    return json.dumps(json.loads(guard_to_json(Guard())) | values)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{}",
        without("policy"),
        without("detector"),
        changed(colour="red"),
        changed(probes=-1),
        changed(observe_at=[1.5]),
        changed(observe_at=[]),
        changed(observe_at=None),
        changed(probe_at=[0.1]),
        changed(detector={"name": "oracle"}),
        changed(plan=[{"name": "word_ablation", "colour": 1}]),
        changed(policy={"budget": -4}),
        changed(policy={"max_resemblance": 0.0}),
    ],
)
def test_what_is_no_guard_settings(text: str) -> None:
    with pytest.raises(ValueError, match=r"guard\.json does not hold guard settings") as caught:
        guard_from_json(text)
    assert "\n" not in str(caught.value)


def test_shares_may_be_any_real_numbers_in_a_list() -> None:
    assert Guard(observe_at=[np.float32(0.25)], look_again_at=[]).steps(100) == [25]  # type: ignore[arg-type]


@given(shares, shares, st.integers(1, 200), st.data())
def test_no_step_is_before_the_first_clear_one(
    observed: list[float], later: list[float], count: int, data: st.DataObject
) -> None:
    """All are on the schedule; with all of it clear they are as ever."""
    clear = data.draw(st.integers(0, count - 1))
    guard = Guard(observe_at=tuple(observed), look_again_at=tuple(later))
    early = EarlySteps(clear, count)
    steps, again = guard.steps(count, early), guard.later_steps(count, early)
    assert clear <= steps[0] and guard.last_step(count, early) < count
    assert [*steps, *again] == sorted({*steps, *again})
    if clear <= guard.steps(count)[0]:
        assert (steps, again) == (guard.steps(count), guard.later_steps(count))
    else:
        assert steps[0] - clear <= 1  # no later than it has to be


@given(shares, st.integers(1, 200), st.data())
def test_a_share_means_no_later_step_than_it_says_once_the_noise_is_low(
    observed: list[float], count: int, data: st.DataObject
) -> None:
    stop = data.draw(st.integers(1, count))
    guard, early = Guard(observe_at=tuple(observed), look_again_at=()), EarlySteps(0, stop)
    anywhere, steps = guard.steps(count), guard.steps(count, early)
    assert [step for step in anywhere if step < stop] == [step for step in anywhere if step in steps and step < stop]
    assert all(step - 1 >= stop or step < stop or step <= max(observed) * count + 1e-6 for step in steps)
    assert guard.steps(count, EarlySteps(0, count)) == anywhere


def test_a_short_schedule_is_judged_by_its_first_step() -> None:
    """One step of ten goes as far as five of fifty, after which the model sees the picture without the prompt, too."""
    guard = Guard()
    assert [guard.steps(count, EarlySteps(0, 1)) for count in (1, 4, 9, 10, 16)] == [[0]] * 5
    assert guard.steps(10) == [0, 1]  # with noise enough
    assert guard.steps(50, EarlySteps(0, 5)) == guard.steps(50) == [1, 2, 3]
    assert guard.steps(50, EarlySteps(0, 1)) == [1, 2, 3]  # which no rounding has made late
    assert guard.steps(50, EarlySteps(11, 13)) == [11, 12]
    assert Guard(observe_at=(0.5,)).steps(10, EarlySteps(0, 1)) == [5]  # as it was asked for
    assert guard.steps(19, EarlySteps(0, 1, 2)) == [0]  # two evaluations a step, as Heun's


@given(shares, st.integers(1, 1000))
def test_steps_are_on_the_schedule(observed: list[float], count: int) -> None:
    """Ascending, none twice, each as near its share as a step can be, and none more than there are shares."""
    steps = Guard(observe_at=tuple(observed)).steps(count)
    assert steps == sorted(set(steps))
    assert len(steps) <= len(observed)
    assert 0 <= steps[0] <= steps[-1] < count
    assert all(min(abs(step - share * count) for step in steps) <= 1 for share in observed)
    assert abs(steps[-1] - max(observed) * count) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observe_at": ()}, r"observe_at=\(\) must hold shares"),
        ({"observe_at": (0.1, 1.0)}, r"observe_at=\(0\.1, 1\.0\) must hold shares of the schedule in \[0, 1\)"),
        ({"observe_at": (-0.1,)}, "must hold shares"),
        ({"look_again_at": (0.5, 1.0)}, r"look_again_at=\(0\.5, 1\.0\) must hold shares .*decides once"),
        ({"look_again_at": 0.5}, r"look_again_at=0\.5 must hold shares"),
        ({"look_again_at": None}, r"look_again_at=None must hold shares"),
        ({"observe_at": (float("nan"),)}, "must hold shares"),
        ({"probes": -1}, "probes=-1 is negative; 0 measures no LID"),
        ({"other_seeds": -1}, "other_seeds=-1 is negative; 0 compares with none"),
    ],
)
def test_settings_that_no_run_could_use(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Guard(**options)
    assert "\n" not in str(caught.value)
