"""Mitigations that change the text conditioning."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch

from sd_guard.mitigation.base import Change, Subject
from sd_guard.mitigation.rewriters import Lexicon
from sd_guard.statistics.sharpness import added_detail, what_is_left

_MAX_PIECES = 24  # longer prompts are cut into this many runs of words, which bounds the lanes of a search
_DRAWS = 1000  # tokens that are drawn at most for one that is a word

RandomKind: TypeAlias = Literal["add", "replace", "number", "repeat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WordAblation:
    """Finds the words that carry the memory and samples without them.

    One question is asked at the first clear step of the image's own trajectory, one lane a prompt that was not asked
    about before: what is predicted without these words? First of runs of `max_words`, each of which shares a word with
    the next, so that no two neighbours are missed, and where none of these rids the prediction of the memory, of all
    such runs; then of the shorter runs within the best of them. Where that is not enough either, of runs twice as long,
    and of the best run together with each other one (`widen`). Asking runs rather than single words matters: of two
    names that both carry a memory, neither is missed.

    A removal rids of the memory that leaves little of the flagged picture, and no other one in its place: without one
    of its describing words, a memory may give way to the next, as finished (`added_detail`). Only such removals are
    proposed. The best of them leaves least of either, takes few words and keeps the broad colours: words that only
    carry a memory say nothing else, and what the others say is mostly seen in these. Strength: words removed.

    Attributes:
        max_words: of the runs.
        widen: whether to look further where no run is enough.
        word_cost: resemblance that keeping one more word is worth.
        colour_cost: likewise, keeping the means of the predicted channels, each unit of latents by which they move.
        detail_cost: likewise, each unit of `added_detail` less.
        max_resemblance: above which the picture has survived: 0 is as little as the prediction without a prompt
            resembles it, 1 is the picture itself.
        max_detail: `added_detail` above which some finished picture is there; as the default detector's threshold.
    """

    max_words: int = 3
    widen: bool = True
    word_cost: float = 0.05
    colour_cost: float = 0.15
    detail_cost: float = 1.0
    max_resemblance: float = 0.6
    max_detail: float = -0.2

    def propose(self, subject: Subject) -> Iterator[Change]:
        """Removals that rid of the memory, the cheapest first."""
        if subject.prompt is None:
            return
        words = split_words(subject.prompt)
        width = min(self.max_words, len(words) - 1)
        runs = [range(start, start + width) for start in range(len(words) - width + 1)] if width > 0 else []
        first = [*runs[: -1 : max(width - 1, 1)], *runs[-1:]]
        if not runs:
            return
        if subject.prompt not in subject.known:
            if subject.lanes_left() < len(first) + 2:
                return
            whole = torch.stack([subject.empty_embeds, subject.prompt_embeds])
            subject.known.update(zip(("", subject.prompt), subject.predict(whole), strict=True))
        control, flagged = subject.known[""][None], subject.known[subject.prompt][None]
        cost: dict[frozenset[int], float] = {}
        rid: list[frozenset[int]] = []

        def ask(removals: Iterable[Iterable[int]]) -> None:
            new = [removal for removal in map(frozenset, removals) if 0 < len(removal) < len(words)]
            new = [removal for removal in dict.fromkeys(new) if removal not in cost]
            texts = [_without(words, removal) for removal in new]
            unknown = [text for text in dict.fromkeys(texts) if text not in subject.known]
            if not new or subject.lanes_left() < len(unknown):
                return
            if unknown:
                answers = subject.predict(subject.encode(unknown))
                subject.known.update(zip(unknown, answers, strict=True))
            predicted = torch.stack([subject.known[text] for text in texts])
            left = what_is_left(predicted, flagged, control)
            added = added_detail(predicted, control.expand_as(predicted))
            moved = (predicted - flagged).mean((-2, -1)).norm(dim=1)
            costs = (left + self.colour_cost * moved + self.detail_cost * added).tolist()
            gone = ((left <= self.max_resemblance) & (added <= self.max_detail)).tolist()
            cost.update((each, self.word_cost * len(each) + rest) for each, rest in zip(new, costs, strict=True))
            rid.extend(removal for removal, is_gone in zip(new, gone, strict=True) if is_gone)

        ask(first)
        if not rid:
            ask(runs)
        if not cost:  # an earlier search, of runs of another length, has left too little to ask for these
            return
        best = min((run for run in runs if frozenset(run) in cost), key=lambda run: cost[frozenset(run)])
        ask(best[i:j] for i in range(width) for j in range(i + 1, width + 1))
        if self.widen and not rid:
            ask(range(run.start, run.stop + width) for run in runs[: -width or None])
            ask((*best, *run) for run in runs)
        for removal in sorted(rid, key=lambda removal: cost[removal]):
            rest = _without(words, removal)
            removed = len(subject.prompt.split()) - len(rest.split())
            yield Change("word_ablation", float(removed), subject.encode([rest])[0], rest)


def _without(words: Sequence[str], removal: Collection[int]) -> str:
    return " ".join(word for i, word in enumerate(words) if i not in removal)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomTokens:
    """Puts random words into the prompt, at random places.

    After Somepalli et al. (2023, arXiv 2305.20086), by their published code, which makes 2 or 4 such changes. There a
    token is any of the vocabulary; here only one that is a word by itself. Which words come depends on the subject's
    seed only. Strength: words put in.

    Attributes:
        how: `add` a random word, `replace` a word by one, add a `number` below 100,000, or `repeat` one of the prompt.
        counts: how many, tried in order; a larger number holds the smaller one.
    """

    how: RandomKind = "add"
    counts: tuple[int, ...] = (2, 4)

    def __post_init__(self) -> None:
        """Refuses settings that no run could use."""
        if self.how not in get_args(RandomKind):
            raise ValueError(f"how={self.how!r} is not one of {', '.join(get_args(RandomKind))}")
        if not self.counts or min(self.counts) < 1:
            raise ValueError(f"counts={self.counts} must hold numbers of words of at least 1")

    def check(self, pipe: Any) -> None:
        """Refuses a pipeline whose words are not known.

        Raises:
            ValueError: it has no tokenizer.
        """
        if getattr(pipe, "tokenizer", None) is None:
            raise ValueError("plan: random_tokens draws words, and the pipeline has no tokenizer; leave it out")

    def propose(self, subject: Subject) -> Iterator[Change]:
        """One change a number; costs no lanes to propose."""
        words = (subject.prompt or "").split()
        generator = torch.Generator().manual_seed(subject.seed)
        for count in range(1, max(self.counts) + 1 if words else 1):
            word = self._word(words, subject, generator)
            if word is None:
                return
            place = _draw(len(words) + (self.how != "replace"), generator)
            words[place : place + (self.how == "replace")] = [word]
            if count in self.counts:
                prompt = " ".join(words)
                yield Change("random_tokens", float(count), subject.encode([prompt])[0], prompt)

    def _word(self, words: Sequence[str], subject: Subject, generator: torch.Generator) -> str | None:
        if self.how == "repeat":
            return words[_draw(len(words), generator)]
        if self.how == "number":
            return str(_draw(100_000, generator))
        if subject.tokenizer is None:
            return None
        lexicon = Lexicon(subject.tokenizer, None)
        drawn = (lexicon.word(_draw(len(subject.tokenizer), generator)) for _ in range(_DRAWS))
        return next((word for word in drawn if word), None)


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))
