"""Mitigations of the text: what they find, in which order, and at what price."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import byte_tokenizer, subject_of
from torch import Tensor

from sd_guard.mitigation import EmbeddingNoise, RandomTokens, Subject, WordAblation
from sd_guard.mitigation.prompt import split_words

WIDTH = 4


PICTURE, BLUR = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


class World:
    """A model that knows which words carry a memory: a prompt gives as much of the picture as it is suspicious.

    Embeddings are numbers of prompts; -1 is no prompt, -2 the flagged one.
    """

    def __init__(self, suspicion: Callable[[list[str]], float], budget: int = 10_000) -> None:
        self.suspicion, self.left, self.calls, self.prompts = suspicion, budget, 0, []
        self.flagged = ""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        self.prompts += prompts
        first = len(self.prompts) - len(prompts)
        return torch.arange(first, first + len(prompts)).float()[:, None, None].expand(-1, 1, WIDTH)

    def predict(self, embeds: Tensor) -> Tensor:
        self.left -= len(embeds)
        self.calls += 1
        numbers = [int(e[0, 0]) for e in embeds]
        texts = [{-1: "", -2: self.flagged}.get(number) or self.prompts[number] for number in numbers if number != -1]
        pictures = iter([self.suspicion(text.split()) for text in texts])
        return torch.cat([0.1 * BLUR + (0.0 if number == -1 else next(pictures)) * PICTURE for number in numbers])

    def subject(self, prompt: str | None, seed: int = 0) -> Subject:
        self.flagged = prompt or ""
        embeds = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(9))
        embeds[0, 0] = -2.0
        return subject_of(
            prompt,
            prompt_embeds=embeds,
            empty_embeds=torch.full((1, WIDTH), -1.0),
            seed=seed,
            encode=self.encode,
            predict=self.predict,
            lanes_left=lambda: self.left,
        )


def planted(*words: str) -> Callable[[list[str]], float]:
    """1 while any of the words is there."""
    return lambda prompt: float(bool(set(words) & set(prompt)))


words = st.lists(st.sampled_from("abcdefghijk"), min_size=2, max_size=9, unique=True)


@given(words, st.data())
def test_finds_the_planted_word(prompt: list[str], data: st.DataObject) -> None:
    word = data.draw(st.sampled_from(prompt))
    world = World(planted(word))
    first = next(WordAblation().propose(world.subject(" ".join(prompt))))
    assert first.prompt == " ".join(w for w in prompt if w != word)
    assert (first.mitigation, first.strength) == ("word_ablation", 1.0)
    assert world.prompts[int(first.prompt_embeds[0, 0])] == first.prompt


def test_finds_a_phrase_each_word_of_which_carries_the_memory() -> None:
    """No shorter span helps, and nothing else is removed."""
    world = World(planted("by", "zyx", "qwv"))
    first = next(WordAblation().propose(world.subject("a red house by zyx qwv at night")))
    assert (first.prompt, first.strength) == ("a red house at night", 3.0)


def test_of_removals_that_do_the_same_the_one_of_fewest_words_goes_first() -> None:
    world = World(planted("b"))
    changes = list(WordAblation(max_words=3).propose(world.subject("a b c d")))
    assert changes[0].prompt == "a c d"
    helped = ["b" not in change.prompt.split() for change in changes]
    assert helped == sorted(helped, reverse=True)
    strengths = [change.strength for change, good in zip(changes, helped, strict=True) if good]
    assert strengths == sorted(strengths)


def test_a_word_is_worth_a_little_of_the_picture() -> None:
    """Without b a tenth of the picture is left, without c, too, nothing: then c goes only if it comes for free."""
    world = World(lambda prompt: {("a", "c"): 0.0, ("a", "b"): 0.01}.get(tuple(prompt), 1.0))
    assert next(WordAblation(max_words=1).propose(world.subject("a b c"))).prompt == "a c"
    world = World(lambda prompt: 0.0 if prompt == ["a"] else 0.01 if prompt == ["a", "c"] else 1.0)
    dear, free = (WordAblation(word_cost=cost, detail_cost=0.0, colour_slack=-1.0) for cost in (0.5, 0.0))
    assert next(dear.propose(world.subject("a b c"))).prompt == "a c"
    assert next(free.propose(world.subject("a b c"))).prompt == "a"


@pytest.mark.parametrize(
    ("mitigation", "changes", "message"),
    [
        (WordAblation, {"max_words": 0}, "max_words=0 removes nothing"),
        (WordAblation, {"max_resemblance": float("nan")}, "max_resemblance=nan is passed by nothing"),
        (EmbeddingNoise, {"strengths": ()}, r"strengths=\(\) must hold numbers above 0"),
        (EmbeddingNoise, {"strengths": (1.5, -1.0)}, r"strengths=\(1.5, -1.0\) must hold"),
        (EmbeddingNoise, {"strengths": (float("nan"),)}, r"strengths=\(nan,\) must hold"),
    ],
)
def test_settings_that_could_do_nothing_are_refused(
    mitigation: type[WordAblation | EmbeddingNoise], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mitigation(**changes)


def test_the_second_of_two_names_goes_too() -> None:
    """One of them is enough to find the memory again at lower noise, when it is too late."""
    shown = {2: 1.0, 1: 0.02, 0: 0.0}
    world = World(lambda prompt: shown[len({"zyx", "qwv"} & {*prompt})])
    assert next(WordAblation().propose(world.subject("a red house zyx qwv"))).prompt == "a red house"
    alone = next(WordAblation(colour_slack=-1.0).propose(world.subject("a red house zyx qwv")))
    assert (alone.strength, len({"zyx", "qwv"} & {*(alone.prompt or "").split()})) == (1.0, 1)


def test_words_around_stay_where_the_colours_would_go() -> None:
    """Of the two names, the second says the colour, too."""
    world = World(lambda prompt: {2: 1.0, 1: 0.02, 0: 0.0}[len({"zyx", "red"} & {*prompt})])

    def predict(embeds: Tensor) -> Tensor:
        texts = [world.prompts[int(e[0, 0])].split() if e[0, 0] >= 0 else ["red"] for e in embeds]
        colour = torch.tensor([float("red" not in text) for text in texts]).reshape(-1, 1, 1, 1)
        return World.predict(world, embeds) + colour

    subject = replace(world.subject("a house of zyx red"), predict=predict)
    assert next(WordAblation().propose(subject)).prompt == "a house of red"


@pytest.mark.parametrize(("share", "asked"), [(0.05, True), (0.01, False)])
def test_longer_phrases_are_asked_about_where_too_much_is_left(share: float, asked: bool) -> None:
    """Of the picture without red: half of its edges are more than ordinary, a tenth is not."""

    def suspicion(prompt: list[str]) -> float:
        return 0.0 if not {*"pqrst"} & {*prompt} else 1.0 if "red" in prompt else share

    changes = WordAblation().propose(World(suspicion).subject("a red c d p q r s t"))
    proposed = [change.prompt for change in changes]
    assert "a c d p q r s t" in proposed
    assert ("a red c d" in proposed) == asked


def test_words_that_say_something_are_kept() -> None:
    """Without red or without zyx, the picture is gone alike; without red the colour is another, too."""
    world = World(planted("red", "zyx", "none"))
    without, picture = world.predict, world.subject("a red house by zyx")

    def predict(embeds: Tensor) -> Tensor:
        texts = [world.prompts[int(e[0, 0])].split() if e[0, 0] >= 0 else ["red"] for e in embeds]
        gone = torch.tensor([not {"red", "zyx"} <= {*text} and text != ["red"] for text in texts]).float()
        colour = torch.tensor([float("red" not in text) for text in texts])
        kept = without(embeds) * (1 - gone).reshape(-1, 1, 1, 1) + 0.1 * BLUR * gone.reshape(-1, 1, 1, 1)
        return kept + colour.reshape(-1, 1, 1, 1)

    subject = replace(picture, predict=predict)
    assert next(WordAblation(max_words=1).propose(subject)).prompt == "a red house by"
    assert next(WordAblation(max_words=1, colour_cost=-1.0).propose(subject)).prompt == "a house by zyx"


def test_neighbours_are_found_at_half_the_runs() -> None:
    """The first question has only every other run; all of them are asked for where none of those is enough."""
    prompt = "a b c d e f g h i j"
    world = World(lambda rest: float("f" in rest or "g" in rest))
    assert next(WordAblation().propose(world.subject(prompt))).prompt == "a b c d e h i j"
    assert (world.calls, 10_000 - world.left) == (3, 2 + 5 + 5)  # two predictions, runs, and the shorter in the best
    world = World(lambda rest: float(bool({"f", "g", "h"} & {*rest})))
    assert next(WordAblation().propose(world.subject(prompt))).prompt == "a b c d e i j"
    assert (world.calls, 10_000 - world.left) == (4, 2 + 8 + 5)


def test_a_question_is_asked_once() -> None:
    """A wider search goes on from what a narrower one has found out of the same image."""
    phrase = "e f g h i".split()
    world = World(lambda rest: float(bool({*phrase} & {*rest})))
    subject = world.subject("a b c d e f g h i j")
    assert list(WordAblation(widen=False).propose(subject)) == []
    narrow = 10_000 - world.left
    assert next(WordAblation().propose(subject)).prompt is not None
    both, world.left = 10_000 - world.left, 10_000
    asked = world.prompts[:-1]  # the last is the one that was proposed
    assert len(asked) == len({*asked}) == both - 2
    assert next(WordAblation().propose(world.subject("a b c d e f g h i j"))).prompt is not None
    assert narrow < 10_000 - world.left == both


def test_a_second_search_that_cannot_be_afforded_proposes_nothing() -> None:
    world = World(lambda rest: 1.0)
    subject = world.subject("a b c d e f g h i j")
    assert list(WordAblation(max_words=3, widen=False).propose(subject)) == []
    world.left = 1
    assert list(WordAblation(max_words=5).propose(subject)) == []
    assert world.left == 1


def test_what_leaves_the_picture_is_not_proposed() -> None:
    world = World(planted("b"))
    changes = list(WordAblation(max_words=1).propose(world.subject("a b c d")))
    assert [change.prompt for change in changes] == ["a c d"]
    assert list(WordAblation(widen=False).propose(World(lambda prompt: 1.0).subject("a b c d"))) == []


def test_another_memory_in_the_place_of_the_flagged_one_is_none_the_better() -> None:
    """Without red another finished picture is predicted, without zyx none: only the latter is proposed."""
    world = World(planted("zyx"))
    other = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))

    def predict(embeds: Tensor) -> Tensor:
        texts = [world.prompts[int(e[0, 0])].split() if e[0, 0] >= 0 else ["red"] for e in embeds]
        swapped = torch.tensor([float("red" not in text and "zyx" in text) for text in texts]).reshape(-1, 1, 1, 1)
        return swapped * other + (1 - swapped) * World.predict(world, embeds)

    subject = replace(world.subject("a red house by zyx"), predict=predict)
    changes = list(WordAblation(max_words=1).propose(subject))
    assert [change.prompt for change in changes] == ["a red house by"]
    blind = list(WordAblation(max_words=1, detail_cost=0.0, max_detail=10.0).propose(subject))
    assert {change.prompt for change in blind} == {"a red house by", "a house by zyx"}


def test_two_places_that_both_carry_it_are_left_out_together() -> None:
    """No run of words is enough; the best of them with another one is."""
    world = World(planted("b", "h"))
    first = next(WordAblation(max_words=2).propose(world.subject("a b c d e f g h i")))
    assert not {"b", "h"} & set(first.prompt.split())
    assert first.strength <= 4.0


def test_a_phrase_longer_than_a_run_is_left_out_whole() -> None:
    phrase = ["p", "q", "r", "s", "t"]
    world = World(planted(*phrase))
    first = next(WordAblation().propose(world.subject("a b c p q r s t d e")))
    assert not set(phrase) & set(first.prompt.split())
    assert first.strength <= 6.0


@pytest.mark.parametrize("prompt", [None, "", " ", "one"])
def test_nothing_to_leave_out(prompt: str | None) -> None:
    world = World(planted("one"))
    assert list(WordAblation().propose(world.subject(prompt))) == []
    assert world.calls == 0


@pytest.mark.parametrize("count", [25, 77, 500])
def test_long_prompts_are_bounded_in_lanes(count: int) -> None:
    prompt = [f"w{i}" for i in range(count)]
    world = World(planted(prompt[count // 2]))
    changes = list(WordAblation().propose(world.subject(" ".join(prompt))))
    left = changes[0].prompt.split()
    assert prompt[count // 2] not in left
    assert len(left) >= count - -(-count // 24)
    assert changes[0].strength == count - len(left)
    assert 10_000 - world.left <= 2 + 22 + 2 * (3 + 2)


@given(st.integers(0, 60), words)
def test_the_budget_is_kept(budget: int, prompt: list[str]) -> None:
    """Lanes are asked for before they are spent, the control's included."""
    world = World(lambda rest: 1.0, budget)
    list(WordAblation().propose(world.subject(" ".join(prompt))))
    assert world.left >= 0
    width = min(3, len(prompt) - 1)
    runs, shift = len(prompt) - width + 1, max(width - 1, 1)
    first = 1 + -(-(runs - 1) // shift)  # every other run, and the last
    assert bool(world.calls) == (budget >= first + 2)


def test_lanes_are_spent_only_as_they_are_asked_for() -> None:
    world = World(planted("b"))
    proposals = WordAblation().propose(world.subject("a b c d"))
    assert world.calls == 0
    assert next(proposals).prompt == "a c d"
    assert world.calls == 3  # the whole prompt and none, runs of words, shorter ones


@given(st.lists(st.text("abc", min_size=1, max_size=3), max_size=100))
def test_pieces_hold_every_word(prompt: list[str]) -> None:
    pieces = split_words(" ".join(prompt))
    assert " ".join(pieces).split() == prompt
    assert len(pieces) <= 24


def test_embedding_noise_depends_on_the_seed_only() -> None:
    world = World(planted("a"))
    noise = EmbeddingNoise(strengths=(1.0, 2.0))
    first = list(noise.propose(world.subject("a b", seed=3)))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = list(noise.propose(world.subject("something else", seed=3)))
    assert torch.equal(torch.get_rng_state(), state)
    other = list(noise.propose(world.subject("a b", seed=4)))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.prompt_embeds, b.prompt_embeds)
        assert not torch.equal(a.prompt_embeds, c.prompt_embeds)
    assert world.calls == 0
    assert [change.prompt for change in first] == [None, None]


