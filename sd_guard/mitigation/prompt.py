"""Mitigations that change the text conditioning."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from sd_guard.mitigation.base import Change, Subject
from sd_guard.mitigation.rewriters import Lexicon
from sd_guard.statistics.sharpness import added_detail, what_is_left
from sd_guard.transfers import send

_MAX_PIECES = 24  # longer prompts are cut into this many runs of words, which bounds the lanes of a search
_LESS_THAN_ORDINARY = 0.3  # what a resemblance below the ordinary one counts for
_WORD_AROUND = 0.01  # what each word less has to make in resemblance and added detail, once it is known where to look
_DRAWS = 1000  # tokens that are drawn at most for one that is a word

RandomKind: TypeAlias = Literal["add", "replace", "number", "repeat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WordAblation:
    """Finds the words that carry the memory and samples without them.

    One question is asked at the first clear step of the image's own trajectory, one lane a prompt that was not asked
    about before: what is predicted without these words? First of runs of `max_words`, each of which shares a word with
    the next, so that no two neighbours are missed, and where none of these rids the prediction of the memory, of all
    such runs; then of the shorter runs within the best of them. Asking runs rather than single words matters: of two
    names that both carry a memory, neither is missed. Where every removal leaves more of the picture than is ordinary,
    of runs twice as long, and of those a word shorter than the best: `from the so-and-so collection`. Where none is
    enough, of the best run together with each other one (`widen`).

    A removal rids of the memory that leaves little of the flagged picture, and no other one in its place: without one
    of its describing words, a memory may give way to the next, as finished (`added_detail`). Only such removals are
    proposed. The best of them leaves little of either, takes few words and keeps the broad colours: words that only
    carry a memory say nothing else, and what the others say is mostly seen in these. Less than ordinary is little
    merit: a prompt that has lost what it says leaves least of all. But once it is known where the memory hangs, the
    words around go, too, as long as the colours stay and less is left: at lower noise, one of two names is enough to
    find it again. Strength: words removed.

    Attributes:
        max_words: of the runs.
        widen: whether to look further where no run is enough.
        word_cost: resemblance that keeping one more word is worth.
        colour_cost: likewise, keeping the means of the predicted channels, each unit of latents by which they move.
        detail_cost: likewise, each unit of `added_detail` less.
        max_resemblance: above which the picture has survived: 0 is as little as the prediction without a prompt
            resembles it, 1 is the picture itself.
        max_detail: `added_detail` above which some finished picture is there; as the default detector's threshold.
        ordinary_resemblance: of a prompt that says the same without the memory; less counts for a third.
        ordinary_detail: likewise, of `added_detail`; less counts for nothing.
        colour_slack: by how much more the words around may move the channels' means; below 0, they stay.
    """

    max_words: int = 3
    widen: bool = True
    word_cost: float = 0.08
    colour_cost: float = 0.15
    detail_cost: float = 1.0
    max_resemblance: float = 0.6
    max_detail: float = -0.2
    ordinary_resemblance: float = 0.4
    ordinary_detail: float = -0.8
    colour_slack: float = 0.2

    def __post_init__(self) -> None:
        """Refuses settings by which nothing could be found."""
        if self.max_words < 1:
            raise ValueError(f"max_words={self.max_words} removes nothing; give at least 1")
        for name in ("max_resemblance", "max_detail"):
            if math.isnan(getattr(self, name)):
                raise ValueError(f"{name}=nan is passed by nothing; give a number")

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
        search = _Search(self, subject, words)
        search.ask(first)
        if not search.rid:
            search.ask(runs)
        if not search.asked:  # an earlier search, of runs of another length, has left too little to ask for these
            return
        best = search.best(runs)
        search.ask(best[i:j] for i in range(width) for j in range(i + 1, width + 1))
        if search.least_left() > self.ordinary_resemblance and (search.rid or self.widen):
            longer = [range(run.start, run.stop + width) for run in runs[: -width or None]]
            search.ask(longer)
            if any(frozenset(run) in search.asked for run in longer):
                phrase = search.best(longer)
                search.ask((phrase[1:], phrase[:-1]))
        if self.widen and not search.rid:
            search.ask((*best, *run) for run in runs)
        for removal in search.ranked():
            rest = _without(words, removal)
            removed = len(subject.prompt.split()) - len(rest.split())
            yield Change("word_ablation", float(removed), subject.encode([rest])[0], rest)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What is predicted without some words.

    Attributes:
        left: of the flagged picture.
        added: detail, beside the prediction without a prompt.
        moved: distance of the channels' means from those of the flagged picture.
        cost: by which removals are compared.
    """

    left: float
    added: float
    moved: float
    cost: float


