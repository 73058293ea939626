"""Which words carry the memory, and what is sampled without them."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mitigation.worlds import Remembering
from tiny import TOKENS, WIDTH, CountLanes, build, byte_tokenizer, seeded, watching
from torch import Tensor

from sd_guard.guard import Guard
from sd_guard.mitigation import Deletion, Generated, NearestMeaning, Subject, TokenReplacement, rewriting
from sd_guard.mitigation.base import BACKWARD_LANES
from sd_guard.mitigation.optimisation import OBJECTIVES
from sd_guard.mitigation.rewriters import Lexicon
from sd_guard.mitigation.rewriting import attributions
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.pipelines.subject import token_encoder
from sd_guard.policy import Policy
from sd_guard.settings import guard_from_json, guard_to_json

TOKENIZER = byte_tokenizer()
WORDS = ["a", "b", "c", "d"]
MISSING = [{name: None} for name in ("tokenizer", "token_embeddings", "encode_tokens")]


def letter(word: str) -> int:
    """Token of a word of one letter."""
    return Lexicon(TOKENIZER, None).tokens(word)[0]


def neighbours(**pairs: str) -> Tensor:
    """Token embeddings in which each key is nearer to its value than to any other word."""
    table = torch.eye(len(TOKENIZER))
    for one, other in pairs.items():
        table[letter(one)] += table[letter(other)] / 2
    return table


@dataclass
class Texts:
    """Encodes prompts as their numbers, which a test can read back."""

    prompts: list[str] = field(default_factory=list)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        self.prompts += prompts
        first = len(self.prompts) - len(prompts)
        return torch.arange(first, len(self.prompts)).float()[:, None, None].expand(-1, 5, 4)


def encode_tokens(tokens: Tensor) -> Tensor:
    """A text encoder that mixes nothing: each place's embedding is the mean of its token's."""
    return tokens.mean(-1, keepdim=True).expand(-1, -1, 4)


def subject_of_words(weights: Sequence[float], prompt: str = "a b c d", **fields: Any) -> Subject:
    """One whose words, a token each, carry so much of the memory."""
    weights = (*weights, *[0.0] * (TOKENS - 1 - len(weights)))
    world = Remembering(weights, budget=fields.pop("budget", 10_000.0))
    own = {
        "tokenizer": TOKENIZER,
        "token_embeddings": neighbours(a="p", b="q", c="r", d="s"),
        "encode": Texts().encode,
        "encode_tokens": encode_tokens,
    }
    return world.subject(prompt, **(own | fields))


@pytest.mark.parametrize("statistic", OBJECTIVES)
def test_attribution_is_the_gradient_over_the_largest(statistic: str) -> None:
    """In the closed form a place's gradient is its weight, whatever the statistic."""
    weights = (0.2, 0.5, 0.0, 0.1)
    scores = attributions(subject_of_words(weights), WORDS, statistic)
    assert scores == pytest.approx({i: weight / 0.5 for i, weight in enumerate(weights)}, abs=1e-3)


def test_a_word_of_several_tokens_has_the_norm_of_them_all() -> None:
    scores = attributions(subject_of_words((0.3, 0.4, 0.5, 0.0)), ["ab", "c"], "cfg_norm")
    assert scores == pytest.approx({0: 1.0, 1: 1.0}, abs=1e-3)


def test_a_memory_that_the_encoder_moved_to_the_padding_is_found_in_its_word() -> None:
    """Place 9, where no word is, holds the memory; what the encoder puts there comes from b, at place 2."""
    order = list(range(TOKENS))
    order[9] = 2
    weights = (0.0,) * 8 + (1.0,)
    subject = subject_of_words(weights, encode_tokens=lambda tokens: encode_tokens(tokens[:, order]))
    assert attributions(subject, WORDS, "added_detail") == pytest.approx({0: 0.0, 1: 1.0, 2: 0.0, 3: 0.0}, abs=1e-3)


def test_words_that_are_cut_off_carry_nothing() -> None:
    words = [f"{i:x}" for i in range(TOKENS)]
    scores = attributions(subject_of_words((0.2, 0.5, 0.0, 0.1)), words, "cfg_norm")
    assert scores is not None
    assert list(scores) == list(range(TOKENS - 2))


@pytest.mark.parametrize("fields", [{"prompt": None}, {"prompt": ""}, {"prompt": " "}, *MISSING])
def test_nothing_to_replace(fields: dict[str, Any]) -> None:
    subject = replace(subject_of_words((0.2, 0.5, 0.0, 0.1)), **fields)
    assert list(TokenReplacement().propose(subject)) == []
    assert subject.lanes_left() == 10_000


def test_no_gradient_no_change() -> None:
    assert list(TokenReplacement().propose(subject_of_words((0.0, 0.0, 0.0, 0.0)))) == []


