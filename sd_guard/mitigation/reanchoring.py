"""Guidance that leads away from the memorized prompt, towards one of the same meaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, combinations, islice
from typing import Any

import torch

from sd_guard.mitigation.base import Change, Subject
from sd_guard.mitigation.rewriters import Deletion, Lexicon, Rewriter, check_rewriter, read_rewriter
from sd_guard.statistics.guidance import cfg_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReanchoring:
    """PRSS: a prompt of the same meaning is looked for, and guidance leads there from the memorized one.

    After Chen et al. (CVPR 2025, arXiv 2504.18032). *Semantic search*: of up to 25 rewritten prompts, the first whose
    CFG norm at the first step is below a target, else the lowest. *Re-anchoring*: the memorized prompt's prediction
    takes the place of the one without a prompt, ``e_p + g (e_new - e_p)``, at every step.

    Confirmed from the authors' published code and from summaries; the paper's text was not at hand. That code blends
    re-anchoring with ordinary guidance, by the CFG norm of each step: from a norm of 3, where none of it is left, to
    one of 5, where all of it is. That takes a third lane a step and two thresholds that were found for Stable
    Diffusion's latents; here it is all or nothing, as in the equation. There GPT-4 writes the prompts; here any
    `Rewriter` does, from one word of the prompt at a time, then from two.

    Strength: share that is left of the prompt's CFG norm. Costs a lane a prompt that was looked at, and two.

    Attributes:
        rewriter: who writes the prompts; read back from its settings where it is a mapping.
        candidates: prompts that are looked at, at most.
        target: CFG norm below which one is taken before those that follow, as the paper's; None takes the lowest
            first.
    """

    rewriter: Rewriter = field(default_factory=Deletion)
    candidates: int = 25
    target: float | None = None

    def __post_init__(self) -> None:
        """Refuses settings that no run could use."""
        object.__setattr__(self, "rewriter", read_rewriter(self.rewriter))
        if self.candidates < 1:
            raise ValueError(f"candidates={self.candidates} leaves nothing to look at; give at least 1, such as 25")

    def check(self, pipe: Any) -> None:
        """Refuses a rewriter that cannot work with a pipeline.

        Raises:
            ValueError: likewise.
        """
        check_rewriter(self.rewriter, pipe)

    def propose(self, subject: Subject) -> Iterator[Change]:
        """Re-anchored prompts, best first; none where the call has no guidance, or the rewriter says nothing new."""
        affordable = min(self.candidates, subject.lanes_left() - 2)
        if subject.guidance_scale is None or affordable < 1:
            return
        prompts = self._search(subject, affordable)
        if not prompts:
            return
        shares = self._shares(subject, prompts)
        first = [] if self.target is None else [prompt for prompt, (norm, _) in shares.items() if norm < self.target]
        for prompt in dict.fromkeys([*first[:1], *sorted(shares, key=lambda prompt: shares[prompt])]):
            text = subject.encode([prompt])[0]
            yield Change("prompt_reanchoring", shares[prompt][1], text, prompt, anchor_embeds=subject.prompt_embeds)

    def _search(self, subject: Subject, count: int) -> list[str]:
        """Rewritten prompts, in order, without the prompt itself."""
        words, lexicon = (subject.prompt or "").split(), Lexicon(subject.tokenizer, subject.token_embeddings)
        if subject.tokenizer is None:
            return []
        found: dict[str, None] = {}
        sets = chain(combinations(range(len(words)), 1), combinations(range(len(words)), 2))
        for chosen in islice(sets, 2 * count):
            prompt = self.rewriter.rewrite(words, frozenset(chosen), lexicon)
            if prompt and prompt.strip() and prompt != " ".join(words):
                found[prompt] = None
            if len(found) == count:
                break
        return list(found)

    def _shares(self, subject: Subject, prompts: list[str]) -> Mapping[str, tuple[float, float]]:
        """CFG norm of each prompt at the first step, and its share of the memorized prompt's."""
        text = torch.cat([torch.stack([subject.empty_embeds, subject.prompt_embeds]), subject.encode(prompts)])
        with torch.no_grad():
            e_hat = subject.denoise(text, subject.latents.expand(len(text), -1, -1, -1)).e_hat
        norms = cfg_norm(e_hat[1:], e_hat[:1])
        pairs = torch.stack([norms, norms / norms[0]], dim=1)[1:].tolist()
        return {prompt: (norm, share) for prompt, (norm, share) in zip(prompts, pairs, strict=True)}