@given(st.floats(0.1, 10.0), st.floats(0.01, 100.0))
def test_embedding_noise_has_the_strength_it_says(strength: float, scale: float) -> None:
    """In units of the embedding's own deviation, whatever that is."""
    embeds = scale * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    (change,) = EmbeddingNoise(strengths=(strength,)).propose(subject_of(prompt_embeds=embeds))
    moved = (change.prompt_embeds - embeds).std() / embeds.std()
    assert float(moved) == pytest.approx(strength, rel=0.05)
    assert change.strength == strength


def test_embedding_noise_keeps_the_dtype() -> None:
    subject = World(planted()).subject("a")
    half = replace(subject, prompt_embeds=subject.prompt_embeds.bfloat16())
    (change,) = EmbeddingNoise(strengths=(1.0,)).propose(half)
    assert change.prompt_embeds.dtype == torch.bfloat16
    assert torch.isfinite(change.prompt_embeds).all()


TOKENIZER = byte_tokenizer()


def random_prompts(how: str, prompt: str | None = "one two three", seed: int = 0, **settings: object) -> list[str]:
    world = World(planted())
    subject = replace(world.subject(prompt, seed), tokenizer=TOKENIZER)
    changes = list(RandomTokens(how=how, **settings).propose(subject))
    assert [world.prompts[int(change.prompt_embeds[0, 0])] for change in changes] == [c.prompt for c in changes]
    assert [change.strength for change in changes] == list(settings.get("counts", (2, 4)) if changes else ())
    assert world.calls == 0
    return [change.prompt for change in changes]


