"""The suite `screen`: quick depth over the bare UNet at the same lanes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sd_guard.bench.base import EVERYBODY, NOBODY, Bench, Case, compile_anew, prompts
from sd_guard.bench.measuring import counted
from sd_guard.lanes import Conditioning, evaluate_lanes
from sd_guard.reference import checkpoint_path
from sd_guard.screening.quick import QUICK, QuickScreener
from sd_guard.screening.settings import ModelSettings


def screen(bench: Bench) -> Iterator[Sequence[Case]]:
    """With no prompt in doubt, and with every one; a seed's control is there already, as of the second batch on.

    Two batches by turns, each expected while the other is screened, as `sd-guard screen` has it.

    `prompts` over `seconds` is the throughput. `flops` are the UNet's: prompts are encoded on another thread.
    """
    bench.pipe.unet.to(memory_format=torch.channels_last)  # as `sd-guard screen` loads it for quick depth
    if bench.settings.compile:
        bench.pipe.unet = compile_anew(bench.pipe.unet)
    texts = prompts(2 * bench.batch)
    # Of the model settings only those of sampling are read: the pipeline is there.
    model = ModelSettings(model=str(checkpoint_path()), steps=bench.settings.steps, dtype=bench.dtype)
    for name, detector in (("none in doubt", NOBODY), ("all in doubt", EVERYBODY)):
        guard = replace(QUICK, detector=replace(detector, threshold=QUICK.detector.threshold))
        screener = QuickScreener.make(bench.pipe, model, batch_size=bench.batch, guard=guard)
        run = partial(_screen, screener, [texts[: bench.batch], texts[bench.batch :]])
        run()  # evaluates the control
        with counted(bench.pipe, flops=False) as spent:
            run()
        yield [
            Case(name=f"bare UNet, {name}", pipe=bench.pipe, run=_bare(bench, screener, spent.lanes // bench.batch)),
            Case(name=f"quick depth, {name}", pipe=bench.pipe, run=run),
        ]


def _screen(screener: QuickScreener, batches: list[list[str]]) -> Mapping[str, Any]:
    texts, following = batches
    batches.reverse()
    screener.encoder.expect(following)
    records = screener.measure(texts, [0] * len(texts))
    return {"prompts": len(texts), "extra_lanes": sum(record.extra_lanes for record in records) / len(records)}


def _bare(bench: Bench, screener: QuickScreener, calls: int) -> Any:
    """As many UNet calls of the same shape, on noise and texts of their own, and nothing else.

    As quick depth makes them, in inference mode: a compiled UNet is then one graph for both. Zeros would be multiplied
    faster.
    """
    with torch.inference_mode():
        like = screener.empty
        x = torch.randn(bench.batch, *screener.noise_shape, device=like.device, dtype=like.dtype)
        lanes = Conditioning(bench.pipe.encode_prompt(prompts(bench.batch), like.device, 1, False)[0])
    timestep = screener.observed[-1].timestep

    @torch.inference_mode()
    def run() -> Mapping[str, Any]:
        for _ in range(calls):
            evaluate_lanes(bench.pipe.unet, x, timestep, lanes)
        return {"prompts": bench.batch}

    return run
