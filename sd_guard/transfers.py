"""From the host to a device, without waiting for what the device has still to do.

`torch.tensor(values, device=...)`, `tensor.to(device)` and indexing with a list are blocking copies: the host waits
until the device has done all that it was given before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

_AT_ONCE: Final = 2**16  # bytes that CUDA takes from ordinary memory without waiting


def send(values: Tensor, device: torch.device) -> Tensor:
    """`values` on that device; those of the CPU are not to be written to afterwards."""
    here = values.device.type == "cpu"  # what comes to the host has to be waited for
    if here and device.type == "cuda" and values.nbytes > _AT_ONCE:
        values = values.pin_memory()
    return values.to(device, non_blocking=here and device.type != "mps")  # MPS may read what is not there yet


def index_of(rows: Sequence[int], device: torch.device) -> Tensor:
    """(N,) int64 index of `rows`, to select with."""
    return send(torch.tensor(list(rows), dtype=torch.int64), device)
