"""A mitigation that keeps all words, and lowers the weight of those that carry the memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from sd_guard.mitigation.base import Change, Subject
from sd_guard.mitigation.prompt import WordAblation


@dataclass(frozen=True, slots=True, kw_only=True)
class WordWeighting:
    """Lowers the weight of the words that `WordAblation` would leave out first.

    The prompt's embedding is mixed with that of the prompt without these words, as prompt weighting below 1 is commonly
    done. Unlike a prompt that was rewritten, it still holds some of the memory. Strength: the share that is taken from
    the words, 1 less the weight. Costs the lanes of the search.

    Attributes:
        weights: tried in order: at 1 nothing would be changed, at 0 the words would be gone.
        search: for the words.
    """

    weights: tuple[float, ...] = (0.5, 0.25)
    search: WordAblation = field(default_factory=WordAblation)

    def __post_init__(self) -> None:
        """Refuses weights that change nothing, or more than a removal does."""
        if not self.weights or not all(0 < weight < 1 for weight in self.weights):
            raise ValueError(f"weights={self.weights} must hold numbers between 0 and 1, at least one")

    def propose(self, subject: Subject) -> Iterator[Change]:
        """One change a weight; none where no removal rids of the memory."""
        whole = subject.prompt_embeds
        for removal in islice(self.search.propose(subject), 1):
            without = removal.prompt_embeds.to(whole)
            for weight in self.weights:
                mixed = without.float().lerp(whole.float(), weight)
                yield Change("word_weighting", 1 - weight, mixed.to(whole.dtype))
