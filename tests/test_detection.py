"""From free statistics to a score: who is asked what, by whom that may be decided, and what an answer can change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sd_guard.detection import PrematureDetail, decide, is_settled, verdict_of
from sd_guard.observation import PROBED, Observation, Question, add_probed, mean_agreement

D = 256
DETECTOR = PrematureDetail(threshold=0.4, doubt=0.2, lid_weight=15.0, ordinary_deficit=0.009)
LID, SEED, REST = Question(1, range(0)), Question(0, range(1)), Question(1, range(1, 3))
finite = st.floats(-3.0, 3.0, width=32)
ratios_of_images = st.lists(finite | st.sampled_from([math.nan, math.inf, -math.inf]), min_size=1, max_size=8)


def free(*ratios: Sequence[float]) -> list[Observation]:
    """One observation a step, of the detail that its images' prompts add."""
    return [
        Observation(step, D, {"added_detail": torch.tensor(ratio)}, (0,) * len(ratio))
        for step, ratio in enumerate(ratios)
    ]


def with_lids(seen: Observation, rows: Sequence[int], deficit: Tensor) -> Observation:
    """As if `rows` had been probed: the prompt leaves `deficit` (B,) less of D than the control does."""
    lid = torch.zeros(len(deficit)).index_copy(0, torch.tensor(rows), torch.tensor([100.0] * len(rows)))
    known = (lid > 0) * D * deficit
    values = {**seen.values, "trajectory_lid_control": lid, "trajectory_lid": lid - known}
    return replace(seen, values=values, probed=dict.fromkeys(PROBED[:2], tuple(rows)))


@dataclass
class Prober:
    """Answers with these deficits and agreements (B, K), and remembers who was asked for."""

    deficit: Tensor
    agreement: Tensor | None = None
    asked: list[list[int]] = field(default_factory=list)

    def __call__(self, seen: Observation, rows: Sequence[int], question: Question) -> Observation:
        self.asked.append(list(rows))
        if question.seeds:
            assert self.agreement is not None
            new = self.agreement[list(rows)][:, list(question.seeds)].T
            seen = add_probed(seen, {"excess_agreement": mean_agreement(seen, rows, new, question.seeds)}, rows, 0)
        if question.probes:
            lids = with_lids(seen, rows, self.deficit)
            own = {name: lids.values[name][list(rows)] for name in PROBED[:2]}
            seen = add_probed(seen, own, rows, 0)
        return seen


@pytest.mark.parametrize(
    ("score", "verdict"),
    [(0.5, "pass"), (0.51, "flag"), (-9.0, "pass"), (math.nan, "unscored"), (math.inf, "unscored")],
)
def test_verdicts(score: float, verdict: str) -> None:
    assert verdict_of(score, 0.5) == verdict
    assert verdict_of(-math.inf, 0.5) == "unscored"


def test_the_score_is_the_mean_ratio_and_the_weighted_deficit_of_those_probed() -> None:
    detector = PrematureDetail(lid_weight=10.0, ordinary_deficit=0.01)
    observations = free([0.2, 0.4, 0.6], [0.4, 0.4, 0.2])
    torch.testing.assert_close(detector.score(observations), torch.tensor([0.3, 0.4, 0.4]))
    observations[-1] = with_lids(observations[-1], [2, 0], torch.tensor([0.03, 9.9, -0.02]))
    expected = torch.tensor([0.3 + 10 * 0.02, 0.4, 0.4 - 10 * 0.03])
    torch.testing.assert_close(detector.score(observations), expected, rtol=0, atol=1e-5)


def test_agreement_with_another_seed_moves_those_in_doubt() -> None:
    """Up or down, and not below what makes doubt, where nothing was measured."""
    detector = PrematureDetail(doubt=-0.5, agreement_weight=2.0)
    last = add_probed(
        free([-0.4, -0.1, 0.2, 0.9])[0], {"excess_agreement": torch.tensor([-0.6, -0.1, 0.3])}, [0, 1, 2], 2
    )
    expected = torch.tensor([-0.5, -0.1 - 0.2, 0.2 + 0.6, 0.9])
    torch.testing.assert_close(detector.score([last]), expected, rtol=0, atol=1e-6)


