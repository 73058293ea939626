from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sd_guard.pipelines.outputs import blank_images


@pytest.mark.parametrize(
    "images", [np.ones((3, 4, 4, 3)), torch.ones(3, 3, 4, 4), [Image.new("RGB", (4, 4), "red")] * 3]
)
def test_blank_images(images: Any) -> None:
    before = np.asarray(images[0]).copy()
    assert blank_images(images, []) is images
    made = blank_images(images, [1])
    assert type(made) is type(images)
    assert [bool(np.asarray(image).any()) for image in made] == [True, False, True]
    assert np.array_equal(np.asarray(made[0]), before)
    assert np.asarray(images[1]).any()  # the caller's own are not written to
