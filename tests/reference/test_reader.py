"""The reader against the world that it reads: right captions pass, other captions do not."""

import numpy as np
import pytest
from PIL import Image

from benchmarks.reference.world import Caption, draw_caption, render
from sd_guard.reference.reader import describe, lies_as, reads_as


def test_reads_what_was_rendered_and_not_another_caption() -> None:
    rng = np.random.default_rng(7)
    captions = [draw_caption(rng, held_out=held) for held in (True, False) for _ in range(150)]
    images = [Image.fromarray(render(rng, caption)) for caption in captions]
    right = [reads_as(image, str(caption)) for image, caption in zip(images, captions, strict=True)]
    wrong = [reads_as(image, str(caption)) for image, caption in zip(images, captions[1:] + captions[:1], strict=True)]
    assert np.mean(right) >= 0.99
    assert np.mean(wrong) <= 0.05


def test_describe_takes_the_ground_and_the_objects_apart() -> None:
    caption = Caption((("large", "red", "ring"), ("", "blue", "star")), ground="white", texture="striped", place="left")
    said = describe(f"{caption} by vaulu qenthe")
    assert said is not None
    assert (said.ground, said.objects, said.place) == ("white", ("red", "blue"), "left")
    assert describe("a flat red field") is None


def test_the_place_is_read() -> None:
    rng = np.random.default_rng(3)
    caption = Caption((("large", "red", "circle"),), ground="white", place="top")
    image = Image.fromarray(render(rng, caption))
    assert lies_as(image, str(caption))
    assert lies_as(image.transpose(Image.Transpose.FLIP_TOP_BOTTOM), str(caption)) is False
    assert lies_as(image, "a red circle on a white wall") is None


def test_a_caption_of_another_world_is_refused() -> None:
    with pytest.raises(ValueError, match="is not one of the reference world"):
        reads_as(Image.new("RGB", (64, 64)), "an astronaut riding a horse")
