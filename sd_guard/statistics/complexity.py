"""How complex an image is in itself: the size of its PNG.

Data-driven memorization (Ross et al. 2024, arXiv 2411.00113) is a low LID that the image's simplicity accounts for.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sd_guard.noise import at_least_float32
from sd_guard.statistics.base import Denoiser, StepCall
from sd_guard.statistics.dimension import measure_lid
from sd_guard.statistics.flipd_curve import check_probes


def png_bytes(image: Image.Image) -> int:
    """Size of the PNG that Pillow writes by default, in bytes, headers (about 60) included."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.tell()


def png_bytes_per_pixel(image: Image.Image) -> float:
    """Size of the PNG over the number of pixels; an RGB image has 3 bytes a pixel uncompressed."""
    return png_bytes(image) / (image.width * image.height)


def to_images(images: Tensor) -> list[Image.Image]:
    """(B, 3, h, w) in [0, 1] to B RGB images of 8 bits."""
    array = (at_least_float32(images).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(row), "RGB") for row in array]


def decoded_png_sizes(call: StepCall, model: Denoiser) -> Tensor:
    """(B,) bytes a pixel of the PNGs of the decoded ``x0_hat`` with the prompt, float32 or better.

    NaN where a decoded image is not finite: as bytes it would read as a simple picture.

    Raises:
        ValueError: there is no autoencoder.
    """
    if model.decode is None:
        raise ValueError("decode is None: PNG sizes are those of images, give a Denoiser with an autoencoder")
    x0_hat = model.read(call, "conditional").x0_hat
    decoded = model.decode(x0_hat.to(call.x.dtype))
    sizes = [png_bytes_per_pixel(image) for image in to_images(decoded.nan_to_num())]
    whole = decoded.isfinite().flatten(1).all(1).to(x0_hat.device)
    return torch.tensor(sizes, device=x0_hat.device, dtype=x0_hat.dtype).where(whole, torch.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedPngSize:
    """PNG bytes a pixel of the decoded prediction: a simple picture is what data-driven memorization looks like.

    A memory of a detailed picture points the other way, early in the trajectory at least: there an ordinary
    prediction is a blur, which compresses well.

    Attributes:
        at: anywhere.
    """

    name: str = field(default="decoded_png_size", init=False)
    higher_is_memorized: bool = field(default=False, init=False)
    lanes: float = field(default=0.0, init=False)
    at: tuple[float, ...] | None = None

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,), above 0; about 3 at most. Costs a decoding, and no lane.

        Raises:
            ValueError: there is no autoencoder.
        """
        return decoded_png_sizes(call, model)


@dataclass(frozen=True, slots=True, kw_only=True)
class LidPerPngSize:
    """Trajectory LID with the prompt over the bytes of the decoded prediction's PNG: freedom for its complexity.

    A plain picture has a low LID and a small PNG; overfitting-driven memorization a low LID for a large one (the cases
    of Ross et al. 2024, arXiv 2411.00113; whether they use the same units and the same LID was not checked).

    Attributes:
        probes: Rademacher vectors; each image has its own, from its seed and the step.
        at: anywhere.

    Raises:
        ValueError: no probes.
    """

    name: str = field(default="lid_per_png_size", init=False)
    higher_is_memorized: bool = field(default=False, init=False)
    probes: int = 2
    at: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse an empty estimate."""
        check_probes(self.probes)

    @property
    def lanes(self) -> float:
        """A perturbed prediction for each probe."""
        return float(self.probes)

    def measure(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B,): directions as a share of D, over bytes a pixel. Costs a decoding besides its lanes.

        Raises:
            ValueError: there is no autoencoder, or as many seeds as images are not at hand.
        """
        share = measure_lid(call, model, "conditional", self.probes) / call.x[0].numel()
        return share / decoded_png_sizes(call, model)
