"""The command that measures what the guard costs: bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sd_guard.bench.settings import Arch, BenchSettings, SuiteName, read_batches, read_dtypes, read_guards, read_kernels
from sd_guard.cli.options import BAD_ARGUMENTS, FAILED, INTERRUPTED, Steps, fail, one_line


def bench(
    suite: Annotated[SuiteName, typer.Option(help="What is measured.")],
    arch: Annotated[Arch, typer.Option(help="sd15 and sd21: full size, random weights, on a GPU.")] = "reference",
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights, with commas.  [default: float16; trace: all; CPU: float32]")
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Batch sizes, with commas.  [default: the suite's]")] = None,
    kernel: Annotated[
        str | None,
        typer.Option(help="overhead: of matmul,sdpa,xformers,compiled,absent, with commas.  [default: all]"),
    ] = None,
    guard: Annotated[
        str | None, typer.Option(help="overhead: of none,once,all (in doubt), with commas.  [default: all three]")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the UNet; overhead: also.")] = False,
    steps: Steps = 50,
    repeats: Annotated[int, typer.Option(help="Timed runs of each case.")] = 10,
    warmup: Annotated[int, typer.Option(help="Runs of each case before them.")] = 3,
    seconds: Annotated[
        float | None, typer.Option(help="For the timed runs of cases that take turns, at most.  [default: no limit]")
    ] = None,
    flops: Annotated[bool, typer.Option(help="Count operations, in one slow run of each case.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.  [default: cuda if there is one]")] = None,
    out: Annotated[Path | None, typer.Option(help="A file to append the results to.")] = None,
    profile: Annotated[Path | None, typer.Option(help="A folder for a profiler trace of each case.")] = None,
) -> None:
    """Measure what the guard costs: time, lanes, memory, operations.

    One JSON line a result. Nothing is downloaded. On the CPU only the bundled model is measured.
    """
    with one_line(BAD_ARGUMENTS):
        settings = BenchSettings(
            suite=suite,
            arch=arch,
            dtypes=read_dtypes(dtype),
            batches=read_batches(batch),
            kernels=read_kernels(kernel),
            guards=read_guards(guard),
            compile=compile,
            steps=steps,
            repeats=repeats,
            warmup=warmup,
            seconds=seconds,
            flops=flops,
            device=device,
            out=out,
            profile=profile,
        )
        from sd_guard.screening.loading import silence

        silence()
        from sd_guard.bench.run import plan_device, run_bench

        place = plan_device(settings)
    failed = measured = 0
    with one_line(FAILED):
        try:
            for line in run_bench(settings, place):
                typer.echo(json.dumps(line))
                failed, measured = failed + bool(line["failed"]), measured + 1
        except KeyboardInterrupt:
            fail(INTERRUPTED, f"interrupted after {measured} results")
    if failed:
        fail(FAILED, f"{failed} of {measured} cases could not be measured: their lines say why, in `failed`")