@dataclass(frozen=True, slots=True)
class _Search:
    """What was asked about one prompt.

    Attributes:
        settings: what removals are judged by.
        subject: with the answers for no prompt and the whole one known.
        words: of the prompt.
        asked: removals, and what is predicted without them.
    """

    settings: WordAblation
    subject: Subject
    words: Sequence[str]
    asked: dict[frozenset[int], _Answer] = field(default_factory=dict[frozenset[int], _Answer])

    def ask(self, removals: Iterable[Iterable[int]]) -> None:
        """Of removals that are new, all that leave a word, if the budget allows them."""
        known = self.subject.known
        new = [removal for removal in map(frozenset, removals) if 0 < len(removal) < len(self.words)]
        new = [removal for removal in dict.fromkeys(new) if removal not in self.asked]
        texts = [_without(self.words, removal) for removal in new]
        unknown = [text for text in dict.fromkeys(texts) if text not in known]
        if not new or self.subject.lanes_left() < len(unknown):
            return
        if unknown:
            known.update(zip(unknown, self.subject.predict(self.subject.encode(unknown)), strict=True))
        self._judge(new, torch.stack([known[text] for text in texts]))

    def _judge(self, removals: Sequence[frozenset[int]], predicted: Tensor) -> None:
        """Takes (N, C, H, W) predictions without these words."""
        settings, known = self.settings, self.subject.known
        control, flagged = known[""][None], known[self.subject.prompt or ""][None]
        left = what_is_left(predicted, flagged, control)
        added = added_detail(predicted, control.expand_as(predicted))
        moved = (predicted - flagged).mean((-2, -1)).norm(dim=1)
        cost = leaky_relu(left - settings.ordinary_resemblance, _LESS_THAN_ORDINARY) + settings.colour_cost * moved
        cost += settings.detail_cost * (added - settings.ordinary_detail).clamp(min=0)
        values = torch.stack([left, added, moved, cost], dim=1).tolist()  # at once: each is waited for
        for removal, (near, more, far, rest) in zip(removals, values, strict=True):
            self.asked[removal] = _Answer(near, more, far, settings.word_cost * len(removal) + rest)

    @property
    def rid(self) -> list[frozenset[int]]:
        """Removals that rid of the memory."""
        settings = self.settings
        return [
            removal
            for removal, answer in self.asked.items()
            if answer.left <= settings.max_resemblance and answer.added <= settings.max_detail
        ]

    def least_left(self) -> float:
        """Of the flagged picture, by the removals that rid of the memory; 1 if there are none."""
        return min((self.asked[removal].left for removal in self.rid), default=1.0)

    def best(self, runs: Iterable[range]) -> range:
        """The cheapest of runs, one of which at least was asked about."""
        return min(
            (run for run in runs if frozenset(run) in self.asked), key=lambda run: self.asked[frozenset(run)].cost
        )

    def ranked(self) -> Iterator[frozenset[int]]:
        """Removals that rid of the memory, the cheapest first, each with the words around it that may go, too."""
        rid = self.rid
        cheapest = sorted(rid, key=lambda removal: self.asked[removal].cost)
        return iter(dict.fromkeys(self._grown(removal, rid) for removal in cheapest))

    def _grown(self, removal: frozenset[int], rid: Iterable[frozenset[int]]) -> frozenset[int]:
        """Of the removals around this one that move the colours little further, the one that leaves least."""
        size = max(self.settings.max_words, len(removal))
        far = self.asked[removal].moved + self.settings.colour_slack
        around = (each for each in rid if removal < each and len(each) <= size and self.asked[each].moved <= far)
        return min(
            (removal, *around),
            key=lambda each: self.asked[each].left + self.asked[each].added + _WORD_AROUND * len(each),
        )


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

    def __post_init__(self) -> None:
        """Refuses strengths that change nothing."""
        if not self.strengths or not all(0 < strength < math.inf for strength in self.strengths):
            raise ValueError(f"strengths={self.strengths} must hold numbers above 0, at least one")

    def propose(self, subject: Subject) -> Iterator[Change]:
        """One change a strength; the noise depends on the subject's seed only."""
        embeds = subject.prompt_embeds
        for strength in self.strengths:
            generator = torch.Generator().manual_seed(subject.seed)
            noise = send(
                torch.randn(embeds.shape, generator=generator, device="cpu", dtype=torch.float32), embeds.device
            )
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
    return int(torch.randint(count, (1,), generator=generator, device="cpu"))
