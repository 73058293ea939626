"""The suite `overhead`: guarded calls over unguarded ones with nothing flagged, by attention kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from sd_guard.bench.base import EVERYBODY, NOBODY, Bench, Case, unmeasurable
from sd_guard.guard import Guard
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.screening.loading import first_line


def _matmul(unet: Any) -> Any:
    """The stock attention of before torch 2: matrix products and a softmax."""
    unet.set_attn_processor(AttnProcessor())
    return unet


def _sdpa(unet: Any) -> Any:
    """`scaled_dot_product_attention`, the host's own choice on torch 2."""
    unet.set_attn_processor(AttnProcessor2_0())
    return unet


def _xformers(unet: Any) -> Any:
    unet.enable_xformers_memory_efficient_attention()
    return unet


def _compiled(unet: Any) -> Any:
    return torch.compile(_sdpa(unet))


KERNELS: Final[dict[str, Callable[[Any], Any]]] = {
    "matmul": _matmul,
    "sdpa": _sdpa,
    "xformers": _xformers,
    "compiled": _compiled,
}


def overhead(bench: Bench) -> Iterator[Sequence[Case]]:
    """A group a kernel: unguarded, guarded with no image in doubt, and with every image in doubt, which is the most."""
    left_out = {"xformers"} if bench.device.type == "cpu" else set[str]()
    if not bench.settings.compile:
        left_out.add("compiled")
    parts = dict(bench.pipe.components)
    for kernel, prepare in KERNELS.items():
        if kernel in left_out:
            continue
        try:
            parts["unet"] = prepare(bench.pipe.unet)
        except (ImportError, ValueError) as error:  # xformers is not installed, or does not know this GPU
            yield [unmeasurable(kernel, bench.pipe, first_line(error))]
            continue
        plain = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        plain.set_progress_bar_config(disable=True)
        cases = [Case(name=f"{kernel}, unguarded", pipe=plain, run=partial(_sample, plain, bench))]
        for name, detector in (("none in doubt", NOBODY), ("all in doubt", EVERYBODY)):
            pipe = GuardedStableDiffusionPipeline(**parts, requires_safety_checker=False)
            pipe.set_progress_bar_config(disable=True)
            pipe.enable_guard(Guard(detector=detector))
            cases.append(Case(name=f"{kernel}, guarded, {name}", pipe=pipe, run=partial(_sample, pipe, bench)))
        yield cases


def _sample(pipe: Any, bench: Bench) -> None:
    pipe(**bench.call())