def test_a_further_question_is_asked_where_one_answer_leaves_the_score_undecided() -> None:
    """Of the rest, all seeds count alike, and the LID of those that it was measured of."""
    detector = PrematureDetail(
        doubt=-0.5, undecided=(-0.3, 0.6), agreement_weight=2.0, lid_weight=10.0, ordinary_deficit=0.01
    )
    added = [-0.6, -0.4, 0.0, 0.3, 0.8]
    agreement = torch.tensor([[9.0] * 3, [-0.1, 9.0, 9.0], [0.1, -0.2, 0.4], [-0.1, 0.1, 0.0], [0.2, 9.0, 9.0]])
    prober = Prober(torch.full((5,), 0.03), agreement)
    seen, made = decide(detector, free(added), [SEED, REST], prober)
    assert prober.asked == [[1, 2, 3, 4], [2, 3]]
    assert made == pytest.approx([-0.6, -0.5, 0.0 + 2 * 0.1 + 10 * 0.02, 0.3 + 10 * 0.02, 0.8 + 2 * 0.2], abs=1e-5)
    assert [seen[-1].has("excess_agreement", row) for row in range(5)] == [False, True, True, True, True]
    assert [seen[-1].has("trajectory_lid", row) for row in range(5)] == [False, False, True, True, False]
    _, again = decide(replace(detector, undecided=(0.0, 0.0)), free(added), [SEED, REST], prober)
    assert again == pytest.approx([-0.6, -0.5, 0.2, 0.1, 1.2], abs=1e-5)


