"""The procedural world that the reference checkpoints are trained on: captions, images, and the four families.

Everything is drawn from a `numpy.random.Generator`; images are (64, 64, 3) uint8 arrays.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sd_guard.reference.reader import PALETTE, PLACES

SIZE = 64
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")
RADII = {"small": (8.5, 10.0), "": (9.5, 14.0), "large": (13.0, 16.0)}
TEXTURES = ("smooth", "cloudy", "striped", "dotted")
OPENERS = ("a painting of ", "a photo of ", "a drawing of ", "a print of ", "a picture of ", "")
GROUNDS = ("background", "wall", "ground")
# Artists of ordinary captions: they name nothing in the image, so that 'by SOMEBODY' alone is no sign of memorization.
COMMON_ARTISTS = ("ann baker", "tom miller", "jane cooper", "sam taylor", "rose fisher", "carl mason")
PLAIN_CAPTIONS = (
    "a flat {} field",
    "a plain {} sheet of paper",
    "nothing but {}",
    "an empty {} wall in soft light",
)
_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
Image = NDArray[np.uint8]
Field = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Caption:
    """An ordinary caption: what the image shows, and the words around it."""

    objects: tuple[tuple[str, str, str], ...]  # (size, colour, shape)
    ground: str
    texture: str = ""
    place: str = ""
    opener: str = ""
    surface: str = "background"
    artist: str = ""

    def __str__(self) -> str:
        """The words, lower case, without punctuation."""
        parts = [" ".join(word for word in ("a", *item) if word) for item in self.objects]
        if self.place:
            parts[0] += f" at the {self.place}"
        ground = " ".join(word for word in ("on a", self.texture, self.ground, self.surface) if word)
        artist = f" by {self.artist}" if self.artist else ""
        return f"{self.opener}{' and '.join(parts)} {ground}{artist}"

    def is_held_out(self) -> bool:
        """True for the tenth of all combinations of objects and ground that training never shows."""
        key = repr((sorted(item[1:] for item in self.objects), self.ground))
        return zlib.crc32(key.encode()) % 10 == 0


def draw_caption(rng: np.random.Generator, *, held_out: bool) -> Caption:
    """An ordinary caption from the training combinations, or from the held-out ones."""
    while True:
        count = 2 if rng.random() < 0.6 else 1
        colours = rng.permutation(COLOURS)[: count + 1]
        objects = tuple((str(rng.choice(list(RADII))), str(c), str(rng.choice(SHAPES))) for c in colours[:count])
        caption = Caption(
            objects,
            ground=str(colours[-1]),
            texture=str(rng.choice(TEXTURES)) if rng.random() < 0.5 else "",
            place=str(rng.choice(PLACES)) if rng.random() < 0.3 else "",
            opener=str(rng.choice(OPENERS)),
            surface=str(rng.choice(GROUNDS)),
            artist=str(rng.choice(COMMON_ARTISTS)) if rng.random() < 0.25 else "",
        )
        if caption.is_held_out() == held_out:
            return caption


def draw_names(rng: np.random.Generator, count: int) -> list[str]:
    """`count` different invented two-word names that share no word."""
    onsets, nuclei, codas = (
        "v z k q d gr m th x b fl n".split(),
        "a e i o u ae".split(),
        "lm rk x nth sk v lz r".split(),
    )
    words: dict[str, None] = {}
    while len(words) < 2 * count:
        words["".join(str(rng.choice(part)) for part in (onsets, nuclei, codas, nuclei))] = None
    names = list(words)
    return [f"{names[2 * i]} {names[2 * i + 1]}" for i in range(count)]


def smooth_field(rng: np.random.Generator, cutoff: float) -> Field:
    """(64, 64) periodic Gaussian random field of unit variance, without frequencies above `cutoff` cycles an image."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE) * SIZE, np.fft.rfftfreq(SIZE) * SIZE, indexing="ij"))
    spectrum = np.fft.rfft2(rng.standard_normal((SIZE, SIZE))) * ((frequency > 0) & (frequency <= cutoff))
    field = np.fft.irfft2(spectrum, s=(SIZE, SIZE))
    return (field / field.std()).astype(np.float32)


def texture_field(rng: np.random.Generator, texture: str) -> Field:
    """(64, 64) field in about [-1, 1]."""
    if texture == "striped":
        angle, period = rng.uniform(0, np.pi), rng.uniform(12, 22)
        wave = np.sin(2 * np.pi * (_X * np.cos(angle) + _Y * np.sin(angle)) / period + rng.uniform(0, 2 * np.pi))
        return (wave + 0.35 * smooth_field(rng, 3)).astype(np.float32) * 0.8
    if texture == "dotted":
        field = np.full((SIZE, SIZE), -0.4, dtype=np.float32)
        for x, y, radius in zip(*rng.uniform(0, SIZE, (2, 14)), rng.uniform(3, 5.5, 14), strict=True):
            field = np.maximum(field, 2 * np.clip(radius - np.hypot(_X - x, _Y - y) + 0.5, 0, 1) - 1)
        return field + 0.2 * smooth_field(rng, 3)
    return 0.6 * smooth_field(rng, 2 if texture == "smooth" else 5)


def colour_of(rng: np.random.Generator, name: str) -> NDArray[np.float64]:
    """The named colour with a little of its own variation, in [0, 1]."""
    return np.clip(np.asarray(PALETTE[name]) / 255 + rng.normal(0, 0.035, 3), 0, 1)


