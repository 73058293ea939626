"""Jacobian products of a denoiser, and the trace of its Jacobian from a few of them.

Throughout, ``f`` maps (B, *S) to (B, *S) with independent rows, ``J`` is a row's own D x D Jacobian (D = prod(S)), and
everything returned is float32, or float64 where the input is. No row's result depends on its batchmates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import layer_norm, one_hot
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from sd_guard.noise import at_least_float32
from sd_guard.transfers import send

RowFunction: TypeAlias = Callable[[Tensor], Tensor]
Distribution: TypeAlias = Literal["rademacher", "gaussian"]


@dataclass(frozen=True, slots=True)
class RowSeeds:
    """One seed in [0, 2^64) a row, which keeps its probes whatever else is in the batch, and a step in [0, 2^32)."""

    seeds: Sequence[int]
    step: int = 0


ProbeSource: TypeAlias = torch.Generator | RowSeeds


def draw_row_probes(
    seeds: Sequence[int], shape_per_row: Sequence[int], step: int, device: torch.device | str, probe: int = 0
) -> Tensor:
    """Rademacher probes that depend on nothing but (row's seed, step, probe index, shape).

    The bits are the raw stream of a counter-based generator keyed by those numbers (Philox; Salmon et al. 2011), which
    NumPy keeps stable across versions. One bit an entry is drawn on the host, 2 KiB a row of (4, 64, 64), so that every
    device has the same; the vectors are made of them on the device.

    Returns:
        Entries -1 and 1, (len(seeds), *S) in float32.
    """
    size, device = math.prod(shape_per_row), torch.device(device)
    words = [_stream(seed, step, probe).random_raw(-(-size // 64)) for seed in seeds]
    packed = send(torch.from_numpy(np.stack(words).astype("<u8").view(np.uint8)), device)
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)  # in a byte, the first entry's highest
    bits = (packed[..., None] >> places) & 1
    return bits.flatten(1)[:, :size].to(torch.float32).mul_(2.0).sub_(1.0).reshape(len(seeds), *shape_per_row)


def draw_probes(
    shape: Sequence[int], source: ProbeSource, distribution: Distribution, device: torch.device | str, probe: int = 0
) -> Tensor:
    """Probe vectors of zero mean and identity covariance.

    Args:
        shape: (B, *S).
        source: A generator, advanced by the call and used on its own device, or the rows' seeds.
        distribution: ``rademacher`` (entries -1 and 1: the identity part of J adds no variance) or ``gaussian``.
        device: Where the probes are wanted.
        probe: Index of the probe vector; only row seeds use it.

    Returns:
        Probes, float32 of shape (B, *S).
    """
    if isinstance(source, RowSeeds):
        if len(source.seeds) != shape[0]:
            raise ValueError(f"{len(source.seeds)} row seeds were given for {shape[0]} rows.")
        if distribution == "rademacher":
            return draw_row_probes(source.seeds, shape[1:], source.step, device, probe)
        keys = [int(_stream(seed, source.step, probe).random_raw()) for seed in source.seeds]
        generators = [torch.Generator().manual_seed(key >> 1) for key in keys]
        return send(
            torch.stack([torch.randn(*shape[1:], generator=g, device="cpu") for g in generators]), torch.device(device)
        )
    if distribution == "gaussian":
        return send(torch.randn(*shape, generator=source, device=source.device), torch.device(device))
    bits = torch.randint(0, 2, tuple(shape), generator=source, device=source.device, dtype=torch.int8)
    return send(bits, torch.device(device)).to(torch.float32).mul_(2.0).sub_(1.0)


class JacobianProduct(Protocol):
    """One product of each row's Jacobian with a vector."""

    @property
    def evaluations(self) -> int:
        """Cost of one product, in plain evaluations of f a row."""
        ...

    @property
    def uses_base(self) -> bool:
        """Whether a product reads ``f(x)``, which is then worth computing once."""
        ...

    def __call__(self, f: RowFunction, x: Tensor, v: Tensor, fx: Tensor | None = None) -> Tensor:
        """``J v`` (or ``J^T v``, of the same quadratic form) for `x` and `v` of shape (B, *S), shaped like `x`."""
        ...


@dataclass(frozen=True, slots=True)
class Perturbation:
    """A point moved along a probe, and how far it really moved.

    Attributes:
        point: ``x + h v`` as it came out in the dtype of x, (B, *S).
        step: Realised displacement over `v`, elementwise, (B, *S); the nominal h where nothing moved or v is 0.
    """

    point: Tensor
    step: Tensor


def perturb(x: Tensor, v: Tensor, step: float) -> Perturbation:
    """Move `x` along `v`, remembering the rounding of the dtype of `x`.

    The largest entry of a row's `v` moves by `step` times the row's RMS, at least 1 (as of a UNet's input). Rounding h
    to a power of two makes most sums in a short float exact, and division by the realised step keeps the *diagonal* of
    the estimated Jacobian, all that a trace reads, free of rounding. `x` and `v` are (B, *S), x in the UNet's dtype.
    """
    base, v = at_least_float32(x), at_least_float32(v).to(x.device)
    rows = (-1, *[1] * (x.ndim - 1))
    scale = base.flatten(1).square().mean(1).sqrt().clamp(min=1.0)
    reach = v.flatten(1).abs().amax(1).clamp(min=torch.finfo(v.dtype).tiny)
    h = torch.exp2(torch.log2(step * scale / reach).round()).reshape(rows).to(base.dtype)
    point = (base + h * v).to(x.dtype)
    moved = at_least_float32(point) - base
    return Perturbation(point, torch.where((moved == 0) | (v == 0), h, moved / v))


# The least error on a small UNet, out of all powers of two (tests/test_trace.py keeps them near that minimum).
_STEPS: Final[dict[tuple[str, torch.dtype], float]] = {
    ("forward", torch.float64): 2.0**-24,
    ("forward", torch.float32): 2.0**-10,
    ("forward", torch.float16): 2.0**-5,
    ("forward", torch.bfloat16): 2.0**-4,
    ("central", torch.float64): 2.0**-18,
    ("central", torch.float32): 2.0**-8,
    ("central", torch.float16): 2.0**-4,
    ("central", torch.bfloat16): 2.0**-3,
}


def _allows_tf32() -> bool:
    try:
        return bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # set by torch's newer interface, to what this one has no words for
        return True


def _computed_in(x: Tensor) -> torch.dtype:
    """The dtype whose precision a model has that is called with `x` now; TF32 has float16's."""
    if x.dtype != torch.float32:
        return x.dtype
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return torch.float16 if x.is_cuda and _allows_tf32() else x.dtype


@dataclass(frozen=True, slots=True)
class FiniteDifference:
    """Difference quotient: works with every attention kernel and dtype, and has the shape of an ordinary call.

    Attributes:
        scheme: ``forward`` (one evaluation, given f(x); error O(step)) or ``central`` (two; error O(step^2)).
        step: Relative step (see `perturb`); None takes the default of the input's dtype.
    """

    scheme: Literal["forward", "central"] = "forward"
    step: float | None = None

    @property
    def evaluations(self) -> int:
        """One, or two if central."""
        return 1 if self.scheme == "forward" else 2

    @property
    def uses_base(self) -> bool:
        """Forward differences start from f(x)."""
        return self.scheme == "forward"

    def step_for(self, x: Tensor) -> float:
        """Relative step used for an input like `x`, by the precision that f computes with."""
        return self.step if self.step is not None else _STEPS[self.scheme, _computed_in(x)]

    def __call__(self, f: RowFunction, x: Tensor, v: Tensor, fx: Tensor | None = None) -> Tensor:
        """``J v``, with differences taken in float32 or better."""
        step = self.step_for(x)
        ahead = perturb(x, v, step)
        after = at_least_float32(f(ahead.point))
        if self.scheme == "forward":
            return (after - at_least_float32(f(x) if fx is None else fx)) / ahead.step
        behind = perturb(x, -v, step)
        return (after - at_least_float32(f(behind.point))) / (ahead.step + behind.step)


class _FloatNorms(TorchFunctionMode):
    """Layer norms of half precision in float32: their tangent takes the dtype of their means, which on CUDA is that."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is not layer_norm or args[0].dtype not in (torch.float16, torch.bfloat16):
            return func(*args, **given)
        whole, named = tree_map_only(Tensor, Tensor.float, (args, given))
        return func(*whole, **named).to(args[0].dtype)


@dataclass(frozen=True, slots=True)
class ForwardMode:
    """Forward-mode differentiation: exact ``J v``, with attention by the math kernel for the call only."""

    evaluations: int = field(default=2, init=False, repr=False)  # value and tangent
    uses_base: bool = field(default=False, init=False, repr=False)

    def __call__(self, f: RowFunction, x: Tensor, v: Tensor, fx: Tensor | None = None) -> Tensor:
        """``J v``; `fx` is not needed. The fused attention kernels have no forward-mode derivative."""
        with sdpa_kernel(SDPBackend.MATH), _FloatNorms():
            tangent: Tensor = torch.func.jvp(f, (x,), (v.to(device=x.device, dtype=x.dtype),))[1]
        return at_least_float32(tangent)


@dataclass(frozen=True, slots=True)
class ReverseMode:
    """Reverse-mode differentiation: exact ``J^T v``, which has the same quadratic form ``v . (J v)``."""

    evaluations: int = field(default=3, init=False, repr=False)  # value and pullback, which costs about two
    uses_base: bool = field(default=False, init=False, repr=False)

    def __call__(self, f: RowFunction, x: Tensor, v: Tensor, fx: Tensor | None = None) -> Tensor:
        """``J^T v``; `fx` is not needed. Keeps f's activations in memory until it returns."""
        out, pull = torch.func.vjp(f, x)[:2]
        cotangent: Tensor = pull(v.to(device=out.device, dtype=out.dtype))[0]
        return at_least_float32(cotangent).detach()


PRODUCTS: Final = {"finite-difference": FiniteDifference, "forward-mode": ForwardMode, "reverse-mode": ReverseMode}


@dataclass(frozen=True, slots=True)
class TraceEstimate:
    """An estimated trace per row.

    Attributes:
        value: tr J, (B,).
        stderr: Standard error over the probes, (B,); None for a single probe, 0 if exact.
        evaluations: Plain evaluations of f spent a row, f(x) included where it was not given.
    """

    value: Tensor
    stderr: Tensor | None
    evaluations: int


class TraceEstimator(Protocol):
    """Estimates each row's tr J from Jacobian products."""

    def estimate(
        self, f: RowFunction, x: Tensor, product: JacobianProduct, generator: ProbeSource, fx: Tensor | None = None
    ) -> TraceEstimate:
        """Trace at the points `x` (B, *S); `fx` saves an evaluation where f(x) is known."""
        ...


@dataclass(frozen=True, slots=True)
class Hutchinson:
    """Mean of ``v . (J v)`` over `probes` random vectors: unbiased, error as probes^-1/2 (Hutchinson 1989).

    Attributes:
        probes: Number of vectors, and of Jacobian products.
        distribution: Rademacher probes are exact on a diagonal J; Gaussian ones add variance 2 |diag J|^2.
    """

    probes: int = 1
    distribution: Distribution = "rademacher"

    def __post_init__(self) -> None:
        """Refuse an empty estimate."""
        if self.probes < 1:
            raise ValueError("Hutchinson needs at least one probe.")

    def estimate(
        self, f: RowFunction, x: Tensor, product: JacobianProduct, generator: ProbeSource, fx: Tensor | None = None
    ) -> TraceEstimate:
        """Estimate the trace, with the spread over the probes."""
        fx, spent = _base(f, x, product, fx)
        probes = (draw_probes(x.shape, generator, self.distribution, x.device, i) for i in range(self.probes))
        draws = torch.stack([_row_dot(v, product(f, x, v, fx)) for v in probes])
        return TraceEstimate(draws.mean(0), _stderr(draws), spent + self.probes * product.evaluations)


@dataclass(frozen=True, slots=True)
class HutchPlusPlus:
    """Trace on a sketched range exactly, plus Hutchinson on its complement (Meyer et al. 2021, arXiv 2010.09649).

    Error as probes^-1, exact for rank <= probes / 3.

    Attributes:
        probes: Jacobian products, at least 3: a third each for the sketch, its trace and the complement.
    """

    probes: int = 6

    def __post_init__(self) -> None:
        """Refuse a budget that cannot be split."""
        if self.probes < 3:
            raise ValueError("HutchPlusPlus needs at least three probes.")

    def estimate(
        self, f: RowFunction, x: Tensor, product: JacobianProduct, generator: ProbeSource, fx: Tensor | None = None
    ) -> TraceEstimate:
        """Estimate the trace, with the spread over the probes of the complement."""
        fx, spent = _base(f, x, product, fx)
        draw = partial(draw_probes, x.shape, generator, "rademacher", x.device)
        rank = min(self.probes // 3, x[0].numel())
        rest = self.probes - 2 * (self.probes // 3)
        sketch = torch.stack([product(f, x, draw(i), fx).flatten(1) for i in range(rank)], dim=2)
        q = torch.linalg.qr(sketch)[0]  # (B, D, rank)
        columns = (q[..., i].reshape(x.shape) for i in range(rank))
        captured = torch.stack([_row_dot(c, product(f, x, c, fx)) for c in columns]).sum(0)
        draws: list[Tensor] = []
        for i in range(rest):
            g = draw(rank + i).flatten(1).to(q.dtype)[..., None]
            left = (g - q @ (q.mT @ g)).reshape(x.shape)
            draws.append(_row_dot(left, product(f, x, left, fx)))
        spread = torch.stack(draws)
        cost = spent + (2 * rank + rest) * product.evaluations
        return TraceEstimate(captured + spread.mean(0), _stderr(spread), cost)


@dataclass(frozen=True, slots=True)
class Exact:
    """The trace itself, entry by entry: D products. For small latents and tests.

    Attributes:
        chunk: Basis vectors per call; above 1, f is given chunk * B rows (the batch repeated), and must accept them.
    """

    chunk: int = 1

    def estimate(
        self, f: RowFunction, x: Tensor, product: JacobianProduct, generator: ProbeSource, fx: Tensor | None = None
    ) -> TraceEstimate:
        """Sum the diagonal; `generator` is not used."""
        fx, spent = _base(f, x, product, fx)
        batch, dimension = len(x), x[0].numel()
        total = torch.zeros(batch, device=x.device, dtype=at_least_float32(x).dtype)
        for start in range(0, dimension, self.chunk):
            index = torch.arange(start, min(start + self.chunk, dimension), device=x.device)
            v = one_hot(index, dimension).to(total.dtype).repeat_interleave(batch, dim=0).reshape(-1, *x.shape[1:])
            repeat = (len(index), *[1] * (x.ndim - 1))
            jv = product(f, x.repeat(repeat), v, None if fx is None else fx.repeat(repeat))
            total += _row_dot(v, jv).reshape(len(index), batch).sum(0)
        return TraceEstimate(total, torch.zeros_like(total), spent + dimension * product.evaluations)


ESTIMATORS: Final = {"hutchinson": Hutchinson, "hutch++": HutchPlusPlus, "exact": Exact}


def _stream(seed: int, step: int, probe: int) -> np.random.Philox:
    """Keyed in unsigned words: a list of Python integers would go through float64, and lose the low bits of a seed."""
    return np.random.Philox(key=np.array([seed, (step << 32) | probe], dtype=np.uint64))


def _base(f: RowFunction, x: Tensor, product: JacobianProduct, fx: Tensor | None) -> tuple[Tensor | None, int]:
    return (f(x), 1) if fx is None and product.uses_base else (fx, 0)


def _row_dot(left: Tensor, right: Tensor) -> Tensor:
    return (left.to(right.device) * right).flatten(1).sum(1)


def _stderr(draws: Tensor) -> Tensor | None:
    return draws.std(0) / math.sqrt(len(draws)) if len(draws) > 1 else None
