"""What a suite is given, and what it answers: cases, in groups that are timed by turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Final, TypeAlias

import torch

from sd_guard.bench.settings import BenchSettings
from sd_guard.detection import PrematureDetail
from sd_guard.reference import load_truth
from sd_guard.screening.settings import Dtype

# Flag nothing, and are in doubt of no image, or of every one to the last question.
NOBODY: Final = PrematureDetail(threshold=math.inf, doubt=math.inf)
EVERYBODY: Final = PrematureDetail(threshold=math.inf, doubt=-math.inf, undecided=(-math.inf, math.inf))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Something that is timed.

    Attributes:
        name: of its line.
        pipe: the pipeline whose UNet calls are counted.
        run: does it once; what it returns goes into the line.
        examine: finds out what else goes there; neither counted nor timed.
    """

    name: str
    pipe: Any
    run: Callable[[], Mapping[str, Any] | None]
    examine: Callable[[], Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Bench:
    """What a suite measures with, at one dtype and batch size.

    Attributes:
        settings: what was asked for.
        device: of the pipeline.
        dtype: of its weights.
        batch: images, or prompts.
        pipe: a guarded pipeline; a suite may change its guard, UNet and attention.
    """

    settings: BenchSettings
    device: torch.device
    dtype: Dtype
    batch: int
    pipe: Any

    def call(self) -> dict[str, Any]:
        """Arguments of a pipeline's call for a batch of images, the same each time."""
        return {
            "prompt": prompts(self.batch),
            "num_inference_steps": self.settings.steps,
            "generator": [torch.Generator().manual_seed(seed) for seed in range(self.batch)],
        }


Suite: TypeAlias = Callable[[Bench], Iterator[Sequence[Case]]]  # a group's first case is what the others are held to


def compile_anew(unet: Any) -> Any:
    """The UNet, compiled, with no graph of another batch size at hand: torch would make one for any number of rows."""
    torch.compiler.reset()
    return torch.compile(getattr(unet, "_orig_mod", unet))


def unmeasurable(name: str, pipe: Any, reason: str) -> Case:
    """A case that fails, so that its line says why."""

    def run() -> None:
        raise ValueError(reason)

    return Case(name=name, pipe=pipe, run=run)


def prompts(count: int) -> list[str]:
    """Different ordinary prompts."""
    novel = [row["prompt"] for row in load_truth() if (row["family"], row["split"]) == ("novel", "tune")]
    return [f"{prompt} {place // len(novel)}" for place, prompt in enumerate(islice(cycle(novel), count))]
