import numpy as np
import pytest
from PIL import Image

from sd_guard.similarity import masked_l2, tiled_l2


def image_of(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array.astype(np.uint8))


def test_tiled_l2_is_the_worst_tile() -> None:
    source = np.zeros((64, 64, 3))
    changed = source.copy()
    changed[16:32, 48:64] = 51  # one of the sixteen tiles, by a fifth
    assert tiled_l2(image_of(changed), image_of(source)) == pytest.approx(0.2)
    assert tiled_l2(image_of(source), image_of(source)) == 0


def test_masked_l2_sees_the_mask_only() -> None:
    source, mask = np.zeros((8, 8, 3)), np.zeros((8, 8))
    changed = source.copy()
    changed[:, 4:] = 255
    mask[:, :4] = 255
    assert masked_l2(image_of(changed), image_of(source), image_of(mask)) == 0
    assert masked_l2(image_of(changed), image_of(source), image_of(255 - mask)) == 1
    with pytest.raises(ValueError, match="mask is black everywhere"):
        masked_l2(image_of(changed), image_of(source), image_of(np.zeros((8, 8))))