@given(st.integers(0, 12))
def test_the_budget_is_kept(budget: int) -> None:
    """A control, an evaluation of the statistic and its gradient, or nothing."""
    subject = subject_of_words((0.2, 0.5, 0.0, 0.1), budget=budget)
    changes = list(TokenReplacement().propose(subject))
    cost = 2 + BACKWARD_LANES
    assert bool(changes) == (budget >= cost)
    assert budget - subject.lanes_left() == (cost if budget >= cost else 0)


def test_the_words_that_carry_the_memory_are_said_otherwise() -> None:
    replacement = TokenReplacement(rewriter=NearestMeaning(), words=(1, 2, 9), temperature=1e-3)
    texts = Texts()
    changes = list(replacement.propose(subject_of_words((0.2, 0.5, 0.0, 0.1), encode=texts.encode)))
    assert [(c.mitigation, c.strength, c.prompt) for c in changes] == [
        ("token_replacement", 1.0, "a q c d"),
        ("token_replacement", 2.0, "p q c d"),
        ("token_replacement", 4.0, "p q r s"),
    ]
    assert [texts.prompts[int(change.prompt_embeds[0, 0])] for change in changes] == [c.prompt for c in changes]


def test_what_is_left_when_the_memory_is_deleted_is_remembered_less() -> None:
    """With a text encoder of the closed form: the model's memory falls as words go."""
    weights = {"a": 0.2, "b": 0.5, "c": 0.0, "d": 0.1}

    def encode(prompts: Sequence[str]) -> Tensor:
        kept = [[weights[word] > 0 and word in prompt.split() for word in WORDS] for prompt in prompts]
        rows = [[1, *row, *[0] * (TOKENS - 5)] for row in kept]
        return torch.tensor(rows).float()[..., None].expand(-1, -1, 4)

    subject = subject_of_words(tuple(weights.values()), encode=encode)
    world = Remembering((*weights.values(), *[0.0] * (TOKENS - 5)))
    changes = TokenReplacement(rewriter=Deletion(), temperature=1e-3, words=(1, 2, 3)).propose(subject)
    assert [float(world.memory(change.prompt_embeds[None])) for change in changes] == pytest.approx([0.3, 0.1, 0.0])


def test_draws_follow_the_softmax() -> None:
    """Of the first word drawn, over 2,000 seeds; each draw holds the words of the smaller one."""
    scores, temperature = {0: 0.6, 1: 1.0, 2: 0.4}, 0.4
    orders = [rewriting._draw(scores, temperature, seed) for seed in range(2000)]
    firsts = Counter(order[0] for order in orders)
    total = sum(math.exp(score / temperature) for score in scores.values())
    for word, score in scores.items():
        assert firsts[word] / 2000 == pytest.approx(math.exp(score / temperature) / total, abs=0.04)
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert rewriting._draw(scores, temperature, 3) == orders[3]


@dataclass(frozen=True)
class Stubborn:
    """Has nothing to say about b, repeats the prompt for c, and says the same of a as of d."""

    name: str = "stubborn"

    def rewrite(self, words: Sequence[str], chosen: Collection[int], lexicon: Lexicon) -> str | None:
        return {1: None, 2: " ".join(words)}.get(max(chosen), "something else")


def test_a_rewriter_with_nothing_new_to_say_is_passed_over() -> None:
    """The draw goes b, a, c, d: nothing, nothing, the same, something; and that once only."""
    replacement = TokenReplacement(rewriter=Stubborn(), words=(1, 2, 3, 4), temperature=1e-4)
    changes = list(replacement.propose(subject_of_words((0.3, 0.5, 0.2, 0.1))))
    assert [(change.strength, change.prompt) for change in changes] == [(4.0, "something else")]
    again = TokenReplacement(rewriter=Stubborn(), words=(1, 2), temperature=1e-4)
    changes = list(again.propose(subject_of_words((0.2, 0.1, 0.1, 0.5))))
    assert [change.prompt for change in changes] == ["something else"]


