"""One suite from its settings to its lines."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Final, get_args

import torch

from sd_guard.bench.architectures import build_pipeline
from sd_guard.bench.base import Bench, Case, Suite, unmeasurable
from sd_guard.bench.jacobians import trace
from sd_guard.bench.measuring import matmul_ceiling, measure_by_turns
from sd_guard.bench.mitigation import mitigation
from sd_guard.bench.overhead import overhead
from sd_guard.bench.peers import peers
from sd_guard.bench.results import provenance, result_line
from sd_guard.bench.screen import screen
from sd_guard.bench.settings import BATCHES, BenchSettings, SuiteName
from sd_guard.screening.loading import check_compiler, first_line
from sd_guard.screening.settings import Dtype

SUITES: Final[dict[SuiteName, Suite]] = {
    "overhead": overhead,
    "trace": trace,
    "screen": screen,
    "mitigation": mitigation,
    "peers": peers,
}


def plan_device(settings: BenchSettings) -> torch.device:
    """The device to measure on, before anything is built.

    Raises:
        ValueError: It is not there, too slow for the architecture, or has no compiler.
    """
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        settings.check_on_cpu()
    else:
        device = torch.device("cuda", device.index or 0)
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"--device {settings.device or device} cannot be used ({first_line(error)}); use another"
            ) from error
    if settings.compile:
        check_compiler(device.type)
    return device


def run_bench(settings: BenchSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measures; yields each result when its group is done, and appends it to the file that was asked for.

    Args:
        settings: what is measured.
        device: as `plan_device` answers.

    Raises:
        ValueError: the model cannot be built.
    """
    where = provenance(device)
    current: AbstractContextManager[Any] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current:
        for dtype in settings.dtypes or _default_dtypes(settings, device):
            ceiling = matmul_ceiling(device, getattr(torch, dtype))
            for batch in settings.batches or BATCHES[settings.suite]:
                bench = Bench(settings, device, dtype, batch, _build(settings, device, dtype))
                for line in _measure(bench, ceiling):
                    line["provenance"] = where
                    if settings.out is not None:
                        with settings.out.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(line) + "\n")
                    yield line
                del bench
                gc.collect()  # compiled modules and hooks hold pipelines in cycles
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def _build(settings: BenchSettings, device: torch.device, dtype: Dtype) -> Any:
    try:
        return build_pipeline(settings.arch, device, dtype)
    except RuntimeError as error:  # out of memory
        raise ValueError(f"--arch {settings.arch}: cannot be built in {dtype} ({first_line(error)})") from error


def _measure(bench: Bench, ceiling: float) -> Iterator[dict[str, Any]]:
    settings = bench.settings
    path = None if settings.profile is None else partial(_trace_path, bench, settings.profile)
    for cases in _groups(bench):
        found = measure_by_turns(
            cases,
            bench.device,
            warmup=settings.warmup,
            repeats=settings.repeats,
            seconds=settings.seconds,
            flops=settings.flops,
            trace_path=path,
        )
        for measured in found:
            yield result_line(bench, measured, found[0], ceiling)


def _groups(bench: Bench) -> Iterator[Sequence[Case]]:
    """A suite's groups; one that cannot be set up is a case that says why, and the last."""
    try:
        yield from SUITES[bench.settings.suite](bench)
    except Exception as error:
        yield [unmeasurable("set-up", bench.pipe, first_line(error))]


def _default_dtypes(settings: BenchSettings, device: torch.device) -> tuple[Dtype, ...]:
    if settings.suite == "trace":
        return get_args(Dtype)
    return ("float16",) if device.type == "cuda" else ("float32",)


def _trace_path(bench: Bench, folder: Path, name: str) -> Path:
    parts = (bench.settings.suite, bench.settings.arch, bench.dtype, str(bench.batch), name)
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', ' '.join(parts))}.json"
