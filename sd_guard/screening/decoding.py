"""Images are decoded while the UNet is busy with those after them, where that helps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from sd_guard.pipelines.ahead import take_turns

if TYPE_CHECKING:
    from PIL.Image import Image

# A pipeline and one of the latents that it returned to what makes the image of it, on whichever thread calls it.
Decode: TypeAlias = Callable[[Any, Any], Callable[[], "Image"]]


def decode_later(pipe: Any, latents: torch.Tensor) -> Callable[[], Image]:
    """An image that is made when it is asked for, or at once: by itself, so that it depends on no other of its batch.

    Args:
        pipe: a `StableDiffusionPipeline`.
        latents: (C, H, W) as `output_type="latent"` returns them.
    """
    if can_overlap(pipe, latents):
        return lambda: _decode(pipe, latents)
    image = _decode(pipe, latents)
    return lambda: image


def can_overlap(pipe: Any, latents: torch.Tensor) -> bool:
    """Whether there is something to gain: not on a CPU, where both share the cores, nor by parts that take turns."""
    return latents.device.type != "cpu" and not take_turns(pipe.unet, pipe.vae)


@torch.no_grad()
def _decode(pipe: Any, latents: torch.Tensor) -> Image:
    """As the host's call ends: the autoencoder, the safety checker where there is one, and an image of 8 bits."""
    scaled = latents[None] / pipe.vae.config.scaling_factor
    decoded = pipe.vae.decode(scaled, return_dict=False)[0]
    decoded, unsafe = pipe.run_safety_checker(decoded, latents.device, latents.dtype)
    kept = [not each for each in unsafe] if unsafe is not None else [True]
    image: Image = pipe.image_processor.postprocess(decoded, output_type="pil", do_denormalize=kept)[0]
    return image