@pytest.fixture
def own_parts(parts: dict[str, Any]) -> dict[str, Any]:
    """A copy that a test may change."""
    return copy.deepcopy(parts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"words": ()}, r"words=\(\) must hold numbers of words"),
        ({"words": (0, 1)}, r"words=\(0, 1\) must hold numbers of words of at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 draws nothing"),
        ({"statistic": "beauty"}, "statistic='beauty' has no gradient"),
        ({"rewriter": {"name": "oracle"}}, "name='oracle' is not one of deletion, nearest_meaning, generated"),
    ],
)
def test_settings_that_no_run_could_use(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenReplacement(**settings)


@pytest.mark.parametrize("rewriter", [Deletion(), NearestMeaning(), Generated(folder="/models/small")])
def test_settings_round_trip(rewriter: Any) -> None:
    guard = Guard(plan=(TokenReplacement(rewriter=rewriter, words=(1, 3)),))
    text = guard_to_json(guard)
    assert json.loads(text)["plan"][0]["rewriter"]["name"] == rewriter.name
    assert guard_from_json(text) == guard


def encoder_of(pipe: Any) -> Any:
    return lambda prompts: pipe.encode_prompt(list(prompts), "cpu", 1, False)[0]


def test_token_embeddings_go_through_the_text_encoder(parts: dict[str, Any]) -> None:
    """The prompt's own give its own embedding; others are followed, with a gradient; the encoder is left as it was."""
    pipe: Any = build(GuardedStableDiffusionPipeline, parts)
    encode, table = encoder_of(pipe), pipe.text_encoder.get_input_embeddings()
    through = token_encoder(pipe, encode, "a dog")
    assert through is not None
    tokens = table.weight.detach()[torch.tensor([Lexicon(TOKENIZER, None).read("a dog")])]
    assert torch.equal(through(tokens), encode(["a dog"]))
    moved = tokens.clone()
    moved[:, 1] = table.weight.detach()[letter("b")]
    moved.requires_grad_()
    torch.testing.assert_close(through(moved), encode(["b dog"]))
    (gradient,) = torch.autograd.grad(through(moved)[0, 3].square().sum(), moved)
    assert gradient[0, 1].norm() > 0
    assert torch.equal(gradient[0, 4:], torch.zeros_like(gradient[0, 4:])), "the encoder looks back only"
    assert not table._forward_hooks


def test_another_thread_encodes_its_own_prompt(parts: dict[str, Any]) -> None:
    """While one has its token embeddings in the place of a prompt's."""
    pipe: Any = build(GuardedStableDiffusionPipeline, parts)
    encode = encoder_of(pipe)
    expected, seen = encode(["blue"]), []

    def meanwhile(prompts: Sequence[str]) -> Tensor:
        other = Thread(target=lambda: seen.append(encode(["blue"])))
        other.start()
        other.join()
        return encode(prompts)

    through = token_encoder(pipe, meanwhile, "a dog")
    assert through is not None
    mine = through(torch.zeros(1, TOKENS, WIDTH))
    assert torch.equal(seen[0], expected)
    assert not torch.equal(mine, encode(["a dog"]))


def test_no_prompt_or_encoder_no_tokens(parts: dict[str, Any]) -> None:
    pipe: Any = build(GuardedStableDiffusionPipeline, parts)
    assert token_encoder(pipe, encoder_of(pipe), None) is None
    assert token_encoder(SimpleNamespace(text_encoder=None), encoder_of(pipe), "a dog") is None


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_a_pipeline(own_parts: dict[str, Any], dtype: torch.dtype, offloaded: bool) -> None:
    """The flagged image's words go one by one, its neighbour is bit for bit what it was, all is billed."""
    pipe: Any = build(GuardedStableDiffusionPipeline, own_parts).to(dtype)
    if offloaded:
        pipe.enable_model_cpu_offload(device="cpu")
    call: dict[str, Any] = {"prompt": ["a dog", "b car"], "num_inference_steps": 6, "output_type": "latent"}
    pipe.disable_guard()
    plain = pipe(**call, generator=seeded(1, 2))
    pipe.enable_guard(watching(plan=()))
    scores = [record.score for record in pipe(**call, generator=seeded(1, 2)).records]
    guard = watching(sum(scores) / 2, (TokenReplacement(rewriter=Deletion(), words=(1,)),))
    pipe.enable_guard(replace(guard, policy=Policy(margin=0.0, max_resemblance=1e-6)), budget=100)
    processors = dict(pipe.unet.attn_processors)
    with CountLanes(pipe.unet) as count:
        output = pipe(**call, generator=seeded(1, 2))
    assert pipe.unet.attn_processors == processors
    assert not pipe.unet.is_gradient_checkpointing
    flagged = scores.index(max(scores))
    assert torch.equal(output.images[1 - flagged], plain.images[1 - flagged])
    assert count.rows + BACKWARD_LANES == 2 * 6 * 2 + sum(record.extra_lanes for record in output.records)
    (attempt,) = output.records[flagged].attempts
    assert attempt.prompt in call["prompt"][flagged].split()
    assert all(weight.grad is None for part in ("unet", "text_encoder") for weight in own_parts[part].parameters())


def test_a_pipeline_without_a_text_encoder_at_hand_is_refused(own_parts: dict[str, Any]) -> None:
    pipe: Any = build(GuardedStableDiffusionPipeline, own_parts)
    TokenReplacement().check(pipe)
    pipe.text_encoder.to("meta")  # as sequential offload leaves it
    with pytest.raises(ValueError, match="token_replacement takes gradients through the text encoder"):
        TokenReplacement().check(pipe)
