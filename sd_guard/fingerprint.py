"""What a score depends on besides prompt and seed: thresholds of one configuration mean nothing for another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

_SAMPLED_WEIGHTS = 4096  # entries of the output convolution that stand for the weights


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """One configuration.

    Attributes:
        model: digest of the UNet's configuration, part of its weights, and the names of active adapters; and the size
            of the latents, where it is not the UNet's own.
        scheduler: class and digest of its configuration; `eta` and a digest of the caller's own schedule, where used.
        steps: number of UNet steps.
        guidance: guidance scale, and `rescale` where used.
        dtype: of the UNet.
    """

    model: str
    scheduler: str
    steps: int
    guidance: str
    dtype: str

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits for the whole."""
        return _digest(asdict(self))

    def difference(self, other: Fingerprint) -> list[str]:
        """Where two configurations differ, as `field: own, not other's`."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return [f"{name}: {own}, not {its}" for name, own, its in pairs if own != its]


def take_fingerprint(
    pipe: Any,
    *,
    steps: int,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
    eta: float = 0.0,
    schedule: Sequence[float] | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Fingerprint:
    """The fingerprint of a pipeline's call.

    Args:
        pipe: the pipeline.
        steps: UNet steps.
        guidance_scale: as of the call.
        guidance_rescale: likewise.
        eta: likewise.
        schedule: `timesteps` or `sigmas` of the call, where the caller gave them.
        height: of the image, in pixels; None for the model's own.
        width: likewise.
    """
    config = {key: value for key, value in dict(pipe.scheduler.config).items() if not key.startswith("_")}
    scheduler = f"{type(pipe.scheduler).__name__} {_digest(config)}" + (f" eta {eta:g}" if eta else "")
    if schedule is not None:
        scheduler += f" schedule {_digest([float(place) for place in schedule])}"
    return Fingerprint(
        model=_model_digest(pipe.unet) + _other_size(pipe, height, width),
        scheduler=scheduler,
        steps=steps,
        guidance=f"{guidance_scale:g}" + (f" rescale {guidance_rescale:g}" if guidance_rescale else ""),
        dtype=str(pipe.unet.dtype).removeprefix("torch."),
    )


def _other_size(pipe: Any, height: int | None, width: int | None) -> str:
    """In latent pixels; empty for the model's own, however it was asked for."""
    size, factor = pipe.unet.config.sample_size, pipe.vae_scale_factor
    own = (size, size) if isinstance(size, int) else tuple(size)
    asked = (own[0] if height is None else height // factor, own[1] if width is None else width // factor)
    return "" if asked == own else f" at {asked[0]} x {asked[1]}"


def _model_digest(unet: Any) -> str:
    config = {key: value for key, value in dict(unet.config).items() if not key.startswith("_")}
    adapters = sorted(unet.active_adapters()) if getattr(unet, "peft_config", None) else []
    weight = unet.conv_out.weight if hasattr(unet, "conv_out") else None
    return _digest({"config": config, "adapters": adapters, "weights": _weights_digest(weight)})


def _weights_digest(weight: torch.Tensor | None) -> str:
    """Of the first entries in float16, so that the same weights loaded in another dtype give the same digest."""
    if weight is None or weight.device.type == "meta":  # sequential offload keeps no weights at hand
        return "unread"
    sample = weight.detach().flatten()[:_SAMPLED_WEIGHTS].to("cpu", torch.float16)
    return hashlib.sha256(sample.contiguous().numpy().tobytes()).hexdigest()[:16]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
