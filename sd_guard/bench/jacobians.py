"""The suite `trace`: what a Jacobian product costs and how far it is off, by method, dtype and step size.

The error of a product is that of arithmetic alone: the same probe vectors at the same latents, against exact products
in float32 of the same weights. The error of the guard's probes is against the mean of 256 exact ones. Both are
shares of the latent dimension, as the detector weighs the LID. The weights of a full-size architecture are random, so
that its times are those of the real one, and its errors are not.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Final

import torch
from torch import Tensor

from sd_guard.bench.architectures import build_pipeline
from sd_guard.bench.base import Bench, Case, prompts
from sd_guard.bench.settings import Arch
from sd_guard.guard import Guard
from sd_guard.lanes import Conditioning, call_unet
from sd_guard.noise import NoiseLevel, at_least_float32, interpret
from sd_guard.pipelines.inputs import prediction_type
from sd_guard.pipelines.trajectory import walk
from sd_guard.trace import FiniteDifference, ForwardMode, JacobianProduct, ReverseMode, RowFunction, draw_row_probes

REFERENCE_PROBES: Final = 256
COMPARED: Final = 16  # of these, those that every method is compared on
_POWERS: Final = range(0, 15, 2)  # of one half: step sizes


@dataclass(frozen=True, slots=True)
class Point:
    """Where the Jacobian is taken: the guard's deciding step of plain trajectories in float32.

    Attributes:
        x: (B, C, H, W) UNet inputs.
        timestep: scalar.
        level: of `x`.
        products: (256, B) exact ``v . (J v)`` of the noise prediction with the prompt.
    """

    x: Tensor
    timestep: Tensor
    level: NoiseLevel
    products: Tensor


def trace(bench: Bench) -> Iterator[Sequence[Case]]:
    """One plain evaluation and every method; in float32 on a GPU, with the host's TF32 convolutions and without."""
    point = reference_point(bench.settings.arch, bench.device, bench.batch, bench.settings.steps)
    x = point.x.to(getattr(torch, bench.dtype))
    f = noise_function(bench.pipe, point, bench.batch)
    rounded = bench.dtype == "float32" and bench.device.type == "cuda" and torch.backends.cudnn.allow_tf32
    for tf32 in (True, False) if rounded else (False,):
        with tf32_convolutions(tf32):
            yield list(_cases(bench, f, x, point, tf32))


def methods() -> dict[str, JacobianProduct]:
    """Every method by its name: finite differences at their default step and at a range of steps, and exact ones."""
    return {
        "finite-difference": FiniteDifference(),
        **{f"finite-difference, step 2^-{power}": FiniteDifference(step=2.0**-power) for power in _POWERS},
        "central": FiniteDifference("central"),
        "forward-mode": ForwardMode(),
        "reverse-mode": ReverseMode(),
    }


@cache  # all dtypes are held against the same
def reference_point(arch: Arch, device: torch.device, batch: int, steps: int) -> Point:
    """Exact products of 256 probes, by forward mode in full float32."""
    pipe, last = build_pipeline(arch, device, "float32"), Guard().steps(steps)[-1]
    with tf32_convolutions(False):
        calls = walk(pipe, prompts(batch), range(batch), steps=steps)
        call = next(call for call in calls if call.step == last)
        nothing = torch.empty(0, batch, device=device)
        point = Point(call.x, call.timestep, call.level, nothing)
        f = noise_function(pipe, point, batch)
        products = quadratic_forms(ForwardMode(), f, call.x, None, REFERENCE_PROBES)
    return Point(call.x, call.timestep, call.level, products)


def noise_function(pipe: Any, point: Point, batch: int) -> RowFunction:
    """e_hat with the prompt as a function of the UNet's input, which gradients go through where they are asked for."""
    with torch.no_grad():
        lanes = Conditioning(pipe.encode_prompt(prompts(batch), point.x.device, 1, False)[0])
    kind = prediction_type(pipe)
    return lambda x: interpret(call_unet(pipe.unet, x, point.timestep, lanes), x, point.level, kind).e_hat


def quadratic_forms(product: JacobianProduct, f: RowFunction, x: Tensor, fx: Tensor | None, count: int) -> Tensor:
    """(count, B) ``v . (J v)`` of the first probes, float32."""
    found: list[Tensor] = []
    for probe in range(count):
        v = _probes(x, probe)
        found.append((v * at_least_float32(product(f, x, v, fx))).flatten(1).sum(1))
    return torch.stack(found)


@contextmanager
def tf32_convolutions(allowed: bool) -> Generator[None, None, None]:
    """Whether convolutions in float32 may be rounded to ten bits, as torch lets a GPU do unless told otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _probes(x: Tensor, probe: int) -> Tensor:
    return draw_row_probes(range(len(x)), x.shape[1:], 0, x.device, probe)


def _cases(bench: Bench, f: RowFunction, x: Tensor, point: Point, tf32: bool) -> Iterator[Case]:
    """A plain evaluation, and one product of every method."""
    fx, v, common = f(x), _probes(x, 0), {"tf32_convolutions": tf32}

    def errors(product: JacobianProduct) -> dict[str, Any]:
        return common | errors_of(quadratic_forms(product, f, x, fx, COMPARED), point, x[0].numel())

    def multiply(product: JacobianProduct) -> None:
        product(f, x, v, fx)  # which the sampler has already

    def evaluate() -> None:
        f(x)

    yield Case(name="evaluation", pipe=bench.pipe, run=evaluate, examine=lambda: common)
    for name, product in methods().items():
        yield Case(name=name, pipe=bench.pipe, run=partial(multiply, product), examine=partial(errors, product))


def errors_of(found: Tensor, point: Point, dimension: int) -> dict[str, float]:
    """Root mean squares over images and probes, as shares of the latent dimension.

    Args:
        found: (`COMPARED`, B) a method's products of the first probes.
        point: where they were taken.
        dimension: entries of a latent.
    """
    scale, probes = point.level.s / dimension, Guard().probes
    arithmetic = found - point.products[:COMPARED]
    pairs = found.reshape(-1, probes, found.shape[1]).mean(1)
    stderr = point.products.std(0) / REFERENCE_PROBES**0.5
    return {
        "error": float(arithmetic.square().mean().sqrt()) * scale,
        f"error_{probes}_probes": float((pairs - point.products.mean(0)).square().mean().sqrt()) * scale,
        "reference_stderr": float(stderr.mean()) * scale,
    }
