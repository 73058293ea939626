"""Notices memorized generations of latent diffusion models while they are sampled, and does something about them.

Names are imported when they are first asked for: `import sd_guard` alone loads neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sd_guard.calibration import Calibration, Calibrator
    from sd_guard.detection import PrematureDetail
    from sd_guard.guard import Guard, GuardRecord
    from sd_guard.pipelines.stable_diffusion import (
        GuardedStableDiffusionPipeline,
        GuardedStableDiffusionPipelineOutput,
        MemorizedGenerationError,
    )
    from sd_guard.policy import Policy

__version__ = "0.1.0"

_HOME = {
    "Calibration": "calibration",
    "Calibrator": "calibration",
    "Guard": "guard",
    "GuardRecord": "guard",
    "GuardedStableDiffusionPipeline": "pipelines.stable_diffusion",
    "GuardedStableDiffusionPipelineOutput": "pipelines.stable_diffusion",
    "MemorizedGenerationError": "pipelines.stable_diffusion",
    "Policy": "policy",
    "PrematureDetail": "detection",
}

__all__ = [
    "Calibration",
    "Calibrator",
    "Guard",
    "GuardRecord",
    "GuardedStableDiffusionPipeline",
    "GuardedStableDiffusionPipelineOutput",
    "MemorizedGenerationError",
    "Policy",
    "PrematureDetail",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
