"""Mitigations that change the text conditioning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sd_guard.mitigation.base import Change, Subject
from sd_guard.statistics.sharpness import log_detail_ratio, resemblance

_MAX_PIECES = 24  # longer prompts are cut into this many runs of words, which bounds the lanes of a search


@dataclass(frozen=True, slots=True, kw_only=True)
class WordAblation:
    """Finds the words that carry the memory and samples without them.

    Two questions are asked at the first step of the image's own trajectory, one lane a prompt. First each word alone,
    by premature detail: a word that carries a memory brings a picture with it, an ordinary word does not. (Leaving
    words out one at a time tells less: of two names that both carry it, neither is missed.) Then the prompt without
    each short span around the words that stood out: is the prediction still premature, or still the flagged picture,
    however faint? Shorter spans come first, so that as much of the prompt is kept as can be; among those of one length,
    the one whose words stood out most. Strength: words removed.

    Attributes:
        max_words: longest span.
        suspects: words that spans are built around.
        max_detail: log detail ratio at the first step up to which the rest of a prompt counts as ordinary.
        max_resemblance: up to which the picture counts as gone at the first step: 0 is as little as the prediction
            without a prompt resembles it, 1 is the picture itself.
    """

    max_words: int = 3
    suspects: int = 3
    max_detail: float = 0.3
    max_resemblance: float = 0.6

    def propose(self, subject: Subject) -> Iterator[Change]:
        """Spans without which the picture is gone, then the other spans by how far gone it is."""
        if subject.prompt is None:
            return
        pieces = split_words(subject.prompt)
        if len(pieces) < 2 or subject.lanes_left() < len(pieces) + 2:
            return
        whole = torch.stack([subject.empty_embeds, subject.prompt_embeds])
        control, flagged, *words = subject.predict(torch.cat([whole, subject.encode(pieces).to(whole)])).split(1)
        alone: list[float] = log_detail_ratio(torch.cat(words), control).tolist()
        spans = self._spans(alone)
        if subject.lanes_left() < len(spans):
            return
        rests = [" ".join(pieces[:start] + pieces[end:]) for start, end in spans]
        predicted = subject.predict(subject.encode(rests))
        details: list[float] = log_detail_ratio(predicted, control).tolist()
        anyway = resemblance(control, flagged).clamp(max=0.99)
        alike: list[float] = ((resemblance(predicted, flagged.expand_as(predicted)) - anyway) / (1 - anyway)).tolist()
        found: list[tuple[bool, float, float, str]] = []
        for (start, end), ratio, near, rest in zip(spans, details, alike, rests, strict=True):
            gone = ratio <= self.max_detail and near <= self.max_resemblance
            found.append((not gone, end - start if gone else near, -sum(alone[start:end]), rest))
        for _, _, _, rest in sorted(found):
            removed = len(subject.prompt.split()) - len(rest.split())
            yield Change("word_ablation", float(removed), subject.encode([rest])[0], rest)

    def _spans(self, alone: list[float]) -> list[tuple[int, int]]:
        """Starts and ends of all spans of at most `max_words` around a suspect that leave something of the prompt."""
        count = len(alone)
        suspects = sorted(range(count), key=lambda i: -alone[i])[: self.suspects]
        spans = {
            (start, start + length)
            for suspect in suspects
            for length in range(1, min(self.max_words, count - 1) + 1)
            for start in range(max(0, suspect - length + 1), min(suspect, count - length) + 1)
        }
        return sorted(spans)


def split_words(prompt: str) -> list[str]:
    """Words, or runs of words where there are over 24, in order."""
    words = prompt.split()
    size = -(-len(words) // _MAX_PIECES) if words else 1
    return [" ".join(words[i : i + size]) for i in range(0, len(words), size)]


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
