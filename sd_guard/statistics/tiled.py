"""Are the images of different seeds near-copies of each other? (Carlini et al. 2023, arXiv 2301.13188, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from sd_guard.statistics.base import Denoiser, StepCall

_TILES = 4  # a side: 16 of 128 x 128 pixels in 512 x 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledDistance:
    """The least distance at which `clique` of a prompt's images are all near each other.

    The distance of two images is the largest root-mean-square difference over 16 tiles, so that equal backgrounds
    alone do not look like a copy (`sd_guard.similarity.tiled_l2` for a pair of files). The paper joins images closer
    than a threshold and calls a prompt memorized where the graph has a clique of 10 among 500; this is the smallest
    threshold at which it has one, so that no threshold need be chosen beforehand. A pair of a handful is about the
    paper's share.

    Attributes:
        clique: images that must agree, at least 2.
        at: the last step.

    Raises:
        ValueError: a clique below 2.
    """

    name: str = field(default="tiled_distance", init=False)
    higher_is_memorized: bool = field(default=False, init=False)
    lanes: float = field(default=0.0, init=False)
    clique: int = 2
    at: tuple[float, ...] | None = (1.0,)

    def __post_init__(self) -> None:
        """Refuse what compares nothing."""
        if self.clique < 2:
            raise ValueError(f"clique={self.clique} compares nothing: give at least 2")

    def feature(self, call: StepCall, model: Denoiser) -> Tensor:
        """(B, 3, h, w) in [0, 1]: the image that the step leads to. Costs a decoding.

        Raises:
            ValueError: there is no autoencoder, or the latents after the step are not at hand.
        """
        if model.decode is None:
            raise ValueError("decode is None: TiledDistance looks at images, give a Denoiser with an autoencoder")
        if call.next_latents is None:
            raise ValueError("next_latents is None: TiledDistance needs a trajectory that keeps them")
        return model.decode(call.next_latents)

    def compare(self, features: Tensor) -> float:
        """In [0, 1], of (N, 3, h, w) features; 0 where `clique` of them are equal.

        Raises:
            ValueError: fewer seeds than `clique`.
        """
        if len(features) < self.clique:
            raise ValueError(f"{len(features)} seeds hold no clique of {self.clique}: give more, or a smaller clique")
        distance = tiled_distances(features)
        radii = distance[torch.ones_like(distance).triu(1).bool()].unique().tolist()
        low, high = 0, len(radii) - 1  # all images are near each other at the largest radius
        while low < high:
            middle = (low + high) // 2
            near = [set(row.nonzero().flatten().tolist()) for row in distance <= radii[middle]]
            if _has_clique(near, set(range(len(near))), self.clique):
                high = middle
            else:
                low = middle + 1
        return float(radii[low])


def tiled_distances(images: Tensor) -> Tensor:
    """Distances of all pairs, (N, N) in [0, 1] for (N, 3, h, w) images in [0, 1] of at least 4 pixels a side."""
    height, width = (size // _TILES for size in images.shape[-2:])
    rows: list[Tensor] = []
    for image in images:
        squares = (images - image).square().mean(1)[:, : _TILES * height, : _TILES * width]
        rows.append(avg_pool2d(squares[:, None], (height, width)).amax((1, 2, 3)).sqrt())
    return torch.stack(rows)


def _has_clique(near: list[set[int]], among: set[int], size: int) -> bool:
    """Whether `size` of the images `among` are pairwise near; each clique is looked for from its first member."""
    if size == 0:
        return True
    return any(_has_clique(near, {j for j in among & near[i] if j > i}, size - 1) for i in among)
