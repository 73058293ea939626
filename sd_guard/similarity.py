"""Is an image a copy? Tiled L2 of Carlini et al. (2023, arXiv 2301.13188, section 4.2), and its masked form."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_TILES = 4  # a side, as in the paper: 16 tiles of 128 x 128 pixels in 512 x 512


def tiled_l2(image: Image.Image, source: Image.Image) -> float:
    """The largest root-mean-square difference over 4 x 4 tiles.

    One tile that differs is enough to tell two images apart, so that equal backgrounds alone do not look like a copy.

    Args:
        image: any size.
        source: resized to `image` where their sizes differ.

    Returns:
        In [0, 1]; 0 for equal images.
    """
    squares = _square_difference(image, source).mean(2)
    height, width = (size // _TILES for size in squares.shape)
    tiles = squares[: _TILES * height, : _TILES * width].reshape(_TILES, height, _TILES, width)
    return float(np.sqrt(tiles.mean((1, 3)).max()))


def masked_l2(image: Image.Image, source: Image.Image, mask: Image.Image) -> float:
    """Root-mean-square difference where `mask` is white; for templates, whose fixed part is the memory.

    Returns:
        In [0, 1]; 0 where the masked parts are equal.

    Raises:
        ValueError: an empty mask.
    """
    inside = np.asarray(mask.convert("L").resize(image.size, Image.Resampling.NEAREST)) > 127
    if not inside.any():
        raise ValueError("mask is black everywhere: it must be white where the picture is fixed")
    return float(np.sqrt(_square_difference(image, source)[inside].mean()))


def _square_difference(image: Image.Image, source: Image.Image) -> NDArray[np.float64]:
    """(H, W, 3) of values in [0, 1]."""
    if source.size != image.size:
        source = source.resize(image.size, Image.Resampling.BICUBIC)
    a, b = (np.asarray(item.convert("RGB"), dtype=np.float64) / 255 for item in (image, source))
    return (a - b) ** 2
