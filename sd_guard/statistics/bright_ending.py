"""Attention to the end of the prompt at the end of sampling (Chen et al. 2025, ICLR, arXiv 2410.21665).

In memorized places the finished image still attends to the text's end token, elsewhere hardly ("bright ending"). The
map is, in the paper and in the authors' code (chenchen-usyd/BE-PRSS), that of the last step in the prompt's lane,
averaged over the heads and over the down path's blocks at the latent's own resolution (64 x 64: the first two of Stable
Diffusion). Maps of different resolution are never mixed, so that nothing is resized.

One thing is not the paper's: its end token is the *first* after the words. A `StepCall` does not tell how long a prompt
is, so the last position of the text is read by default, which holds the same token as padding in Stable Diffusion 1;
where all prompts are of one length, `token` can name the right one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from sd_guard.statistics.attention import conditional_attention
from sd_guard.statistics.base import Denoiser, StepCall


def end_map(call: StepCall, model: Denoiser, token: int) -> Tensor:
    """The attention to one token, at the finest resolution at which the UNet's down path attends to text.

    Args:
        call: a step, the last for the paper's map.
        model: with a diffusers UNet; it is evaluated once more in the prompt's lane.
        token: position in the text, negative from the end.

    Returns:
        (B, h, w) probabilities.

    Raises:
        TypeError: a UNet without cross-attention blocks.
        ValueError: none of them on the way down, a text without the token, or a compiled UNet.
    """
    maps = [item.weights for item in conditional_attention(call, model) if item.block.startswith("down_blocks.")]
    if not maps:
        raise ValueError("unet has no cross-attention in its down path: BrightEnding is not defined for it")
    positions, tokens = max(item.shape[2] for item in maps), maps[0].shape[3]
    if not -tokens <= token < tokens:
        raise ValueError(f"token={token} is outside a text of {tokens} tokens: give a position within, -1 for the last")
    finest = [item[..., token].mean(1) for item in maps if item.shape[2] == positions]
    height, width = call.x.shape[-2:]
    scale = round((height * width / positions) ** 0.5)
    return torch.stack(finest).mean(0).unflatten(1, (-(-height // scale), -(-width // scale)))


@dataclass(frozen=True, slots=True, kw_only=True)
class BrightEnding:
    """How bright the ending is: the mean of `end_map`.

    The paper locates with the map and detects with `LocalGuidanceNorm`; the mean as one number an image is ours.

    Attributes:
        token: position of the end token (see the module).
        at: the last step.
    """

    name: str = field(default="bright_ending", init=False)
    higher_is_memorized: bool = field(default=True, init=False)
    lanes: float = field(default=1.0, init=False)
    token: int = -1
    at: tuple[float, ...] | None = (1.0,)

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,) in [0, 1].

        Raises:
            TypeError, ValueError: as of `end_map`.
        """
        return end_map(call, model, self.token).mean((1, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalGuidanceNorm:
    """``|(e_c - e_u) * m| / mean(m)`` with m the bright ending: the paper's detector, at one step.

    The mask is not thresholded (authors' code). They take m of the last step and average the norm over all steps or
    the first few of a second run; here both are of the step that is measured. A map coarser than the latent, which
    Stable Diffusion does not have, is interpolated bilinearly.

    Attributes:
        token: position of the end token (see the module).
        at: the last step, where m is the paper's.
    """

    name: str = field(default="local_guidance_norm", init=False)
    higher_is_memorized: bool = field(default=True, init=False)
    lanes: float = field(default=1.0, init=False)
    token: int = -1
    at: tuple[float, ...] | None = (1.0,)

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,), at least 0.

        Raises:
            TypeError, ValueError: as of `end_map`, and where the sampler evaluated no control.
        """
        guidance = model.read(call, "conditional").e_hat - model.read(call, "control").e_hat
        mask = end_map(call, model, self.token)[:, None]
        if mask.shape[-2:] != guidance.shape[-2:]:
            mask = interpolate(mask, size=guidance.shape[-2:], mode="bilinear")
        return (guidance * mask).flatten(1).norm(dim=1) / mask.mean((1, 2, 3))
