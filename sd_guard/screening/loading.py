"""Loads the guarded pipeline quietly, and makes screeners of it; torch and diffusers are imported no earlier."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import warnings
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sd_guard.screening.settings import BATCH_SIZES, ModelSettings, RunSettings

if TYPE_CHECKING:
    from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
    from sd_guard.screening.screener import Screener


def load_screener(settings: RunSettings) -> Screener:
    """Loads the model, and makes the screener of the depth that is asked for.

    A calibration is of one depth: with `auto` it is that of the images.

    Raises:
        ValueError: As `load_pipeline`, or if the calibration is of another configuration, or there is no compiler.
    """
    from sd_guard.screening.explained import ExplainedScreener
    from sd_guard.screening.screener import AutoScreener, FullScreener

    model, quickly = settings.model, settings.depth == "quick"
    if settings.compile:
        check_compiler(model.device)
    pipe = load_pipeline(replace(model, calibration=None) if quickly else model)
    full: Screener = FullScreener(pipe, model, keep_before=settings.keep_before)
    if settings.explain:
        full = ExplainedScreener(full, pipe, model)
    if settings.depth == "full":
        return full
    import torch

    from sd_guard.calibration import Calibration
    from sd_guard.screening.quick import QuickScreener

    if quickly:  # no image depends on the UNet: its convolutions may have the layout that they are fastest in
        pipe.unet.to(memory_format=torch.channels_last)
    if settings.compile:
        pipe.unet.compile()
    calibration = Calibration.load(model.calibration) if quickly and model.calibration is not None else None
    quick = QuickScreener.make(pipe, model, calibration=calibration)
    return quick if quickly else AutoScreener(quick, full, BATCH_SIZES["full"])


def load_pipeline(settings: ModelSettings) -> GuardedStableDiffusionPipeline:
    """Loads the model, with the guard enabled as the settings say; safetensors only.

    Raises:
        ValueError: In one line, if the device is not there, the model or the calibration cannot be loaded, or the
            model cannot be guarded.
    """
    silence()
    import torch

    from sd_guard.fingerprint import take_fingerprint
    from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline

    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and (ranks := torch.cuda.device_count()):
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % ranks}"  # each process of a launcher has its own
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used ({first_line(error)}); use another") from error
    guard = guard_settings(settings)
    try:
        pipe = GuardedStableDiffusionPipeline.from_pretrained(
            settings.model,
            torch_dtype=getattr(torch, settings.dtype),
            use_safetensors=True,
            local_files_only=settings.is_local,
        )
        pipe.to(device)
    except Exception as error:  # whatever the host's loaders raise, or out of memory
        raise ValueError(f"{settings.model}: cannot be loaded ({first_line(error)})") from error
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe.enable_guard(**guard)
    except TypeError as error:
        raise ValueError(f"{settings.model}: cannot be guarded ({first_line(error)})") from error
    if pipe.calibration is not None:  # of this very configuration, or nothing could be scored
        size = {"height": settings.height, "width": settings.width}
        call: dict[str, Any] = {"steps": settings.steps, "guidance_scale": settings.guidance_scale, **size}
        pipe.calibration.check(take_fingerprint(pipe, **call))
    return pipe


def guard_settings(settings: ModelSettings) -> dict[str, Any]:
    """Keyword arguments for `enable_guard`; reads the calibration.

    Raises:
        ValueError: If the calibration cannot be read.
    """
    arguments: dict[str, Any] = {"on_failure": settings.on_failure}
    if settings.calibration is not None:
        from sd_guard.calibration import Calibration

        arguments["calibration"] = Calibration.load(settings.calibration)
    if settings.budget is not None:
        arguments["budget"] = settings.budget
    return arguments


def check_compiler(device: str | None) -> None:
    """Whether torch.compile finds what it needs.

    Args:
        device: as of `ModelSettings`.

    Raises:
        ValueError: in one line, if not.
    """
    import torch

    on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    if not (shutil.which("g++") or shutil.which("clang++") if on_cpu else find_spec("triton")):
        needed = "a C++ compiler (g++ or clang++)" if on_cpu else "triton"
        raise ValueError(f"--compile needs {needed}, which is not there; install it, or leave --compile out")


def first_line(error: BaseException, *, limit: int = 300) -> str:
    """An exception as one line of at most `limit` characters: its type and the first line of its message."""
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    name = type(error).__name__
    line = f"{name}: {message}" if message else name
    return line if len(line) <= limit else line[: limit - 3] + "..."


def silence() -> None:
    """Keeps the libraries' warnings, logs (which repeat prompts) and progress bars off the terminal."""
    warnings.simplefilter("ignore")
    logging.getLogger("sd_guard").setLevel(logging.ERROR)
    for name in ("transformers", "diffusers"):  # diffusers imports transformers, which logs while it is imported
        library = importlib.import_module(f"{name}.utils.logging")
        library.set_verbosity_error()
        library.disable_progress_bar()
