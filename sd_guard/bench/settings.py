"""What a benchmark is asked to do: checked before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias, cast, get_args

from sd_guard.screening.settings import Dtype

SuiteName: TypeAlias = Literal["overhead", "trace", "screen", "mitigation", "peers"]
Kernel: TypeAlias = Literal["matmul", "sdpa", "xformers", "compiled", "absent"]
Doubt: TypeAlias = Literal["none", "once", "all"]
Arch: TypeAlias = Literal["reference", "sd15", "sd21"]
BATCHES: Final[dict[SuiteName, tuple[int, ...]]] = {
    "overhead": (1, 4, 16),
    "trace": (4,),
    "screen": (16, 64, 256),
    "mitigation": (1, 4),
    "peers": (1,),
}
_DIFFERENTIATED: Final = ("trace", "peers")  # these differentiate through the UNet, which a compiled one may not allow


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """One suite on one architecture.

    Attributes:
        suite: What is measured.
        arch: `reference` is the bundled checkpoint; `sd15` and `sd21` are Stable Diffusion 1.5 and 2.1-base of random
            weights, on a GPU only.
        dtypes: Of the weights, measured one after the other; None for float16 on a GPU, float32 on the CPU, and all
            three in the suite `trace`.
        batches: Images (in the suite `screen`: prompts) a batch, >= 1, one after the other; None for the suite's own.
        kernels: What the suite `overhead` measures with, no UNet at all (`absent`) among them; None for all that there
            are, `compiled` only with `compile`.
        guards: What the suite `overhead` measures guarded calls with: no image in doubt, all of them once, or all to
            the last look; None for each.
        compile: Also with a compiled UNet (`overhead`), or with one only (`screen`, `mitigation`).
        steps: Sampling steps, >= 2.
        repeats: Timed runs of a case, >= 1.
        warmup: Runs before them, >= 0.
        seconds: That the timed runs of a group of cases may take, above 0; one of each is made anyway. None for as long
            as `repeats` take.
        flops: Whether operations are counted, in one slow run of each case.
        device: `cpu`, `cuda` or `cuda:N`; None for CUDA if there is one.
        out: A file to append the results to.
        profile: An existing folder to write a torch.profiler trace of each case to.

    Raises:
        ValueError: A value is out of its range, or does not go with the others.
    """

    suite: SuiteName
    arch: Arch = "reference"
    dtypes: tuple[Dtype, ...] | None = None
    batches: tuple[int, ...] | None = None
    kernels: tuple[Kernel, ...] | None = None
    guards: tuple[Doubt, ...] | None = None
    compile: bool = False
    steps: int = 50
    repeats: int = 10
    warmup: int = 3
    seconds: float | None = None
    flops: bool = True
    device: str | None = None
    out: Path | None = None
    profile: Path | None = None

    def __post_init__(self) -> None:
        """Checks every value that can be checked without torch."""
        for option, value, least in (
            ("steps", self.steps, 2),
            ("repeats", self.repeats, 1),
            ("warmup", self.warmup, 0),
        ):
            if value < least:
                raise ValueError(f"--{option} is {value}; use at least {least}")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"--seconds is {self.seconds}; use a number above 0")
        if self.suite == "peers" and self.batches not in (None, (1,)):
            raise ValueError("--batch: the suite peers looks at one prompt at a time; leave it out")
        if self.compile and self.suite in _DIFFERENTIATED:
            raise ValueError(f"--compile: the suite {self.suite} differentiates through the UNet; leave it out")
        for option, names in (("kernel", self.kernels), ("guard", self.guards)):
            if names is not None and self.suite != "overhead":
                raise ValueError(f"--{option}: the suite {self.suite} has its own; leave it out")
        if "compiled" in (self.kernels or ()) and not self.compile:
            raise ValueError("--kernel compiled: needs --compile")
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"--device is {self.device!r}; use cpu, cuda or cuda:N")
        if self.device == "cpu":
            self.check_on_cpu()
        if self.out is not None and (self.out.is_dir() or not self.out.parent.is_dir()):
            raise ValueError(f"--out {self.out}: is a folder, or in none that is there; name a file")
        if self.profile is not None and not self.profile.is_dir():
            raise ValueError(f"--profile {self.profile}: no such folder; make it first")

    def check_on_cpu(self) -> None:
        """Refuses what would take hours on a CPU.

        Raises:
            ValueError: A full-size architecture.
        """
        if self.arch != "reference":
            raise ValueError(f"--arch {self.arch} is for a CUDA device; on the CPU use --arch reference")


def read_batches(text: str | None) -> tuple[int, ...] | None:
    """Batch sizes of `1,4,16`; None for None.

    Raises:
        ValueError: It is no list of whole numbers of at least 1.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d{0,5}", part) for part in parts):
        raise ValueError(f"--batch is {text!r}; use whole numbers of at least 1, with commas, such as 1,4,16")
    return tuple(map(int, parts))


def read_dtypes(text: str | None) -> tuple[Dtype, ...] | None:
    """Dtypes of `float16,bfloat16`; None for None.

    Raises:
        ValueError: One is unknown.
    """
    return cast("tuple[Dtype, ...] | None", _read_names("--dtype", text, get_args(Dtype)))


def read_kernels(text: str | None) -> tuple[Kernel, ...] | None:
    """Kernels of `sdpa,compiled`; None for None.

    Raises:
        ValueError: One is unknown.
    """
    return cast("tuple[Kernel, ...] | None", _read_names("--kernel", text, get_args(Kernel)))


def read_guards(text: str | None) -> tuple[Doubt, ...] | None:
    """Guards of `none,once`; None for None.

    Raises:
        ValueError: One is unknown.
    """
    return cast("tuple[Doubt, ...] | None", _read_names("--guard", text, get_args(Doubt)))


def _read_names(option: str, text: str | None, known: Sequence[str]) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{option} is {unknown[0]!r}; use one or more of {', '.join(known)}, with commas")
    return names
