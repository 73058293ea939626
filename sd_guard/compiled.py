"""What a compiled UNet needs: calls of one shape, and no graph beside the sampler's own."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final

import torch
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor

from sd_guard.lanes import Unet, select_rows

_PER_LANE: Final = ("encoder_hidden_states", "timestep_cond", "added_cond_kwargs", "encoder_attention_mask")


@dataclass(frozen=True, slots=True)
class OneShape:
    """A UNet that is given the same number of rows each time, as many as the sampler gives it.

    Another number would be compiled for, or recorded as a CUDA graph, and would be computed by other kernels than what
    it is compared with. The last row fills up the last call; these rows are billed to nobody.

    Attributes:
        unet: whose call signature this has.
        rows: of each call.
    """

    unet: Unet
    rows: int

    def __call__(self, x: Tensor, timestep: Any, **inputs: Any) -> tuple[Tensor]:
        """Raw output for `x`, of any number of rows; `inputs` as `sd_guard.lanes.call_unet` gives them."""
        count, parts = x.shape[0], list[Tensor]()
        for start in range(0, count, self.rows):
            rows = torch.arange(start, start + self.rows, device=x.device).clamp(max=count - 1)
            parts.append(self.unet(x[rows], timestep, **self._select(inputs, rows, count))[0].clone())
        return (torch.cat(parts)[:count],)

    @staticmethod
    def _select(inputs: Mapping[str, Any], rows: Tensor, count: int) -> dict[str, Any]:
        return {name: select_rows(value, rows, count) if name in _PER_LANE else value for name, value in inputs.items()}


def of_one_shape(unet: Any, rows: int) -> Unet:
    """The UNet itself, or where it or its blocks are compiled, in calls of this many rows."""
    compiled = is_compiled_module(unet) or _is_compiled_in_place(unet) or _has_compiled_blocks(unet)
    return OneShape(unet, rows) if compiled else unet


def _is_compiled_in_place(module: Any) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


def _has_compiled_blocks(unet: Any) -> bool:
    """Whether diffusers' `compile_repeated_blocks` was called, which compiles all blocks of a kind: the first tells."""
    kinds = getattr(unet, "_repeated_blocks", None) or ()
    first = next((part for part in unet.modules() if type(part).__name__ in kinds), None) if kinds else None
    return first is not None and _is_compiled_in_place(first)


class _Stance:
    """Torch's stance is one for all threads, so that it is changed by the first that asks and back by the last."""

    def __init__(self) -> None:
        self.lock, self.holders = Lock(), 0
        self.stance: AbstractContextManager[None] | None = None

    def take(self) -> None:
        with self.lock:
            if self.holders == 0:
                self.stance = torch.compiler.set_stance("eager_on_recompile")
                self.stance.__enter__()
            self.holders += 1

    def leave(self) -> None:
        with self.lock:
            self.holders -= 1
            if self.holders == 0 and self.stance is not None:
                self.stance.__exit__(None, None, None)


_STANCE: Final = _Stance()


@contextmanager
def no_new_graphs() -> Generator[None, None, None]:
    """While entered, a compiled module that would have to be compiled again runs as if it were not.

    Flagged images are sampled again by themselves, in another number than the batch. A graph for that would be waited
    for, minutes in the middle of a call. And it would be one for any number of rows, which torch from then on prefers
    to the sampler's own, so that all later calls were slower, and their images others.
    """
    _STANCE.take()
    try:
        yield
    finally:
        _STANCE.leave()
