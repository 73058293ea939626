"""Images as the host returns them, some of them made blank."""

from __future__ import annotations

from typing import Any

from PIL import Image


def blank_images(images: Any, rows: list[int]) -> Any:
    """Makes some images black, as `safety_checker` does.

    Args:
        images: list of PIL images, or an array or tensor with an image a row (zeros are black, or blank latents).
        rows: which; empty returns `images` itself.
    """
    if not rows:
        return images
    if isinstance(images, list):
        return [Image.new(image.mode, image.size) if row in rows else image for row, image in enumerate(images)]
    images = images.clone() if hasattr(images, "clone") else images.copy()
    images[rows] = 0
    return images
