"""What a score depends on besides prompt and seed: thresholds of one configuration mean nothing for another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch


class _Weights(NamedTuple):
    """Digest of a module's weights, their dtype as diffusers names it, and its adapters."""

    digest: str
    dtype: str
    adapters: list[str]


_SAMPLED_ENTRIES = 16  # of each weight, evenly spaced: a fine-tune or a fused adapter changes some of them
_read: WeakKeyDictionary[Any, tuple[Any, _Weights]] = WeakKeyDictionary()  # module -> state of its weights, and they


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """One configuration.

    Attributes:
        model: digest of the UNet's configuration, entries of all weights of UNet and text encoder, and the adapters
            that are on, with their scales; and the size of the latents, where it is not the UNet's own, and
            `clip_skip`, where used.
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
    clip_skip: int | None = None,
    lora_scale: float | None = None,
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
        clip_skip: as of the call.
        lora_scale: what the call multiplies its adapters' scales by: `scale` of its `cross_attention_kwargs`.
    """
    config = {key: value for key, value in dict(pipe.scheduler.config).items() if not key.startswith("_")}
    scheduler = f"{type(pipe.scheduler).__name__} {_digest(config)}" + (f" eta {eta:g}" if eta else "")
    if schedule is not None:
        scheduler += f" schedule {_digest([float(place) for place in schedule])}"
    unet = _read_weights(pipe.unet)
    skip = "" if clip_skip is None else f" clip_skip {clip_skip}"
    return Fingerprint(
        model=_model_digest(pipe, unet, lora_scale) + _other_size(pipe, height, width) + skip,
        scheduler=scheduler,
        steps=steps,
        guidance=f"{guidance_scale:g}" + (f" rescale {guidance_rescale:g}" if guidance_rescale else ""),
        dtype=unet.dtype,
    )


def _other_size(pipe: Any, height: int | None, width: int | None) -> str:
    """In latent pixels; empty for the model's own, however it was asked for."""
    size, factor = pipe.unet.config.sample_size, pipe.vae_scale_factor
    own = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    asked = (own[0] if height is None else height // factor, own[1] if width is None else width // factor)
    return "" if asked == own else f" at {asked[0]} x {asked[1]}"


def _model_digest(pipe: Any, unet: _Weights, lora_scale: float | None) -> str:
    config = {key: value for key, value in dict(pipe.unet.config).items() if not key.startswith("_")}
    encoder = [_read_weights(pipe.text_encoder)] if isinstance(pipe.text_encoder, torch.nn.Module) else []
    read = (unet, *encoder)
    adapters = [adapter for each in read for adapter in each.adapters]
    if adapters and lora_scale not in (None, 1):
        adapters.append(f"by {lora_scale:g}")
    return _digest({"config": config, "adapters": adapters, "weights": [each.digest for each in read]})


def _read_weights(module: Any) -> _Weights:
    """By entries in float16, so that weights stored in half precision give one digest in float16 and float32.

    Kept until a weight is moved or written to: reading hundreds of tensors, and asking diffusers for their dtype, costs
    more than a sampling step should. Torch does not say of what is written through `.data`: see `forget_weights`.
    """
    held, adapters = _parameters_of(module), _adapters_of(module)
    if not isinstance(module, torch.nn.Module) or any(weight.is_meta for weight in held):
        return _Weights("unread", _dtype_of(module), adapters)  # an engine, or sequential offload: no weights at hand
    state = [w.data_ptr() for w in held], [0 if w.is_inference() else w._version for w in held], adapters
    known = _read.get(module)
    if known is None or known[0] != state:
        weights = list(module.parameters())
        entries = [w.detach().flatten()[:: max(1, w.numel() // _SAMPLED_ENTRIES)].to(torch.float16) for w in weights]
        bits = [each.view(torch.int16) for each in entries]  # autocast may not concatenate float16
        sample = torch.cat(bits).cpu() if bits else torch.empty(0, dtype=torch.int16)
        digest = hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16]
        _read[module] = known = (state, _Weights(digest, _dtype_of(module), adapters))
    return known[1]


def forget_weights(*modules: Any) -> None:
    """Has these modules' weights read again: they were written through `.data`, as a LoRA is that peft fuses."""
    for module in modules:
        if module is not None:
            _read.pop(module, None)


def _adapters_of(module: Any) -> list[str]:
    """A line for each of peft's layers with adapters that are on, or fused: its name, theirs, and their scales."""
    if not getattr(module, "peft_config", None):
        return []
    found: list[str] = []
    for name, layer in module.named_modules():
        if isinstance(disabled := getattr(layer, "disable_adapters", None), bool):  # of a whole model it is a method
            scales, fused = getattr(layer, "scaling", {}), getattr(layer, "merged_adapters", [])
            on = [] if disabled else [f"{one} {scales.get(one, 1):.6g}" for one in layer.active_adapters]
            if on or fused:
                own = name.replace("_orig_mod.", "")  # the name that a part has by being compiled
                found.append(f"{own}: {', '.join(on)}; fused {', '.join(fused)}")
    return found


def _dtype_of(module: Any) -> str:
    return str(getattr(module, "dtype", "unread")).removeprefix("torch.")


def modules_of(module: Any) -> list[torch.nn.Module]:
    """As `module.modules()`, in another order: without names, which take as long as all else that a call checks.

    Args:
        module: any; of what is no module, none.
    """
    found: list[torch.nn.Module] = [module] if isinstance(module, torch.nn.Module) else []
    for one in found:  # which grows
        found += [part for part in one._modules.values() if part is not None]
    return found


def _parameters_of(module: Any) -> list[torch.nn.Parameter]:
    """As `module.parameters()`, in the order of `modules_of`."""
    return [weight for one in modules_of(module) for weight in one._parameters.values() if weight is not None]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
