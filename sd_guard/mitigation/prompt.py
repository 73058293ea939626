"""Mitigations that change the text conditioning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sd_guard.mitigation.base import Change, Subject

_MAX_PIECES = 24  # longer prompts are cut into this many runs of words, which bounds the lanes of a search


@dataclass(frozen=True, slots=True, kw_only=True)
class WordAblation:
    """Finds the words that carry the memory and samples without them.

    A span of words is left out, the prompt is encoded again, and the premature detail of its one-step prediction on
    fresh noise tells whether the memory went with it: one lane a span. Shorter spans come first, so that as much of the
    prompt is kept as can be; among those of one length, the least suspicious remainder does. Strength: words removed.

    Attributes:
        max_words: longest span.
        per_length: changes proposed of each length.
    """

    max_words: int = 4
    per_length: int = 1

    def propose(self, subject: Subject) -> Iterator[Change]:
        """Spans of 1, 2, ... words whose removal makes the prompt ordinary; else the best ones, shortest first."""
        if subject.prompt is None:
            return
        pieces = split_words(subject.prompt)
        doubtful: list[tuple[float, int, str]] = []
        for length in range(1, min(self.max_words, len(pieces) - 1) + 1):
            rewritten = [join_without(pieces, start, length) for start in range(len(pieces) - length + 1)]
            if subject.lanes_left() <= len(rewritten):
                break
            scores = subject.score_embeds(subject.encode(rewritten))
            ranked = sorted(zip(scores, rewritten, strict=True))[: self.per_length]
            for score, prompt in ranked:
                if score <= subject.ordinary:
                    yield self._change(subject, length, prompt)
                else:
                    doubtful.append((score, length, prompt))
        for _, length, prompt in sorted(doubtful):
            yield self._change(subject, length, prompt)

    def _change(self, subject: Subject, length: int, prompt: str) -> Change:
        return Change("word_ablation", float(length), subject.encode([prompt])[0], prompt)


def split_words(prompt: str) -> list[str]:
    """Words, or runs of words where there are over 24, in order."""
    words = prompt.split()
    size = -(-len(words) // _MAX_PIECES) if words else 1
    return [" ".join(words[i : i + size]) for i in range(0, len(words), size)]


def join_without(pieces: list[str], start: int, length: int) -> str:
    """The prompt without `length` pieces from `start` on."""
    return " ".join(pieces[:start] + pieces[start + length :])


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingNoise:
    """Gaussian noise on the prompt embedding, in units of its own standard deviation, with growing strength.

    After Somepalli et al. (2023, arXiv 2305.20086), who use up to 0.1 at training time; memorization as strong as in
    `design.md` needs 3 to 5, where the meaning goes too, so this is the last resort.

    Attributes:
        strengths: tried in order.
    """

    strengths: tuple[float, ...] = (1.5, 3.0, 5.0)

    def propose(self, subject: Subject) -> Iterator[Change]:
        """One change a strength; the noise depends on the subject's seed only."""
        embeds = subject.prompt_embeds
        for strength in self.strengths:
            generator = torch.Generator().manual_seed(subject.seed)
            noise = torch.randn(embeds.shape, generator=generator).to(embeds.device, torch.float32)
            noisy = embeds.float() + strength * embeds.float().std() * noise
            yield Change("embedding_noise", strength, noisy.to(embeds.dtype))