def without_one(longer: list[str]) -> list[list[str]]:
    return [longer[:i] + longer[i + 1 :] for i in range(len(longer))]


@given(st.integers(0, 2**63 - 1))
def test_random_words_are_added_one_by_one(seed: int) -> None:
    prompts = random_prompts("add", seed=seed, counts=(1, 2, 3))
    for shorter, longer in zip(["one two three", *prompts], prompts, strict=False):
        assert shorter.split() in without_one(longer.split())
    assert prompts == random_prompts("add", seed=seed, counts=(1, 2, 3))


@given(st.integers(0, 2**63 - 1))
def test_added_words_are_words_of_the_vocabulary(seed: int) -> None:
    (prompt,) = random_prompts("add", seed=seed, counts=(4,))
    added = [word for word in prompt.split() if word not in ("one", "two", "three")]
    assert len(added) == 4
    assert all(len(TOKENIZER(word, add_special_tokens=False).input_ids) == 1 for word in added)


@given(st.integers(0, 2**63 - 1))
def test_a_random_word_is_replaced(seed: int) -> None:
    (prompt,) = random_prompts("replace", seed=seed, counts=(1,))
    kept = [a == b for a, b in zip(prompt.split(), ["one", "two", "three"], strict=True)]
    assert sum(kept) == 2