@given(st.lists(finite, min_size=1, max_size=6), st.lists(finite, min_size=18, max_size=18), st.permutations(range(6)))
def test_answers_to_one_image_ask_nothing_about_another(added: list[float], say: list[float], order: list[int]) -> None:
    order = [row for row in order if row < len(added)]
    agreement, deficit = torch.tensor(say).reshape(6, 3) / 3, torch.linspace(-0.1, 0.1, 6)
    detector = PrematureDetail(doubt=-0.7, undecided=(-0.3, 0.6))
    _, whole = decide(detector, free(added), [SEED, REST], Prober(deficit, agreement))
    _, moved = decide(
        detector, free([added[row] for row in order]), [SEED, REST], Prober(deficit[order], agreement[order])
    )
    assert moved == pytest.approx([whole[row] for row in order], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"threshold": math.nan}, "threshold=nan is no number"),
        ({"doubt": math.nan}, "doubt=nan is no number"),
        ({"undecided": (0.6, -0.3)}, r"undecided=\(0.6, -0.3\) is no range"),
        ({"undecided": (math.nan, 0.6)}, "is no range: give lowest and highest"),
    ],
)
def test_settings_that_would_ask_or_flag_nothing_unnoticed_are_refused(settings: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PrematureDetail(**settings)


def test_later_looks_raise_scores_and_lower_none() -> None:
    """By what each of them shows; one that is not a number leaves nothing that could be trusted."""
    detector = PrematureDetail(persistence_weight=8.0, persistence_limit=9.0)
    observations = free([0.2, 0.4, -0.6, 0.1])
    looks = [
        Observation(step, 256, {"excess_persistence": torch.tensor(values)}, (0, 0, 0, 0))
        for step, values in ((20, [0.1, 0.0, -0.7, math.nan]), (25, [0.05, -0.1, 0.02, 0.2]))
    ]
    one, two = torch.tensor([0.2 + 8 * 0.1, 0.4, -0.6]), torch.tensor([0.2 + 8 * 0.15, 0.4, -0.6 + 8 * 0.02])
    torch.testing.assert_close(detector.score(observations, looks[:1])[:3], one, rtol=0, atol=1e-5)
    torch.testing.assert_close(detector.score(observations, looks)[:3], two, rtol=0, atol=1e-5)
    assert detector.score(observations, looks)[3].isnan()
    limited = PrematureDetail(persistence_weight=8.0, persistence_limit=1.0).score(observations, looks)
    torch.testing.assert_close(limited[:3], torch.tensor([0.2 + 1.0, 0.4, -0.6 + 8 * 0.02]), rtol=0, atol=1e-5)
    assert limited[3].isnan()
    with pytest.raises(ValueError, match="persistence_limit=nan is negative"):
        PrematureDetail(persistence_limit=math.nan)
    with pytest.raises(ValueError, match="persistence_weight=-1 is negative"):
        PrematureDetail(persistence_weight=-1)


LOOKS = st.lists(st.floats(-2, 1, width=32), min_size=1, max_size=5)


@given(st.floats(-3, 3, width=32), LOOKS, st.floats(-1, 1), st.floats(0, 50), st.floats(0, 2))
def test_what_is_settled_is_never_flagged_by_a_look(
    ratio: float, looks: list[float], threshold: float, weight: float, limit: float
) -> None:
    """And what is not may be: by a picture that is wholly settled, where the weight is enough."""
    detector = PrematureDetail(threshold=threshold, persistence_weight=weight, persistence_limit=limit)
    observations = free([ratio])
    at_once = float(detector.score(observations)[0])

    def after(looks: Sequence[float]) -> float:
        values = [{"excess_persistence": torch.tensor([value])} for value in looks]
        return float(detector.score(observations, [Observation(20, 256, each, (0,)) for each in values])[0])

    if is_settled(detector, at_once):
        assert after(looks) <= threshold
        assert after([1.0] * 5) <= threshold
    elif 5 * weight > limit:
        assert after([1.0] * 5) > threshold - 2e-4


def test_what_no_look_is_needed_of() -> None:
    """What passes by more than looks can add, and what cannot be scored; a flagged image is looked at."""
    detector = PrematureDetail(threshold=0.0, persistence_limit=0.25)
    scores = (-0.3, -0.2, 0.0, 0.1, math.nan, math.inf)
    assert [is_settled(detector, score) for score in scores] == [True, False, False, False, True, True]
    assert is_settled(replace(detector, persistence_weight=0.0), -0.2)
    assert not is_settled(replace(detector, persistence_limit=math.inf), -1e9)
    assert not is_settled(replace(detector, threshold=-math.inf), -1e9)


@given(ratios_of_images, finite)
def test_only_rows_in_doubt_are_probed(ratios: list[float], doubt: float) -> None:
    """One call for all of them, or none; the others keep the score of the free statistics, to the bit."""
    detector = PrematureDetail(doubt=doubt, lid_weight=2.0, ordinary_deficit=0.0)
    observations, deficit = free(ratios), torch.linspace(0.1, 0.2, len(ratios))
    prober = Prober(deficit)
    seen, made = decide(detector, observations, [LID], prober)
    rows = [row for row, ratio in enumerate(ratios) if ratio > doubt and math.isfinite(ratio)]
    assert prober.asked == ([rows] if rows else [])
    assert [row for row in range(len(ratios)) if seen[-1].has("trajectory_lid", row)] == rows
    for row, ratio in enumerate(ratios):
        if row in rows:
            assert made[row] == pytest.approx(ratio + 2.0 * deficit[row].item(), abs=1e-5)
        else:
            assert made[row] == pytest.approx(ratio, abs=0, nan_ok=True)


def test_without_doubt_nothing_is_asked_and_nothing_changes() -> None:
    observations = free([0.0, 0.1], [0.1, -0.9])
    prober = Prober(torch.ones(2))
    seen, made = decide(DETECTOR, observations, [LID], prober)
    assert prober.asked == []
    assert all(one is other for one, other in zip(seen, observations, strict=True))
    assert made == DETECTOR.score(observations).tolist()


def test_without_a_probe_the_free_statistics_decide() -> None:
    observations = free([0.3, 0.5])
    seen, made = decide(DETECTOR, observations, [], Prober(torch.ones(2)))
    assert seen == observations
    assert made == DETECTOR.score(observations).tolist()


def test_only_the_last_observation_is_replaced() -> None:
    observations = free([0.4, 0.1], [0.4, 0.1], [0.4, 0.1])
    seen, _ = decide(DETECTOR, observations, [LID], Prober(torch.zeros(2)))
    assert all(one is other for one, other in zip(seen[:-1], observations[:-1], strict=True))
    assert [each.probed for each in seen] == [{}, {}, dict.fromkeys(PROBED[:2], (0,))]
    assert [each.probed for each in observations] == [{}, {}, {}]


@given(st.lists(ratios_of_images.map(lambda row: row[:1]), min_size=1, max_size=4), finite, finite, st.floats(0, 90))
def test_who_is_in_doubt_depends_on_no_threshold(
    ratios: list[list[float]], threshold: float, deficit: float, weight: float
) -> None:
    """Else a threshold that a calibration moves would change the scores that it was made from."""
    observations, prober = free(*ratios), Prober(torch.tensor([deficit]), torch.tensor([[deficit, 0.0, 0.3]]))
    detector = replace(DETECTOR, lid_weight=weight)
    doubt = detector.in_doubt(observations)
    assert (doubt.dtype, doubt.shape) == (torch.bool, (1,))
    for changes in ({"threshold": threshold}, {"lid_weight": threshold}, {"ordinary_deficit": threshold}):
        assert torch.equal(replace(detector, **changes).in_doubt(observations), doubt)
    (seen, made), (other, again) = (
        decide(replace(detector, threshold=line), observations, [SEED, REST], prober)
        for line in (detector.threshold, threshold)
    )
    assert again == pytest.approx(made, abs=0, nan_ok=True)
    assert bool(seen[-1].probed) == bool(doubt)
    assert seen[-1].probed == other[-1].probed


@given(st.permutations(range(4)), st.integers(1, 4))
def test_no_image_sees_its_batchmates(order: list[int], count: int) -> None:
    ratios, deficit = [[0.3, 0.9, 0.5, math.nan], [0.35, 0.1, 0.3, 0.4]], torch.tensor([0.1, 0.2, -0.3, 0.4])
    rows = list(order[:count])
    _, whole = decide(DETECTOR, free(*ratios), [LID], Prober(deficit))
    part = free(*([step[row] for row in rows] for step in ratios))
    _, made = decide(DETECTOR, part, [LID], Prober(deficit[rows]))
    assert made == pytest.approx([whole[row] for row in rows], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", PROBED)
def test_a_probe_that_is_not_finite_is_never_a_pass(name: str, value: float) -> None:
    """The free statistics alone would pass both images; the neighbour that was probed as well keeps its own score."""

    def spoilt(seen: Observation, rows: Sequence[int], question: Question) -> Observation:
        probed = Prober(torch.zeros(3), torch.full((3, 1), 0.1))(seen, rows, question)
        values = {**probed.values, name: probed.values[name].index_fill(0, torch.tensor([1]), value)}
        return replace(probed, values=values)

    detector, observations = DETECTOR, free([0.0, 0.3, 0.3])
    assert verdict_of(decide(detector, observations, [], spoilt)[1][1], detector.threshold) == "pass"
    _, made = decide(detector, observations, [Question(1, range(1))], spoilt)
    assert [verdict_of(score, detector.threshold) for score in made] == ["pass", "unscored", "flag"]
    expected = 0.3 - detector.lid_weight * detector.ordinary_deficit + 0.1 * detector.agreement_weight
    assert made[2] == pytest.approx(expected, abs=1e-5)
