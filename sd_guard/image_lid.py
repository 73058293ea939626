"""The LID of a given image with a caption, and which case of memorization it is.

The cases are those of Ross et al. (2024, arXiv 2411.00113), who compare the dimension of the model's manifold at an
image with that of the data's: *overfitting-driven* memorization where the model's is smaller, *data-driven* where both
are small. The data's dimension is not to be had; the complexity of the image, by the size of its PNG, stands for it
here. The rule and its thresholds are this package's own, set on the first reference, and unproven on larger models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sd_guard.lanes import Conditioning
from sd_guard.noise import check_scheduler
from sd_guard.statistics.base import Denoiser
from sd_guard.statistics.complexity import png_bytes_per_pixel
from sd_guard.statistics.flipd_curve import FlipdCurve, flipd_curve

Case: TypeAlias = Literal["overfitting-driven", "data-driven", "not memorized"]

# Share of the D directions up to which a model is said to leave an image none: one in fifty, so that an estimate of 0
# passes with its error. On the first reference (`tune` rows), images that it memorized have -22 % to -12 % at the
# knee, where its network pulls harder than the noise accounts for, and detailed ones it does not know 3 % to 50 %.
PINNED_SHARE: Final = 0.02
# A prompt that closes this share of what is open without it pins the image too, whatever the scale of the LID. It is
# not asked for where nothing is open without the prompt: a model knows its memories without their captions.
CLOSED_SHARE: Final = 0.5
# PNG bytes a pixel up to which an image is simple: an eighth of the 3 bytes of raw RGB. Flat fields and soft gradients
# take 0.1 to 0.2 there, scenes with objects 0.7 and more.
SIMPLE_BYTES: Final = 3 / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLid:
    """What an image's surroundings look like to a model.

    Attributes:
        case: of the paper.
        reason: one sentence that says what the case rests on.
        lid: FLIPD with the caption at the knee of its curve, in directions.
        lid_unconditional: FLIPD without it at the same level, so that both look at the same scale.
        dimension: D, the entries of one latent.
        bytes_per_pixel: of the PNG of the image as the model sees it, from 0 to about 3.
        conditional: the whole curve with the caption, B = 1.
        unconditional: the whole curve without it, with a knee of its own, B = 1.
    """

    case: Case
    reason: str
    lid: float
    lid_unconditional: float
    dimension: int
    bytes_per_pixel: float
    conditional: FlipdCurve
    unconditional: FlipdCurve


@torch.no_grad()
def lid_of_image(pipe: Any, image: Image.Image, prompt: str, *, seed: int = 0, probes: int = 8) -> ImageLid:
    """Estimates the LID that a model has at an image, with its caption and without, and names the case.

    Costs ``24 (1 + probes)`` lane evaluations. Nothing of the pipeline is changed.

    Args:
        pipe: a `StableDiffusionPipeline`; its scheduler's own schedule gives the noise levels.
        image: of any size and mode; see `fit_to_model`.
        prompt: its caption.
        seed: of the probe vectors, in [0, 2^64).
        probes: Rademacher vectors a level, at least 1.

    Raises:
        TypeError, ValueError: a scheduler that cannot be read, no probes, or a UNet whose answers are not finite.
    """
    check_scheduler(pipe.scheduler)
    fitted = fit_to_model(pipe, image)
    clean = encode(pipe, fitted)
    prompt_embeds, empty_embeds = pipe.encode_prompt(prompt, pipe._execution_device, 1, True)
    kind = pipe.scheduler.config.get("prediction_type", "epsilon")
    model = Denoiser(pipe.unet, kind, pipe.scheduler.alphas_cumprod, (seed, seed))
    both = flipd_curve(
        model, torch.cat([clean] * 2), Conditioning(torch.cat([prompt_embeds, empty_embeds])), probes=probes
    )
    conditional, unconditional = _row(both, 0), _row(both, 1)
    lid = float(conditional.lid)
    at_knee = both.timesteps == conditional.knee_timestep
    lid_unconditional = float(unconditional.values[at_knee.to(unconditional.values.device)])
    if not (np.isfinite(lid) and np.isfinite(lid_unconditional)):
        raise ValueError("the UNet returned values that are not finite: load the model in float32")
    dimension, bytes_per_pixel = clean[0].numel(), png_bytes_per_pixel(fitted)
    case, why = name_case(lid / dimension, lid_unconditional / dimension, bytes_per_pixel)
    reason = (
        f"{why}: LID {lid:.0f} with the caption and {lid_unconditional:.0f} without, of {dimension} directions at "
        f"training timestep {int(conditional.knee_timestep)}, and {bytes_per_pixel:.2f} PNG bytes a pixel"
    )
    return ImageLid(
        case=case,
        reason=reason,
        lid=lid,
        lid_unconditional=lid_unconditional,
        dimension=dimension,
        bytes_per_pixel=bytes_per_pixel,
        conditional=conditional,
        unconditional=unconditional,
    )


def name_case(share: float, share_unconditional: float, bytes_per_pixel: float) -> tuple[Case, str]:
    """The case, and why in words.

    Args:
        share: LID over D with the caption.
        share_unconditional: LID over D without it.
        bytes_per_pixel: of the image's PNG.
    """
    pinned = share <= PINNED_SHARE
    closed = share <= (1 - CLOSED_SHARE) * share_unconditional
    if not pinned and not closed:
        return "not memorized", "the model leaves the image directions to vary in, with its caption too"
    how = "the model leaves it next to no direction" if pinned else "its caption closes most of the directions"
    if bytes_per_pixel <= SIMPLE_BYTES:
        return "data-driven", f"{how}, and the image is so simple that there is little to vary"
    return "overfitting-driven", f"{how}, though the image is too complex for that"


def fit_to_model(pipe: Any, image: Image.Image) -> Image.Image:
    """The image as the model sees it: upright, RGB, cropped around its centre, scaled to the UNet's own size (Lanczos).

    The crop is the largest of the model's aspect. Transparency is dropped.
    """
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    factor = pipe.vae_scale_factor
    upright = ImageOps.exif_transpose(image).convert("RGB")
    return ImageOps.fit(upright, (width * factor, height * factor), Image.Resampling.LANCZOS)


def encode(pipe: Any, image: Image.Image) -> Tensor:
    """(1, C, H, W) the mean of the VAE's posterior, in the UNet's units, dtype and place."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    posterior = pipe.vae.encode(pixels.to(pipe._execution_device, pipe.vae.dtype)).latent_dist
    return (posterior.mean * pipe.vae.config.scaling_factor).to(pipe.unet.dtype)


def _row(curve: FlipdCurve, row: int) -> FlipdCurve:
    rows = slice(row, row + 1)
    return FlipdCurve(
        timesteps=curve.timesteps,
        values=curve.values[:, rows],
        knee_timestep=curve.knee_timestep[rows],
        lid=curve.lid[rows],
    )
