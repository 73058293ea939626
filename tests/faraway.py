"""A device that is none: tensors that torch takes to be elsewhere, and a note whenever the host waits for them.

What would fail or wait on a GPU does so here, without one. Memory and arithmetic are the CPU's. An operation on tensors
of both sides is refused, as CUDA does; what brings a value to the host, or copies one from it in the blocking way, is
noted with the line of code that asked for it.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import get_ident
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as setup_backend

aten = torch.ops.aten
FARAWAY = torch.device("privateuseone:0")
_COPIES = (aten._to_copy.default, aten.copy_.default, aten._copy_from.default)
_READS = (
    aten._local_scalar_dense,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
    aten._linalg_svd,
    aten._linalg_solve_ex,
    aten.linalg_cholesky_ex,
)
_BY_INDEX = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
_WHOLE = (aten.cat, aten.stack, aten.index_select, aten.index_copy, aten.gather, aten.scatter)  # take no number along
_AT_ONCE = 2**16  # bytes that a driver takes from ordinary memory without waiting


@dataclass(frozen=True)
class Wait:
    """One time that the host waits until the device has done all that it was given."""

    what: str  # `read`, `from the device` or `to the device`
    line: str  # the innermost that is not torch's, as `module.py:function`
    ours: bool  # whether it is the guard's


_waits: dict[int, list[Wait]] = {}  # by thread


@contextmanager
def noted() -> Iterator[list[Wait]]:
    """What this thread waits for in the meantime, in a list that grows."""
    _waits[get_ident()] = own = []
    yield own
    del _waits[get_ident()]


def _note(what: str) -> None:
    if get_ident() not in _waits:
        return
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    frame = [frame for frame in frames if frame.filename != __file__][-1]
    line = f"{frame.filename.rsplit('/', 1)[-1]}:{frame.name}"
    _waits[get_ident()].append(Wait(what, line, "/sd_guard/" in frame.filename))


class Far(Tensor):
    """A tensor of that device; `near` is where its values really are."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor, requires_grad: bool = False) -> Far:
        with torch.inference_mode(False):
            far = Tensor._make_wrapper_subclass(
                cls,
                near.size(),
                strides=near.stride(),
                storage_offset=near.storage_offset(),
                dtype=near.dtype,
                device=FARAWAY,
                requires_grad=requires_grad,
            )
        far.near = near
        return far

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Far({self.near!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Far:
        memo[id(self)] = copied = Far(self.near.detach().clone())
        return copied

    def tolist(self) -> Any:
        _note("read")
        return self.near.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a tensor of another device to numpy: use .cpu() first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func not in _COPIES and func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return func.decompose(*args, **kwargs)
    leaves, tree = pytree.tree_flatten((args, kwargs))
    far = [leaf for leaf in leaves if isinstance(leaf, Far)]
    near = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Far)]
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    arrives = devices[0].type == FARAWAY.type if devices else bool(far)
    here, named = pytree.tree_unflatten([_nearby(leaf) for leaf in leaves], tree)
    named.pop("pin_memory", None)
    if arrives and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"{func.name()}: expected a generator of that device, and there is none")
    if func in _COPIES:
        return _copy(func, args, kwargs, here, named, arrives)
    _watch(func, args, far, near)
    outputs, known = func(*here, **named), {id(tensor.near): tensor for tensor in far}
    if not arrives:
        return outputs
    return pytree.tree_map_only(Tensor, lambda out: known[id(out)] if id(out) in known else Far(out), outputs)


def _nearby(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.near if isinstance(leaf, Far) else leaf


def _watch(func: Any, args: Any, far: list[Far], near: list[Tensor]) -> None:
    """Notes what an operation waits for; refuses tensors of two devices, but for numbers, and indices of the host."""
    packet = func.overloadpacket
    by_mask = packet in _BY_INDEX and any(each.dtype == torch.bool for each in far[1:])
    if far and (packet in _READS or by_mask):
        _note("read")
    if not far or not any(tensor.ndim or packet in _WHOLE for tensor in near):
        return
    values = [args[0], *args[2:3]]  # of an operation by index
    if packet not in _BY_INDEX or any(tensor.ndim and tensor is each for tensor in near for each in values):
        raise RuntimeError(f"{func.name()}: expected all tensors to be on the same device")
    _note("to the device")


def _copy(func: Any, args: Any, kwargs: dict[str, Any], here: Any, named: dict[str, Any], arrives: bool) -> Any:
    makes = func is aten._to_copy.default
    source = args[1] if func is aten.copy_.default else args[0]
    target = None if makes else (args[0] if func is aten.copy_.default else args[1])
    leaves, arrives = isinstance(source, Far), arrives if makes else isinstance(target, Far)
    non_blocking = kwargs.get("non_blocking", False) if makes else any(args[2:]) or kwargs.get("non_blocking", False)
    if leaves and not arrives:
        _note("from the device")
    if arrives and not leaves and not (non_blocking and source.nbytes <= _AT_ONCE):
        _note("to the device")
    if makes:
        copied = func(*here, **named)
        return Far(copied) if arrives else copied
    _nearby(target).copy_(_nearby(source))
    return target


@cache
def _kernels() -> torch.library.Library:
    """What has no tensor to be told by: `torch.zeros(..., device=...)` and the like, and what `torch.tensor` copies."""
    library = torch.library.Library("aten", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        base, _, overload = name.removeprefix("aten::").partition(".")
        packet = getattr(aten, base, None) if name.startswith("aten::") and not base.startswith("_sparse") else None
        func = getattr(packet, overload or "default", None)
        if func is not None and _makes_a_tensor(func):
            library.impl(name.removeprefix("aten::"), lambda *args, f=func, **kw: _run(f, args, kw), "PrivateUse1")
    copy = aten._copy_from.default
    library.impl("_copy_from", lambda *args: _run(copy, args, {}), "PrivateUse1")
    return library


def _makes_a_tensor(func: Any) -> bool:
    takes = func._schema.arguments
    device = any(each.name == "device" for each in takes)
    return device and not any("Tensor" in str(each.type) for each in takes) and len(func._schema.returns) == 1


@cache
def faraway() -> torch.device:
    """The device. Registered at the first call, for as long as the process lives."""
    module = ModuleType("torch.privateuseone")
    own = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "synchronize": lambda _=None: None,
        "empty_cache": lambda: None,
        "manual_seed_all": lambda _: None,
    }
    vars(module).update(own)
    setup_backend(backend_module=module)
    _kernels()
    return FARAWAY
