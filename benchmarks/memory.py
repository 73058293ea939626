"""Peak memory of what takes gradients, beside that of one more batch: `python -m benchmarks.memory`.

Every image is flagged, and the mitigation alone is the plan, with one Adam step. What torch allocates beyond the
weights is counted, on the CPU by the profiler's events; how many sampling steps there are does not matter to it.
Latents are returned: decoding takes more than all else at this size. `of_one_more_batch` is what a mitigation adds to
the peak of the unguarded call, over what one more batch of the same size would add.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.results import append_result, write_result
from sd_guard import mitigation as m
from sd_guard.bench.architectures import build_pipeline
from sd_guard.bench.base import NOBODY, prompts
from sd_guard.bench.measuring import time_run
from sd_guard.bench.mitigation import TakeAnything
from sd_guard.guard import Guard
from sd_guard.mitigation.optimisation import OBJECTIVES

STEPS, MIB = 4, 2**20
PROBED = ("trajectory_lid", "flipd")
PLANS: dict[str, m.Mitigation] = {
    **{f"embedding_optimisation, {name}": m.EmbeddingOptimisation(statistic=name, steps=(1,)) for name in OBJECTIVES},
    "noise_optimisation, sharpness": m.NoiseOptimisation(steps=(1,)),
    **{
        f"noise_optimisation, {name}": m.NoiseOptimisation(statistic=name, steps=(1,)) for name in ("cfg_norm", *PROBED)
    },
    **{
        f"token_replacement, {name}": m.TokenReplacement(words=(1,), statistic=name)
        for name in ("added_detail", "flipd")
    },
}


def allocated_mib(run: Callable[[], Any], device: torch.device) -> float:
    """What was allocated at most beyond what was there before."""
    if device.type == "cuda":
        timed = time_run(run, device)
        return ((timed.peak or 0) - (timed.resident or 0)) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    found = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((event for event in found if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / MIB


def measure(pipe: Any, batch: int, device: torch.device) -> dict[str, Any]:
    """The unguarded call, one of twice the size, and each mitigation."""

    def call(count: int) -> Any:
        seeds = [torch.Generator().manual_seed(seed) for seed in range(count)]
        return pipe(prompt=prompts(count), num_inference_steps=STEPS, generator=seeds, output_type="latent")

    pipe.disable_guard()
    alone, twice = (allocated_mib(lambda count=count: call(count), device) for count in (batch, 2 * batch))
    found = {"batch": batch, "unguarded_mib": round(alone, 1), "one_more_batch_mib": round(twice - alone, 1)}
    print(found, flush=True)
    policy = TakeAnything(budget=10_000, max_attempts=1, max_resemblance=1.0, on_failure="keep")
    lines = {}
    for name, mitigation in {"none": None, **PLANS}.items():
        plan = () if mitigation is None else (mitigation,)
        detector = replace(NOBODY, threshold=-math.inf)
        pipe.enable_guard(replace(Guard(), plan=plan, policy=policy, detector=detector))
        told: list[Any] = []
        peak = allocated_mib(lambda told=told: told.extend(call(batch).records), device)
        lines[name] = {
            "peak_mib": round(peak, 1),
            "of_one_more_batch": round((peak - alone) / (twice - alone), 3),
            "attempts": sum(len(record.attempts) for record in told),
        }
        print(name, lines[name], flush=True)
    return {**found, "lines": lines}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sd15", choices=("sd15", "sd21", "reference"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="memory", help="of the result file")
    parser.add_argument("--append", type=Path, help="file that a line is added to, instead of a result file")
    args = parser.parse_args()
    device = torch.device(args.device)
    pipe = build_pipeline(args.arch, device, args.dtype)
    found = [measure(pipe, batch, device) for batch in args.batches]
    settings = {"arch": args.arch, "steps": STEPS, "weights": "bundled" if args.arch == "reference" else "random"}
    result = {"suite": "memory", "settings": settings, "batches": found}
    if args.append:
        print(append_result(args.append, result, dtype=args.dtype))
    else:
        print(write_result(args.name, result, dtype=args.dtype))


if __name__ == "__main__":
    main()
