"""The suite `peers`: published detectors at their published settings, a prompt at a time, on the same weights.

Each is written from its paper or the authors' published code, on this package's own parts. The baseline is an unguarded
image. FLIPD looks at a finished image, whose sampling is not in its time; all others start from noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from sd_guard.bench.architectures import build_pipeline
from sd_guard.bench.base import EVERYBODY, Bench, Case, prompts
from sd_guard.guard import Guard
from sd_guard.lanes import Conditioning
from sd_guard.pipelines.trajectory import denoiser_of, walk
from sd_guard.pipelines.watching import Watching
from sd_guard.reference import checkpoint_path
from sd_guard.screening.quick import QUICK, QuickScreener
from sd_guard.screening.settings import ModelSettings
from sd_guard.statistics import lid
from sd_guard.statistics.dimension import TrajectoryLid
from sd_guard.statistics.flipd_curve import predict_at
from sd_guard.statistics.guidance import CfgNorm
from sd_guard.statistics.hessian import HessianScoreNorm
from sd_guard.trace import ForwardMode

IMAGES: Final = 4  # that Wen et al. and Jeon et al. look at for a prompt
_TIMESTEP: Final = 50  # of 1000, where FLIPD is taken; any costs the same
_AT_ONCE: Final = 10  # probes: attention by the math kernel keeps five matrices of 512 MiB for each, at full size


def peers(bench: Bench) -> Iterator[Sequence[Case]]:
    """One group: an unguarded image, the guard, the others."""
    bench.pipe.disable_guard()
    exact = bench.pipe if bench.dtype == "float32" else build_pipeline(bench.settings.arch, bench.device, "float32")
    runs: dict[str, tuple[Any, Callable[[], object]]] = {
        "unguarded image": (bench.pipe, lambda: bench.pipe(**bench.call())),
        "guard, quick depth": (bench.pipe, quick_depth(bench)),
        "guard, trajectory LID, 1 probe": (bench.pipe, probe_once(bench)),
        "guard, first decision, all in doubt": (bench.pipe, partial(first_decision, bench, 1)),
        f"guard, first decision, all in doubt, {IMAGES} images": (bench.pipe, partial(first_decision, bench, IMAGES)),
        f"wen, first step, {IMAGES} images": (bench.pipe, partial(wen, bench, 1)),
        f"wen, all steps, {IMAGES} images": (bench.pipe, partial(wen, bench, bench.settings.steps)),
        f"sail, forward mode, {IMAGES} images": (bench.pipe, partial(sail, bench.pipe, bench)),
        # Its authors' code multiplies under autocast to float32.
        f"sail, forward mode, {IMAGES} images, float32": (exact, partial(sail, exact, bench)),
        "flipd, 1 Gaussian probe, forward mode, float32": (exact, partial(flipd, exact, 1)),
        "flipd, 50 Gaussian probes, forward mode, float32": (exact, partial(flipd, exact, 50)),
    }
    if exact is bench.pipe:
        del runs[f"sail, forward mode, {IMAGES} images"]
    yield [Case(name=name, pipe=pipe, run=partial(_only, run)) for name, (pipe, run) in runs.items()]


def quick_depth(bench: Bench) -> Callable[[], object]:
    """The guard's own score from one noise level; the control of the seed is there already."""
    model = ModelSettings(model=str(checkpoint_path()), steps=bench.settings.steps, dtype=bench.dtype)
    screener = QuickScreener.make(bench.pipe, model, batch_size=1, guard=QUICK)
    screener.measure(prompts(1), [0])
    return lambda: screener.measure(prompts(1), [0])


def probe_once(bench: Bench) -> Callable[[], object]:
    """The trajectory LID with the prompt, on top of a step that the sampler has made."""
    call = next(walk(bench.pipe, prompts(1), [0], steps=bench.settings.steps))
    return partial(TrajectoryLid(probes=1).measure, call, denoiser_of(bench.pipe, [0]))


def first_decision(bench: Bench, images: int) -> list[float]:
    """Scores at the guard's deciding step, with probes for every image."""
    seeds, guard, steps = range(images), Guard(detector=EVERYBODY), bench.settings.steps
    watching = Watching(guard, denoiser_of(bench.pipe, seeds), guard.steps(steps), [])
    for call in walk(bench.pipe, prompts(1) * images, seeds, steps=steps):
        if (decided := watching.watch(call)) is not None:
            return decided[0]
    raise AssertionError("the deciding step is one of the schedule")


def wen(bench: Bench, steps: int) -> float:
    """Wen et al. (2024, arXiv 2407.21720): the CFG norm of a prompt's images, mean over the first steps."""
    model, norms = denoiser_of(bench.pipe, range(IMAGES)), list[Tensor]()
    for call in walk(bench.pipe, prompts(1) * IMAGES, range(IMAGES), steps=bench.settings.steps):
        norms.append(CfgNorm().measure(call, model))
        if len(norms) == steps:
            break
    return float(torch.stack(norms).mean())


def sail(pipe: Any, bench: Bench) -> float:
    """Jeon et al. (2025, arXiv 2412.04140): the sharpness metric at the first step, by exact products."""
    call = next(walk(pipe, prompts(1) * IMAGES, range(IMAGES), steps=bench.settings.steps))
    statistic = HessianScoreNorm(product=ForwardMode())
    return float(statistic.measure(call, denoiser_of(pipe, range(IMAGES))).mean())


@torch.no_grad()
def flipd(pipe: Any, probes: int) -> float:
    """Kamkari et al. (2024, arXiv 2406.03537) with the prompt, at a latent of an image's scale.

    Many probes in one call, as in the authors' published code (layer6ai-labs/dgm_geometry): as many as keep a GPU busy
    and fit into it.
    """
    unet, device, generator = pipe.unet, pipe._execution_device, torch.Generator().manual_seed(0)
    shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    text, model = pipe.encode_prompt(prompts(1), device, 1, False)[0], denoiser_of(pipe, [0])
    level, predict = predict_at(model, _TIMESTEP, Conditioning(text))
    x = level.a * torch.randn(shape, generator=generator, device="cpu").to(device)
    v = torch.randn(probes, *shape[1:], generator=generator, device="cpu").to(device)
    found: list[Tensor] = []
    for some in v.split(_AT_ONCE):
        _, predict_all = predict_at(model, _TIMESTEP, Conditioning(text.expand(len(some), -1, -1)))
        found.append((some * ForwardMode()(predict_all, x.expand_as(some).contiguous(), some)).flatten(1).sum(1))
    return float(lid.flipd(x.numel(), level.s, torch.cat(found).mean(), predict(x)))


def _only(run: Callable[[], object]) -> None:
    """Without the result, which is no figure of its cost."""
    run()
