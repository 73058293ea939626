"""Images of a run as data URIs, thinned."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from PIL import Image

from sd_guard.screening.storage import Store

MAX_SIDE: Final = 224
TINY_SIDE: Final = 128  # at most this wide and high: kept exact, and shown with hard pixels
BUDGET: Final = 7_000_000  # bytes of all images of a page


@dataclass(frozen=True, slots=True)
class Picture:
    """An image to inline; sizes in pixels."""

    uri: str
    width: int
    height: int
    is_tiny: bool


class Pictures:
    """Reads a run's images, each file once a side; only from inside the run folder.

    Attributes:
        left_out: Images that were not read any more, for those before them had filled `BUDGET`.
    """

    def __init__(self, run: Path | str | Store) -> None:
        self.left_out = 0
        self._run = Store.at(run)
        self._left = BUDGET
        self._seen: dict[tuple[str, int], Picture | None] = {}

    def get(self, relative: str | None, *, side: int = MAX_SIDE) -> Picture | None:
        """The image, no side longer than `side`.

        None if there is none, if it is no readable image of the run, or if it is left out.
        """
        if relative is None:
            return None
        if self._left <= 0:
            self.left_out += 1
            return None
        key = (relative, side)
        if key not in self._seen:
            self._seen[key] = self._read(relative, side)
        picture = self._seen[key]
        self._left -= 0 if picture is None else len(picture.uri)
        return picture

    def _read(self, relative: str, side: int) -> Picture | None:
        try:
            if not _is_inside(self._run, relative):
                return None
            with self._run.open(relative) as source, Image.open(source, formats=["PNG"]) as file:
                image = file.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
        is_tiny = max(image.size) <= min(TINY_SIDE, side)
        image.thumbnail((side, side))
        buffer = io.BytesIO()
        if is_tiny:
            image.save(buffer, format="PNG", optimize=True)
        else:
            image.save(buffer, format="JPEG", quality=80)
        kind = "png" if is_tiny else "jpeg"
        uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
        return Picture(uri=uri, width=image.width, height=image.height, is_tiny=is_tiny)


def _is_inside(run: Store, relative: str) -> bool:
    """Whether a name that was read from records leads to a file of the run: not up, and by no link out of it."""
    name = PurePosixPath(relative)
    if name.is_absolute() or ".." in name.parts:
        return False
    return run.local is None or (run.local / name).resolve().is_relative_to(run.local.resolve())