@given(st.integers(0, 2**63 - 1))
def test_numbers_and_repetitions(seed: int) -> None:
    (numbered,) = random_prompts("number", seed=seed, counts=(1,))
    numbers = [int(word) for word in numbered.split() if word.isdecimal()]
    assert ["one", "two", "three"] in without_one(numbered.split())
    assert len(numbers) == 1
    assert 0 <= numbers[0] < 100_000
    (repeated,) = random_prompts("repeat", seed=seed, counts=(1,))
    assert ["one", "two", "three"] in without_one(repeated.split())
    assert set(repeated.split()) == {"one", "two", "three"}


def test_random_tokens_fall_everywhere() -> None:
    """Any place, the first and the last among them, and many words; the global state is left alone."""
    state = torch.get_rng_state()
    prompts = [random_prompts("add", "one two", seed, counts=(1,))[0].split() for seed in range(200)]
    assert torch.equal(torch.get_rng_state(), state)
    assert {[word in ("one", "two") for word in prompt].index(False) for prompt in prompts} == {0, 1, 2}
    assert len({word for prompt in prompts for word in prompt}) > 30


@pytest.mark.parametrize("prompt", [None, "", " "])
@pytest.mark.parametrize("how", ["add", "replace", "number", "repeat"])
def test_no_random_tokens_without_a_prompt(how: str, prompt: str | None) -> None:
    assert random_prompts(how, prompt) == []


def test_no_random_words_without_a_vocabulary() -> None:
    world = World(planted())
    assert list(RandomTokens().propose(world.subject("one two"))) == []
    with pytest.raises(ValueError, match="random_tokens draws words, and the pipeline has no tokenizer"):
        RandomTokens().check(SimpleNamespace(tokenizer=None))
    with pytest.raises(ValueError, match="how='swap' is not one of add, replace, number, repeat"):
        RandomTokens(how="swap")
    with pytest.raises(ValueError, match=r"counts=\(0,\) must hold"):
        RandomTokens(counts=(0,))
