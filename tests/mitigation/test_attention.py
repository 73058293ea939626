"""The summary mask: which tokens it leaves out, in which lane, and that the model heeds it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from mitigation.mixtures import assert_forgets, call, mixture_pipeline
from tiny import TOKENS, WIDTH, byte_tokenizer, subject_of

from sd_guard.lanes import Conditioning, evaluate_lanes
from sd_guard.mitigation import SummaryMask, SummaryReplacement


def test_a_memory_is_left_alone(parts: dict[str, Any]) -> None:
    """Twenty steps in a loop of its own."""
    assert_forgets(parts, SummaryMask(), 40)


@pytest.mark.parametrize(("prompt", "kept"), [("a", 2), ("abc", 4), ("a dog", 5), ("a" * 40, TOKENS - 1)])
def test_the_end_and_what_comes_after_it_is_masked(prompt: str, kept: int) -> None:
    """The first token and those of the words are kept, as many as the text encoder was given."""
    subject = subject_of(prompt, tokens=TOKENS, width=WIDTH, tokenizer=byte_tokenizer())
    (change,) = SummaryMask().propose(subject)
    assert change.attention_mask is not None
    assert change.attention_mask.tolist() == [True] * kept + [False] * (TOKENS - kept)
    assert (change.strength, change.prompt, change.own_loop) == (TOKENS - kept, None, True)


@pytest.mark.parametrize("subject", [{"prompt": None}, {"prompt": ""}, {"prompt": " "}, {"tokenizer": None}])
def test_nothing_to_mask(subject: dict[str, Any]) -> None:
    known = {"prompt": "a dog", "tokens": TOKENS, "tokenizer": byte_tokenizer()}
    for kind in (SummaryMask, SummaryReplacement):
        assert list(kind().propose(subject_of(**(known | subject)))) == []


def test_a_memory_is_left_alone_by_the_words_alone(parts: dict[str, Any]) -> None:
    """In the host's own loop: up to where it stands, and no further."""
    assert_forgets(parts, SummaryReplacement(), 14)


@pytest.mark.parametrize("prompt", ["a", "abc", "a dog", "a" * 40])
def test_the_words_stand_in_the_place_of_the_end(prompt: str) -> None:
    known = {"prompt": prompt, "tokens": TOKENS, "width": WIDTH, "tokenizer": byte_tokenizer()}
    subject = subject_of(**known)
    (change,), (masked,) = (list(kind().propose(subject)) for kind in (SummaryReplacement, SummaryMask))
    kept = int(masked.attention_mask.sum())
    assert (change.strength, change.prompt, change.own_loop) == (masked.strength, None, False)
    assert torch.equal(change.prompt_embeds[:kept], subject.prompt_embeds[:kept])
    for place in range(kept, TOKENS):
        assert torch.equal(change.prompt_embeds[place], subject.prompt_embeds[place % kept])


def test_tokens_that_stand_there_equally_often_are_as_good_as_alone(parts: dict[str, Any]) -> None:
    """What the replacement rests on: attention does not know the place of a token."""
    text = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    alone, thrice = (evaluate_lanes(parts["unet"], x, 500, Conditioning(t)) for t in (text, text.repeat(1, 3, 1)))
    torch.testing.assert_close(thrice, alone, rtol=1e-4, atol=1e-5)


PROCESSORS = [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda processor: type(processor).__name__)
def test_masked_tokens_are_as_good_as_absent(parts: dict[str, Any], processor: Any, dtype: torch.dtype) -> None:
    """By every kernel that is let through: the lane that is masked, and that one only, sees nothing of them."""
    unet = copy.deepcopy(parts["unet"]).to(dtype)
    unet.set_attn_processor(processor)
    text, other = torch.randn(2, 2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, 5:] = False
    masked = evaluate_lanes(unet, x, 500, Conditioning(text, attention_mask=mask))
    short = evaluate_lanes(unet, x[1:], 500, Conditioning(text[1:, :5]))
    close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(masked[1:], short, **close)
    torch.testing.assert_close(masked[:1], evaluate_lanes(unet, x[:1], 500, Conditioning(text[:1])), **close)
    elsewhere = torch.where(mask[..., None], text, other)
    assert torch.equal(masked, evaluate_lanes(unet, x, 500, Conditioning(elsewhere, attention_mask=mask)))


class Heedless(AttnProcessor):
    """Of somebody else."""


def test_a_replaced_processor_is_refused(parts: dict[str, Any]) -> None:
    """When the guard is enabled, and where it was replaced later, before anything is sampled."""
    pipe = mixture_pipeline({**parts, "unet": copy.deepcopy(parts["unet"])}, SummaryMask())
    pipe.unet.unet.set_attn_processor(Heedless())
    for refused in (lambda: pipe.enable_guard(pipe.guard), lambda: call(pipe, 1)):
        with pytest.raises(ValueError, match=r"^summary_mask: .*attn2.* is Heedless, .* leave it out of the plan$"):
            refused()
