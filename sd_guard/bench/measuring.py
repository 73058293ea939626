"""Time, memory, lanes and floating-point operations of cases, and the ceiling that these are held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry

from sd_guard.bench.base import Case
from sd_guard.screening.loading import first_line

_SIZE: Final = {"cuda": 8192, "cpu": 512}  # of the ceiling's square matrices: enough to fill a GPU
_WAITS: Final = ("cudaStreamSynchronize", "cudaEventSynchronize")  # in a trace: the host waits for a result


class CountFlops(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention, backward and tangents included.

    By torch's own table, where the CPU's fused attention is missing. `FlopCounterMode` has the same one, but follows
    modules, which `torch.func` does not allow.
    """

    def __init__(self) -> None:
        """Starts at 0."""
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the operation, and counts it, or those that it is made of: inference mode leaves them together."""
        given, count = dict(kwargs or {}), flop_registry.get(func.overloadpacket)
        if count is None:
            with self:
                out = func.decompose(*args, **given)
            return func(*args, **given) if out is NotImplemented else out
        out = func(*args, **given)
        self.total += count(*args, **given, out_val=out)
        return out


@dataclass(slots=True)
class Count:
    """What one run spent.

    Attributes:
        lanes: rows that the UNet was given; one that is also differentiated counts once.
        flops: floating-point operations of all networks; None where they were not counted.
    """

    lanes: int = 0
    flops: int | None = None


@contextmanager
def counted(pipe: Any, *, flops: bool = True) -> Generator[Count, None, None]:
    """Counts what is run inside. A compiled UNet is run as it was before: its kernels show no operations.

    Args:
        pipe: whose UNet's lanes are counted.
        flops: whether operations are, too, which takes time for each of them.
    """
    found, unet = Count(), pipe.unet
    pipe.unet = getattr(unet, "_orig_mod", unet)

    def add(_module: Any, args: tuple[Any, ...]) -> None:
        found.lanes += args[0].shape[0]

    hook = pipe.unet.register_forward_pre_hook(add)
    try:
        with CountFlops() if flops else nullcontext() as counter:
            yield found
        found.flops = counter.total if counter is not None else None
    finally:
        hook.remove()
        pipe.unet = unet


@dataclass(frozen=True, slots=True)
class Run:
    """One timed run.

    Attributes:
        seconds: by CUDA events on a GPU, else by the clock.
        resident: bytes that were allocated before it; None on the CPU.
        peak: bytes at most; likewise.
    """

    seconds: float
    resident: int | None = None
    peak: int | None = None


def time_run(run: Callable[[], Any], device: torch.device) -> Run:
    """Times one run on a device that has nothing else to do; on a GPU it has to be the current one."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return Run(time.perf_counter() - started)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    resident = torch.cuda.memory_allocated(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return Run(start.elapsed_time(end) / 1000, resident, torch.cuda.max_memory_allocated(device))


@dataclass(slots=True)
class Measured:
    """What is known of a case so far.

    Attributes:
        case: that is measured.
        runs: timed ones.
        count: of one run; None before it was counted.
        figures: what examining and running it returned.
        waits: times that the host waited for the GPU in one run; None on the CPU, or where no trace was taken.
        failed: why it could not be measured, in one line; else None.
    """

    case: Case
    runs: list[Run] = field(default_factory=list[Run])
    count: Count | None = None
    figures: Mapping[str, Any] = field(default_factory=dict[str, Any])
    waits: int | None = None
    failed: str | None = None

    def attempt(self, action: Callable[[], None]) -> None:
        """Does something with the case; whatever a kernel, a compiler or the allocator raises ends its measurement."""
        if self.failed is None:
            try:
                action()
            except Exception as error:
                self.failed, self.runs = first_line(error), []
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def take_count(self, flops: bool) -> None:
        """Examines it, and runs it once, slowly where operations are counted."""
        examined = self.case.examine() if self.case.examine else {}
        with counted(self.case.pipe, flops=flops) as count:
            self.figures = {**examined, **(self.case.run() or {})}
        self.count = count

    def warm_up(self) -> None:
        """Runs it once."""
        self.case.run()

    def take_time(self, device: torch.device) -> None:
        """Runs it once by the clock."""
        self.runs.append(time_run(self.case.run, device))

    def take_trace(self, device: torch.device, path: Path) -> None:
        """Runs it once, and writes a trace for `chrome://tracing`."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=activities) as trace:
            self.case.run()
        trace.export_chrome_trace(str(path))
        if device.type == "cuda":
            self.waits = sum(event.count for event in trace.key_averages() if event.key in _WAITS)


def measure_by_turns(
    cases: Sequence[Case],
    device: torch.device,
    *,
    warmup: int,
    repeats: int,
    seconds: float | None = None,
    flops: bool = True,
    trace_path: Callable[[str], Path] | None = None,
) -> list[Measured]:
    """Counts, warms up and times cases, a run of each in turn, so that a clock that changes changes for all.

    Every other turn goes backwards: none has always the same before it.

    Args:
        cases: in order.
        device: of their pipelines.
        warmup: runs of each before the timed ones, besides the one that is counted.
        repeats: timed runs of each, at most.
        seconds: after which no other turn of timed runs is begun.
        flops: whether operations are counted.
        trace_path: from a case's name to the file of its profiler trace; None takes none.
    """
    found = [Measured(case) for case in cases]
    for each in found:
        each.attempt(partial(each.take_count, flops))
    for _ in range(warmup):
        for each in found:
            each.attempt(each.warm_up)
    started = time.monotonic()
    for turn in range(repeats):
        if turn and seconds is not None and time.monotonic() - started > seconds:
            break
        for each in found if turn % 2 == 0 else reversed(found):
            each.attempt(partial(each.take_time, device))
    if trace_path is not None:
        for each in found:
            each.attempt(partial(each.take_trace, device, trace_path(each.case.name)))
    return found


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square matrix product: what the networks' own are a share of."""
    size = _SIZE[device.type]
    matrices = {name: torch.randn(size, size, device=device, dtype=dtype) for name in ("a", "b")}
    timer = Timer("a @ b", globals=matrices, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=0.2 if device.type == "cuda" else 0.02).median


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; all the same of a single value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, middle, upper
