"""What changes a prompt at random takes it away from what is remembered: each statistic moves the right way."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from mitigation.worlds import WIDTH, Remembering
from tiny import byte_tokenizer
from torch import Tensor

from sd_guard.mitigation import Change, EmbeddingNoise, RandomTokens
from sd_guard.mitigation.optimisation import OBJECTIVES, measure

PROMPT, TOKENS = "a red dog", 8


def encode(prompts: Sequence[str]) -> Tensor:
    """(N, tokens, width): a vector a word, in its place."""
    texts = torch.zeros(len(prompts), TOKENS, WIDTH)
    for text, prompt in zip(texts, prompts, strict=True):
        for place, word in enumerate(prompt.split()[: TOKENS - 1], start=1):
            text[place] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
    return texts


@dataclass
class Near(Remembering):
    """What is remembered falls with the distance of the text from the prompt's own, as a Gaussian does."""

    key: Tensor = field(default_factory=lambda: encode([PROMPT])[0])
    spread: float = 4.0

    def memory(self, text: Tensor) -> Tensor:
        return torch.exp(-(text.float() - self.key).square().sum((1, 2)) / (2 * self.spread**2))


def assert_moves(mitigation: Any, *, falls: bool) -> list[Change]:
    """All changes have less of the memory, by every statistic; `falls`: a stronger one less than a weaker one."""
    world = Near()
    subject = world.subject(
        PROMPT, prompt_embeds=world.key, empty_embeds=100 * torch.ones(TOKENS, WIDTH), encode=encode, tokenizer=BYTES
    )
    changes = list(mitigation.propose(subject))
    texts = [world.key, *(change.prompt_embeds for change in changes)]
    memories = world.memory(torch.stack(texts)).tolist()
    assert memories[0] == 1.0 > 0.95 > max(memories[1:])
    without = world.denoise(subject.empty_embeds[None], subject.latents[None])
    for name, objective in OBJECTIVES.items():
        values = [float(measure(objective, subject, t[None], subject.latents[None], without)) for t in texts]
        order = sorted(range(len(texts)), key=lambda k: values[k], reverse=objective.rises)
        assert order == sorted(range(len(texts)), key=lambda k: -memories[k]), name
        if falls:
            assert order == list(range(len(texts)))
    return changes


BYTES = byte_tokenizer()


def strengths(changes: Iterable[Change]) -> list[float]:
    return [change.strength for change in changes]


def test_noise_in_the_embedding_forgets() -> None:
    """The more of it the more."""
    assert strengths(assert_moves(EmbeddingNoise(strengths=(0.5, 1.5, 3.0, 5.0)), falls=True)) == [0.5, 1.5, 3.0, 5.0]


@pytest.mark.parametrize("how", ["add", "replace", "number", "repeat"])
def test_random_words_forget(how: Any) -> None:
    """A further word may happen to stand where one of the prompt's own stood; none brings the memory back."""
    changes = assert_moves(RandomTokens(how=how, counts=(1, 2, 4)), falls=False)
    assert strengths(changes) == [1.0, 2.0, 4.0]
    assert all(change.prompt != PROMPT for change in changes)
