"""Cross-attention maps of a UNet, recorded beside its own attention and without replacing it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sd_guard.lanes import Unet
from sd_guard.noise import at_least_float32
from sd_guard.statistics.base import Denoiser, StepCall


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMap:
    """Where one cross-attention block looked in one call.

    Attributes:
        block: its name in the UNet, such as ``down_blocks.0.attentions.1.transformer_blocks.0.attn2``.
        weights: (L, heads, positions, tokens) softmax probabilities in float32 or better; over tokens they sum to 1.
    """

    block: str
    weights: Tensor


@contextmanager
def record_attention(unet: Unet) -> Generator[list[AttentionMap], None, None]:
    """Collects a map for every cross-attention block, in the order of evaluation, while entered.

    Queries and keys are projected once more beside the block's own call. Whatever processor a block has (fused, sliced,
    xformers) stays where it is and computes the output, which therefore does not change. On leaving, also by an
    exception, nothing is left behind.

    Args:
        unet: a diffusers UNet that is not compiled.

    Raises:
        TypeError: no module with cross-attention blocks named ``attn2``.
    """
    found = unet.named_modules() if isinstance(unet, nn.Module) else ()
    blocks = [(name, block) for name, block in found if name.endswith("attn2")]
    if not blocks:
        raise TypeError(f"unet={type(unet).__name__} has no cross-attention block named attn2: give a diffusers UNet")
    maps: list[AttentionMap] = []
    handles: list[RemovableHandle] = []
    try:
        for name, block in blocks:
            handles.append(block.register_forward_pre_hook(partial(_record, maps, name), with_kwargs=True))
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def conditional_attention(call: StepCall, model: Denoiser) -> list[AttentionMap]:
    """The maps of the prompt's lanes at one step, by one more evaluation of each.

    That costs a lane an image. Recording inside the sampler's own call would cost none; statistics see that call only
    when it is over.

    Raises:
        TypeError: as of `record_attention`.
        ValueError: a UNet that does not call its own modules.
    """
    with record_attention(model.unet) as maps:
        model.noise_function(call, "conditional")(call.x)
    if not maps:
        raise ValueError("unet recorded no attention, as a compiled one does: give the UNet before torch.compile")
    return maps


def _record(maps: list[AttentionMap], name: str, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of diffusers' `Attention`, whose own projections and scores it uses."""
    hidden = args[0] if args else kwargs["hidden_states"]
    text = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]
    if isinstance(text, tuple):  # IP-Adapter: the text's states first, the images' after
        text = text[0]
    lanes, tokens = text.shape[:2]
    mask = attn.prepare_attention_mask(kwargs.get("attention_mask"), tokens, lanes)
    if attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    query, key = (at_least_float32(attn.head_to_batch_dim(item)) for item in (attn.to_q(hidden), attn.to_k(text)))
    weights = attn.get_attention_scores(query, key, None if mask is None else mask.to(query.dtype))
    maps.append(AttentionMap(block=name, weights=weights.unflatten(0, (lanes, -1))))
