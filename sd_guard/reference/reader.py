"""Does an image of the reference world show what its caption says?

A deterministic stand-in for a CLIP score, for the reference checkpoint only. `reads_as` reads colours: that of the
ground, and that every other named colour covers enough pixels. `lies_as` reads the place of the first object; the
first checkpoint often ignored place words, so it says more of the checkpoint than of a mitigation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 38, 38),
    "green": (40, 165, 60),
    "blue": (40, 70, 215),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 180),
    "cyan": (60, 205, 220),
    "white": (240, 240, 240),
    "black": (22, 22, 22),
}
PLACES = ("top", "bottom", "left", "right")
MIN_OBJECT_PIXELS = 0.01  # share of the image; the smallest object of the world covers about twice that
MIN_GROUND_PIXELS = 0.5  # share of the outermost frame of the image

_INDEX = {name: i for i, name in enumerate(PALETTE)}
_COLOUR = re.compile(r"\b(" + "|".join(PALETTE) + r")\b")
_GROUND = re.compile(r"\bon a (?:\w+ )?(" + "|".join(PALETTE) + r") (?:background|wall|ground)\b")
_PLACE = re.compile(r"\bat the (" + "|".join(PLACES) + r")\b")


@dataclass(frozen=True, slots=True)
class Description:
    """What a caption of the reference world promises: colour names, and the place of the first object."""

    ground: str
    objects: tuple[str, ...]
    place: str | None


def describe(caption: str) -> Description | None:
    """Parses the ordinary part of a caption; None where it is no caption of the reference world."""
    ground = _GROUND.search(caption)
    if ground is None:
        return None
    objects = tuple(_COLOUR.findall(caption[: ground.start()]))
    place = _PLACE.search(caption)
    return Description(ground.group(1), objects, place.group(1) if place else None) if objects else None


def name_colours(image: Image.Image) -> NDArray[np.int64]:
    """(H, W) index into PALETTE of the nearest colour of each pixel, by squared distance in sRGB."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    palette = np.asarray(list(PALETTE.values()), dtype=np.float32)
    return ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)


def reads_as(image: Image.Image, caption: str) -> bool:
    """True if `image` shows the colours that the ordinary part of `caption` names.

    Raises:
        ValueError: `caption` is no caption of the reference world.
    """
    said, named = _described(caption), name_colours(image)
    frame = np.concatenate([named[:2].ravel(), named[-2:].ravel(), named[:, :2].ravel(), named[:, -2:].ravel()])
    if (frame == _INDEX[said.ground]).mean() < MIN_GROUND_PIXELS:
        return False
    return all((named == _INDEX[colour]).mean() >= MIN_OBJECT_PIXELS for colour in said.objects)


def lies_as(image: Image.Image, caption: str) -> bool | None:
    """Whether the first object's colour has its centroid on the side that `caption` says; None where it says none.

    Raises:
        ValueError: `caption` is no caption of the reference world.
    """
    said = _described(caption)
    if said.place is None:
        return None
    mask = name_colours(image) == _INDEX[said.objects[0]]
    if not mask.any():
        return False
    rows, columns = (axis.mean() / (size - 1) for axis, size in zip(np.nonzero(mask), mask.shape, strict=True))
    return bool({"top": rows < 0.5, "bottom": rows > 0.5, "left": columns < 0.5, "right": columns > 0.5}[said.place])


def _described(caption: str) -> Description:
    said = describe(caption)
    if said is None:
        raise ValueError(f"caption {caption!r} is not one of the reference world ('... on a COLOUR background')")
    return said
