"""The suite `overhead`: guarded calls over unguarded ones with nothing flagged, by kernel.

By the kernels of attention, by compiled ones, and with a UNet that answers at once: what the guard adds to that is what
it costs beside its lanes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from sd_guard.bench.base import EVERYBODY, NOBODY, Bench, Case, compile_anew, unmeasurable
from sd_guard.bench.measuring import time_run
from sd_guard.bench.settings import Doubt, Kernel
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
    return compile_anew(_sdpa(unet))


def _absent(unet: Any) -> Any:
    """Answers with its input, at once: what is left of a call is the host's own time, and the decoder's."""
    shallow = copy.copy(unet)
    shallow.forward = lambda x, *_, **__: (x,)
    return shallow


KERNELS: Final[dict[Kernel, Callable[[Any], Any]]] = {
    "matmul": _matmul,
    "sdpa": _sdpa,
    "xformers": _xformers,
    "compiled": _compiled,
    "absent": _absent,
}
# All with nothing flagged: no image in doubt; each with one probe, at one step; each in doubt to the last look.
GUARDS: Final[dict[Doubt, tuple[str, Guard]]] = {
    "none": ("none in doubt", Guard(detector=NOBODY)),
    "once": ("all probed once", Guard(detector=EVERYBODY, probes=1, other_seeds=0)),
    "all": ("all in doubt", Guard(detector=EVERYBODY, look_at_all=True)),
}


def overhead(bench: Bench) -> Iterator[Sequence[Case]]:
    """A group a kernel: unguarded, and guarded in the ways of `GUARDS`."""
    parts = dict(bench.pipe.components)
    for kernel in _kernels(bench):
        try:
            parts["unet"] = KERNELS[kernel](bench.pipe.unet)
        except (ImportError, ValueError) as error:  # xformers is not installed, or does not know this GPU
            yield [unmeasurable(kernel, bench.pipe, first_line(error))]
            continue
        plain = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        plain.set_progress_bar_config(disable=True)
        cases = [_case(f"{kernel}, unguarded", plain, bench)]
        for name, guard in (GUARDS[each] for each in bench.settings.guards or GUARDS):
            pipe = GuardedStableDiffusionPipeline(**parts, requires_safety_checker=False)
            pipe.set_progress_bar_config(disable=True)
            pipe.enable_guard(guard)
            cases.append(_case(f"{kernel}, guarded, {name}", pipe, bench))
        yield cases


def _kernels(bench: Bench) -> list[Kernel]:
    """Those that were asked for, or all that can be measured."""
    if bench.settings.kernels is not None:
        return list(bench.settings.kernels)
    left_out = {"xformers"} if bench.device.type == "cpu" else set[str]()
    if not bench.settings.compile:
        left_out.add("compiled")
    return [kernel for kernel in KERNELS if kernel not in left_out]


def _case(name: str, pipe: Any, bench: Bench) -> Case:
    run, memory = partial(_sample, pipe, bench), partial(_memory, pipe, bench)
    return Case(name=name, pipe=pipe, run=run, examine=memory if bench.device.type == "cuda" else None)


def _sample(pipe: Any, bench: Bench) -> None:
    pipe(**bench.call())


def _memory(pipe: Any, bench: Bench) -> Mapping[str, Any]:
    """What is allocated at most without decoding, which takes more than all else and would hide it."""
    peak = time_run(lambda: pipe(**bench.call(), output_type="latent"), bench.device).peak
    return {"latents_peak_mib": (peak or 0) / 2**20}
