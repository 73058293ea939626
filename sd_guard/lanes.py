"""UNet evaluations in lanes: one lane is one sample's evaluation, and lanes are what a guard is billed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Unet = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """All that the UNet is given besides latent and timestep, one row a lane.

    Attributes:
        prompt_embeds: (L, tokens, width).
        timestep_cond: (L, width) guidance embedding of distilled models, else None.
        added: tensors of `added_cond_kwargs` (IP-Adapter image embeddings), each with L rows, else None.
        cross_attention_kwargs: passed on as it is; holds no per-lane tensors.
        attention_mask: (L, tokens) bool, False where a lane does not attend to a token; None, as the host's own, masks
            none and leaves the attention kernels as they are.
    """

    prompt_embeds: Tensor
    timestep_cond: Tensor | None = None
    added: Mapping[str, Any] | None = None
    cross_attention_kwargs: Mapping[str, Any] | None = None
    attention_mask: Tensor | None = None

    def select(self, lanes: Tensor) -> Conditioning:
        """The conditioning of some lanes; `lanes` is an int64 index that may repeat."""
        count = self.prompt_embeds.shape[0]
        return Conditioning(
            select_rows(self.prompt_embeds, lanes, count),
            select_rows(self.timestep_cond, lanes, count),
            select_rows(self.added, lanes, count),
            self.cross_attention_kwargs,
            select_rows(self.attention_mask, lanes, count),
        )

    def with_prompt(self, prompt_embeds: Tensor) -> Conditioning:
        """The same lanes with other text."""
        return replace(self, prompt_embeds=prompt_embeds)


def select_rows(value: Any, rows: Tensor, count: int) -> Any:
    """Selects rows of every tensor with `count` rows inside nested lists, tuples and mappings; leaves the rest."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim and value.shape[0] == count else value
    if isinstance(value, Mapping):
        return {key: select_rows(item, rows, count) for key, item in value.items()}
    if isinstance(value, list):
        return [select_rows(item, rows, count) for item in value]
    if isinstance(value, tuple):
        return tuple(select_rows(item, rows, count) for item in value)
    return value


def call_unet(unet: Unet, x: Tensor, timestep: Tensor | float, conditioning: Conditioning) -> Tensor:
    """One UNet call, differentiable where gradients are enabled.

    Args:
        unet: a `UNet2DConditionModel` or anything with its call signature.
        x: (L, C, H, W) UNet input, that is, after `scale_model_input`.
        timestep: scalar.
        conditioning: L rows.

    Returns:
        (L, C, H, W) raw model output in the scheduler's prediction type, in memory of its own: a CUDA graph writes each
        output over the last one.
    """
    mask = conditioning.attention_mask
    output: Tensor = unet(
        x,
        timestep,
        encoder_hidden_states=conditioning.prompt_embeds,
        timestep_cond=conditioning.timestep_cond,
        cross_attention_kwargs=conditioning.cross_attention_kwargs,
        added_cond_kwargs=conditioning.added,
        **({} if mask is None else {"encoder_attention_mask": mask}),
        return_dict=False,
    )[0]
    return output.clone()


@torch.no_grad()
def evaluate_lanes(unet: Unet, x: Tensor, timestep: Tensor | float, conditioning: Conditioning) -> Tensor:
    """`call_unet` without gradients."""
    return call_unet(unet, x, timestep, conditioning)
