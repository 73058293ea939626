"""Mitigations that change what the image attends to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sd_guard.mitigation.base import Change, Subject

# Of diffusers; they add a mask to the logits, or hand it to a kernel that does. xformers' needs lengths that 77 is not.
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor")


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryMask:
    """The image does not attend to the tokens that sum its prompt up: the end of the text, and the padding after it.

    After Ren et al. (ECCV 2024, arXiv 2403.11052), who find that a memory hangs on them. Their logits are masked in the
    conditional lane, at every step and by whatever kernel is in use. The paper was not at hand: by the authors' code
    (renjie3/MemAttn) the logit of the *first* token is multiplied by 1.25 besides; a mask cannot, and it is left out.

    Strength: tokens masked. Costs nothing to propose; an image that attends otherwise is sampled to the end in a loop
    of its own: as many lanes a step as the call's.
    """

    def check(self, pipe: Any) -> None:
        """Refuses a pipeline whose attention takes no mask.

        Raises:
            ValueError: likewise.
        """
        for name, processor in pipe.unet.attn_processors.items():
            if "attn2" in name and type(processor).__name__ not in _PROCESSORS:
                raise ValueError(
                    f"summary_mask: {name} is {type(processor).__name__}, which may not heed a mask; use "
                    "unet.set_default_attn_processor(), or leave it out of the plan"
                )

    def propose(self, subject: Subject) -> Iterator[Change]:
        """One change; none where there is no text, or no word in it."""
        count, end = subject.prompt_embeds.shape[0], _summary_of(subject)
        if end > 1:
            kept = torch.arange(count, device=subject.prompt_embeds.device) < end
            yield Change("summary_mask", float(count - end), subject.prompt_embeds, attention_mask=kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryReplacement:
    """In the places of the tokens that sum the prompt up, those of its words once more, in their order.

    What `SummaryMask` does, as a text: attention does not know a token's place, so that where each token stands there
    equally often, its weights are those of the words alone. With a remainder, the first tokens count for up to one
    place more. So every kernel, in the loop that the image is in already, can do without the summary.

    Strength: tokens replaced. Costs nothing to propose.
    """

    def propose(self, subject: Subject) -> Iterator[Change]:
        """One change; none where there is no text, or no word in it."""
        count, end = subject.prompt_embeds.shape[0], _summary_of(subject)
        if end > 1:
            again = torch.arange(count, device=subject.prompt_embeds.device) % end
            yield Change("summary_replacement", float(count - end), subject.prompt_embeds[again])


def _summary_of(subject: Subject) -> int:
    """Where the text of a prompt ends, an index into its tokens; 0 where none is at hand."""
    if not subject.prompt or subject.tokenizer is None:
        return 0
    tokenizer, count = subject.tokenizer, subject.prompt_embeds.shape[0]
    ids: list[int] = tokenizer(subject.prompt, padding="max_length", max_length=count, truncation=True).input_ids
    return ids.index(tokenizer.eos_token_id)