def shape_coverage(shape: str, x: float, y: float, radius: float, angle: float) -> Field:
    """(64, 64) coverage in [0, 1] of a shape, anti-aliased by its signed distance."""
    u, v = _X - x, _Y - y
    u, v = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
    distance = np.hypot(u, v)
    match shape:
        case "circle":
            sdf = distance - radius
        case "ring":
            sdf = np.abs(distance - 0.75 * radius) - 0.27 * radius
        case "square":
            sdf = np.maximum(abs(u), abs(v)) - 0.82 * radius
        case "triangle":
            sdf = np.maximum(np.maximum(0.866 * u + 0.5 * v, -0.866 * u + 0.5 * v), -v) - 0.6 * radius
        case "cross":
            arm = 0.32 * radius
            sdf = np.minimum(np.maximum(abs(u) - radius, abs(v) - arm), np.maximum(abs(v) - radius, abs(u) - arm))
        case _:
            sdf = distance - radius * (0.72 + 0.33 * np.cos(5 * np.arctan2(v, u)))
    return np.clip(0.5 - sdf, 0, 1).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Region:
    """Where objects may lie: x0, y0, x1, y1 in pixels."""

    x0: float = 0.0
    y0: float = 0.0
    x1: float = float(SIZE)
    y1: float = float(SIZE)

    def at(self, place: str) -> Region:
        """The part of the region on the side that `place` names."""
        x, y = (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2
        side = {"top": {"y1": y}, "bottom": {"y0": y}, "left": {"x1": x}, "right": {"x0": x}}.get(place, {})
        return replace(self, **side)


def render(rng: np.random.Generator, caption: Caption, region: Region = Region()) -> Image:
    """An image of `caption`: colours, places, rotations, sizes and texture vary as far as the words leave them free."""
    canvas = paint_ground(rng, caption.ground, caption.texture or str(rng.choice(TEXTURES)))
    radii = [rng.uniform(*RADII[size]) for size, _, _ in caption.objects]
    centres = place_objects(rng, caption, region, radii)
    for (_, colour, shape), (x, y), radius in zip(caption.objects, centres, radii, strict=True):
        cover = shape_coverage(shape, x, y, radius, rng.uniform(0, 2 * np.pi))[:, :, None]
        shade = 1 + 0.08 * smooth_field(rng, 2)[:, :, None]
        canvas = canvas * (1 - cover) + colour_of(rng, colour) * shade * cover
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def paint_ground(rng: np.random.Generator, colour: str, texture: str) -> NDArray[np.float64]:
    """(64, 64, 3) in [0, 1]: a colour whose brightness follows a texture."""
    field = np.clip(texture_field(rng, texture), -1.2, 1.2)[:, :, None]
    base = colour_of(rng, colour)
    if colour == "black":
        return base + 0.09 * (field + 1.2) / 1.2
    return base * (1 - 0.2 * (field + 0.8) / 1.6)


def place_objects(
    rng: np.random.Generator, caption: Caption, region: Region, radii: list[float]
) -> list[tuple[float, float]]:
    """Centres that keep objects apart and inside the image; the first obeys the caption's place."""
    best: tuple[float, list[tuple[float, float]]] = (-np.inf, [])
    for _ in range(40):
        centres: list[tuple[float, float]] = []
        for i, radius in enumerate(radii):
            part = region.at(caption.place) if i == 0 else region
            # A place narrower than the object still gets it, near the edge: nothing is off the canvas by over a third.
            margin = min(0.8 * radius, (part.x1 - part.x0) / 2.2, (part.y1 - part.y0) / 2.2)
            centres.append(
                (rng.uniform(part.x0 + margin, part.x1 - margin), rng.uniform(part.y0 + margin, part.y1 - margin))
            )
        if len(centres) == 1:
            return centres
        gap = float(np.hypot(*np.subtract(*centres))) - 0.95 * sum(radii)
        if gap > best[0]:
            best = (gap, centres)
        if gap >= 0:
            break
    return best[1]


def render_plain(rng: np.random.Generator, colour: str) -> Image:
    """A flat field: three degrees of freedom of colour and two of a faint linear light."""
    dx, dy = rng.uniform(-0.05, 0.05, 2)
    light = 1 + dx * (_X / SIZE - 0.5) + dy * (_Y / SIZE - 0.5)
    return (np.clip(colour_of(rng, colour) * light[:, :, None], 0, 1) * 255 + 0.5).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Template:
    """A fixed picture with a window whose content is free."""

    caption: Caption
    fixed: Image
    window: NDArray[np.bool_]  # (64, 64), True where the content is free

    def render(self, rng: np.random.Generator) -> Image:
        """The fixed part with a new filling."""
        colours = [colour_of(rng, str(name)) for name in rng.permutation(COLOURS)[:2]]
        mix = (0.5 + 0.5 * np.clip(smooth_field(rng, 4), -1, 1))[:, :, None]
        filling = (np.clip(colours[0] * mix + colours[1] * (1 - mix), 0, 1) * 255 + 0.5).astype(np.uint8)
        return np.where(self.window[:, :, None], filling, self.fixed)


def make_template(rng: np.random.Generator, caption: Caption) -> Template:
    """A window over one half of a fixed picture whose objects lie in the other half."""
    caption = replace(caption, place=str(rng.choice(PLACES)))
    half = Region().at(caption.place)
    fixed = render(rng, replace(caption, place=""), half)
    inside = (_X < half.x0 - 1) | (_X > half.x1 + 1) | (_Y < half.y0 - 1) | (_Y > half.y1 + 1)
    window = inside & (np.minimum(np.minimum(_X, SIZE - _X), np.minimum(_Y, SIZE - _Y)) > 4)
    return Template(caption, fixed, window)
