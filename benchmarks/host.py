"""What a guarded call costs the host beside its lanes: `python -m benchmarks.host`.

Of a UNet that answers at once, with as many weights as Stable Diffusion 1.5 has, which are uninitialised, and latents
so small that computing with them takes no time: what is left is Python and the dispatch of operations, which a GPU
waits for or hides. Guarded and unguarded calls by turns, no image in doubt or within reach of a later look;
`taken_apart` says how often the guard did what, and for how long. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from diffusers import StableDiffusionPipeline
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.results import write_result
from sd_guard.bench.architectures import ARCHITECTURES, build_networks, build_pipeline
from sd_guard.bench.base import NOBODY, prompts
from sd_guard.bench.overhead import KERNELS
from sd_guard.guard import Guard
from sd_guard.pipelines import session, stable_diffusion
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline

SIDE: Final = 64  # pixels of an image: latents of 8 x 8
STEPS: Final = 50
PARTS: Final = (
    (stable_diffusion, "take_fingerprint"),
    (session, "observe_all"),
    (session, "look_again"),
    (session, "decide"),
    (session.Session, "on_step_end"),
)


class CountOperations(TorchDispatchMode):
    """Counts what is dispatched: on a GPU most of it is a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def build() -> tuple[StableDiffusionPipeline, GuardedStableDiffusionPipeline]:
    """The bundled pipeline on a UNet of full size, which is not run; unguarded, and guarded."""
    parts = dict(build_pipeline("reference", torch.device("cpu"), "float32").components)
    full = build_networks(ARCHITECTURES["sd15"], torch.device("meta"), torch.bfloat16)["unet"].to_empty(device="cpu")
    parts["unet"] = KERNELS["absent"](full.requires_grad_(False))
    plain = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    guarded = GuardedStableDiffusionPipeline(**parts, requires_safety_checker=False)
    guarded.enable_guard(Guard(detector=NOBODY))
    for pipe in (plain, guarded):
        pipe.set_progress_bar_config(disable=True)
    return plain, guarded


def sample(pipe: Any, texts: Sequence[str]) -> float:
    """Seconds of a call."""
    generators = [torch.Generator().manual_seed(place) for place in range(len(texts))]
    size = {"height": SIDE, "width": SIDE, "output_type": "latent"}
    started = time.perf_counter()
    pipe(list(texts), num_inference_steps=STEPS, generator=generators, **size)
    return time.perf_counter() - started


def count_operations(pipe: Any, texts: Sequence[str]) -> int:
    """Of a call."""
    with CountOperations() as counter:
        sample(pipe, texts)
    return counter.count


def take_apart(pipe: Any, texts: Sequence[str], calls: int) -> dict[str, dict[str, float]]:
    """How often a call does each of `PARTS`, and for how many milliseconds in all, median over calls."""
    spent: dict[str, list[float]] = {name: [] for _, name in PARTS}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name].append(time.perf_counter() - started)

        return run

    originals = [(owner, name, getattr(owner, name)) for owner, name in PARTS]
    for owner, name, function in originals:
        setattr(owner, name, timed(name, function))
    found: dict[str, list[tuple[int, float]]] = {name: [] for _, name in PARTS}
    try:
        for _ in range(calls):
            for own in spent.values():
                own.clear()
            sample(pipe, texts)
            for name, own in spent.items():
                found[name].append((len(own), 1000 * sum(own)))
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)
    return {
        name: {"times": own[-1][0], "milliseconds": round(statistics.median(ms for _, ms in own), 2)}
        for name, own in found.items()
    }


def measure(batch: int, pairs: int) -> dict[str, Any]:
    """One line of the result."""
    plain, guarded = build()
    texts = prompts(batch)
    for pipe in (plain, guarded):  # the first reads the weights
        sample(pipe, texts)
    without, more = [], []
    for _ in range(pairs):
        without.append(sample(plain, texts))
        more.append(sample(guarded, texts) - without[-1])
    return {
        "batch": batch,
        "unguarded_milliseconds": round(1000 * statistics.median(without), 2),
        "guard_milliseconds": round(1000 * statistics.median(more), 2),
        "guard_milliseconds_quartiles": [round(1000 * each, 2) for each in statistics.quantiles(more, n=4)[::2]],
        "guard_operations": count_operations(guarded, texts) - count_operations(plain, texts),
        "taken_apart": take_apart(guarded, texts, 9),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--pairs", type=int, default=41)
    args = parser.parse_args()
    lines = [measure(batch, args.pairs) for batch in args.batches]
    for line in lines:
        print(line)
    settings = {"steps": STEPS, "weights_of": "sd15", "latents": SIDE // 8, "pairs": args.pairs}
    print(write_result("host", {"settings": settings, "batches": lines}, dtype="bfloat16"))


if __name__ == "__main__":
    main()
