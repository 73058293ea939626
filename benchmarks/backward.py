"""What the backward pass of one lane costs, in lanes: `python -m benchmarks.backward`.

Beside a forward pass without gradients of the same call, median of several; blocks are recomputed, as mitigations that
take gradients have it. On the CPU the time of one thread; on a GPU what its clock says. `sd_guard` bills
`BACKWARD_LANES` for it, whatever the model is.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.results import write_result
from sd_guard.bench.architectures import build_pipeline
from sd_guard.bench.base import NOBODY, prompts
from sd_guard.guard import Guard
from sd_guard.mitigation import Change, Subject
from sd_guard.mitigation.base import BACKWARD_LANES
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline

STEPS = 4


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of the thread, or of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    started = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


@dataclass(frozen=True)
class Timed:
    """Proposes nothing, and times the subject's model with and without a gradient in the text."""

    repeats: int
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)

    def propose(self, subject: Subject) -> Iterator[Change]:
        latents, device = subject.latents[None], subject.latents.device

        def with_gradient() -> None:
            text = subject.prompt_embeds[None].detach().float().requires_grad_()
            subject.denoise(text.to(subject.prompt_embeds.dtype), latents).e_hat.square().sum().backward()

        def without() -> None:
            subject.denoise(subject.prompt_embeds[None], latents)

        for _ in range(self.repeats + 1):  # the first warms up
            with torch.no_grad():
                self.forward.append(seconds(without, device))
            with torch.enable_grad():
                self.both.append(seconds(with_gradient, device))
        yield from ()


def measure(pipe: Any, size: int | None, repeats: int) -> dict[str, Any]:
    """One image of so many pixels a side."""
    timed = Timed(repeats)
    guard = replace(Guard(), plan=(timed,), detector=replace(NOBODY, threshold=-math.inf))
    pipe.enable_guard(guard, budget=100_000)
    pipe(prompt=prompts(1), num_inference_steps=STEPS, height=size, width=size, output_type="latent")
    pairs = list(zip(timed.forward, timed.both, strict=True))[1:]
    ratios = sorted((both - forward) / forward for forward, both in pairs)
    return {
        "backward_lanes": round(median(ratios), 3),
        "range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "forward_seconds": round(median(timed.forward[1:]), 4),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--size", type=int, default=256, help="pixels a side of the full-size architecture")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="backward", help="of the result file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    first = Path(__file__).parent / "reference" / "first"
    lines: dict[str, Any] = {}
    for name, size in (("bundled", None), ("first", None), ("sd15", args.size)):
        if name == "first":
            pipe: Any = GuardedStableDiffusionPipeline.from_pretrained(
                first, torch_dtype=getattr(torch, args.dtype), use_safetensors=True, local_files_only=True
            ).to(device)
            pipe.set_progress_bar_config(disable=True)
            pipe.unet.requires_grad_(False)
        else:
            pipe = build_pipeline("reference" if name == "bundled" else "sd15", device, args.dtype)
        lines[name] = {"pixels": size, **measure(pipe, size, args.repeats)}
        print(name, lines[name], flush=True)
    settings = {"repeats": args.repeats, "threads": 1, "billed": BACKWARD_LANES}
    print(write_result(args.name, {"settings": settings, "lines": lines}, dtype=args.dtype))


if __name__ == "__main__":
    main()
