"""Mitigation that puts other words in the place of those that carry the memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sd_guard.mitigation.base import Change, Subject, check_gradients, sparing
from sd_guard.mitigation.optimisation import measure, objective_of, slope
from sd_guard.mitigation.rewriters import Deletion, Lexicon, Rewriter, check_rewriter, lexicon_of, read_rewriter
from sd_guard.transfers import index_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenReplacement:
    """Draws the words that a statistic hangs on, and has them said otherwise.

    After Ross et al. (2024, arXiv 2411.00113): the attribution of a token is the norm of the statistic's gradient (Wen
    et al. 2024, arXiv 2407.21720), and tokens are drawn from its softmax at temperature 0.1. Here whole words are
    drawn, and none twice; the softmax is of attributions over the largest, since gradients have no scale of their own;
    and the gradient is that of the first step, for the token embeddings that the text encoder starts from. The authors'
    code takes it for what the encoder makes of them, which mixes all words into the later places. On the 20 verbatim
    `tune` rows of the first reference checkpoint one of the two rare words comes first in 16 (`added_detail`), 9
    (`trajectory_lid`), 5 (`score_norm`), 4 (`flipd`) and 1 (`cfg_norm`); the authors' way, in at most 2 with any.

    Strength: words replaced. Costs an evaluation of the statistic, a backward pass through it and a lane, once.

    Attributes:
        rewriter: who finds the other words; read back from its settings where it is a mapping.
        words: how many are replaced, tried in order; each draw holds those before it.
        statistic: one of `sd_guard.mitigation.optimisation.OBJECTIVES`.
        temperature: of the draw, above 0; the lower, the surer the word of the largest attribution goes first.
    """

    rewriter: Rewriter = field(default_factory=Deletion)
    words: tuple[int, ...] = (1, 2, 4)
    statistic: str = "added_detail"
    temperature: float = 0.1

    def __post_init__(self) -> None:
        """Refuses settings that no run could use."""
        object.__setattr__(self, "rewriter", read_rewriter(self.rewriter))
        objective_of(self.statistic)
        if not self.words or min(self.words) < 1:
            raise ValueError(f"words={self.words} must hold numbers of words of at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} draws nothing; give a number above 0, such as 0.1")

    def check(self, pipe: Any) -> None:
        """Refuses a pipeline, or a rewriter, that this cannot work with.

        Raises:
            ValueError: likewise.
        """
        check_gradients(pipe, "token_replacement")
        check_rewriter(self.rewriter, pipe)
        if lexicon_of(pipe).embeddings is None:
            raise ValueError("token_replacement takes gradients through the text encoder, which is not at hand")

    def propose(self, subject: Subject) -> Iterator[Change]:
        """One change a number of words; none where the rewriter says nothing new."""
        words = (subject.prompt or "").split()
        scores = attributions(subject, words, self.statistic)
        if scores is None:
            return
        lexicon, tried = Lexicon(subject.tokenizer, subject.token_embeddings), {" ".join(words)}
        order = _draw(scores, self.temperature, subject.seed)
        for count in sorted({min(count, len(order)) for count in self.words}):
            prompt = self.rewriter.rewrite(words, frozenset(order[:count]), lexicon)
            if prompt and prompt.strip() and prompt not in tried:
                tried.add(prompt)
                yield Change("token_replacement", float(count), subject.encode([prompt])[0], prompt)


def attributions(subject: Subject, words: Sequence[str], statistic: str) -> dict[int, float] | None:
    """Norm of a statistic's gradient for each word's tokens, by index, over the largest; spends the lanes of one.

    Words that the text encoder cuts off have none. None where there are no words, lanes or gradients.
    """
    objective, table = objective_of(statistic), subject.token_embeddings
    if not words or subject.tokenizer is None or table is None or subject.encode_tokens is None:
        return None
    if subject.lanes_left() < 1 + objective.cost(1):
        return None
    lexicon, latents = Lexicon(subject.tokenizer, table), subject.latents[None]
    with torch.no_grad():
        without = subject.denoise(subject.empty_embeds[None], latents)
    text = subject.prompt_embeds.detach().float().clone()[None].requires_grad_()
    with torch.enable_grad():
        value = measure(objective, sparing(subject, objective.lanes(1)), text, latents, without)
    gradient = slope(objective, subject, value, text)
    # Through the text encoder apart, which may have been offloaded meanwhile; in units that float16 can hold.
    ids = index_of(lexicon.read(" ".join(words)), table.device)[None]
    tokens = table.detach()[ids].float().requires_grad_()
    with torch.enable_grad():
        encoded = subject.encode_tokens(tokens)
    (slopes,) = torch.autograd.grad(encoded, tokens, (gradient / gradient.abs().max()).to(encoded))
    places = enumerate(lexicon.places(words, tokens.shape[1]))
    norms = {i: float(slopes[0, place.start : place.stop].norm()) for i, place in places if place}
    largest = max(norms.values(), default=0.0)
    return {i: norm / largest for i, norm in norms.items()} if 0 < largest < float("inf") else None


def _draw(scores: Mapping[int, float], temperature: float, seed: int) -> list[int]:
    """Words in the order that they are drawn in, without return: by Gumbel noise, which underflows nowhere."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(scores), generator=generator, device="cpu", dtype=torch.float64).clamp(min=1e-12)
    keys = torch.tensor(list(scores.values()), device="cpu", dtype=torch.float64) / temperature - (-uniform.log()).log()
    words = list(scores)
    return [words[i] for i in keys.argsort(descending=True).tolist()]
