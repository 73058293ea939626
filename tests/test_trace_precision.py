"""Jacobian products in the precision that a model really computes with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sd_guard.trace import FiniteDifference, ForwardMode


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_forward_mode_in_half_precision_where_layer_norms_keep_float32(dtype: torch.dtype) -> None:
    """As CUDA's do, and the CPU's do not: the tangent of a layer norm takes the dtype of its mean."""

    def as_on_cuda(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
        mean = x.float().mean(-1, keepdim=True)
        scale = (x.float().var(-1, unbiased=False, keepdim=True) + eps).rsqrt()
        out = (x.float() - mean) * scale * weight.float() + bias.float()
        return out.to(x.dtype), mean, scale

    norm, line = torch.nn.LayerNorm(8).to(dtype), torch.nn.Linear(8, 8).to(dtype)
    x, v = torch.randn(2, 3, 8).to(dtype), torch.randn(2, 3, 8).to(dtype)
    f = lambda x: line(norm(x))  # noqa: E731
    expected = ForwardMode()(f, x, v)
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("native_layer_norm", as_on_cuda, "CPU")
        with pytest.raises(RuntimeError, match="same dtype"):
            torch.func.jvp(f, (x,), (v,))
        torch.testing.assert_close(ForwardMode()(f, x, v), expected, rtol=0.02, atol=0.02)
    finally:
        library._destroy()


def test_autocast_takes_the_step_of_what_it_computes_in() -> None:
    x = torch.empty(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert FiniteDifference().step_for(x) == FiniteDifference().step_for(x.bfloat16())
        assert FiniteDifference().step_for(x.double()) < FiniteDifference().step_for(x)
    assert FiniteDifference().step_for(x) < FiniteDifference().step_for(x.bfloat16())


@pytest.mark.parametrize(("allowed", "expected"), [(True, torch.float16), (False, torch.float32)])
def test_what_is_computed_in_tf32_takes_longer_steps(allowed: bool, expected: torch.dtype) -> None:
    """On CUDA, float32 convolutions have 10 bits of mantissa unless that is turned off."""
    x: Any = SimpleNamespace(dtype=torch.float32, is_cuda=True, device=torch.device("cuda"))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
        assert FiniteDifference().step_for(x) == FiniteDifference().step_for(torch.empty(1, dtype=expected))
        assert FiniteDifference(step=0.25).step_for(x) == 0.25
        like = torch.empty(1)
        assert FiniteDifference().step_for(like) < FiniteDifference().step_for(like.half())  # on the CPU there is none
