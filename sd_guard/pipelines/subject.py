"""A flagged image as its mitigations see it: its prompt, its first latent, and the model at its first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from sd_guard.lanes import Conditioning, call_unet
from sd_guard.noise import NoiseLevel, Prediction, interpret, read_level
from sd_guard.pipelines.inputs import prediction_type
from sd_guard.pipelines.replay import Start, Watch
from sd_guard.policy import Case
from sd_guard.snapshots import copy_scheduler

_BATCH = 16  # lanes a call of a search at least may hold, however small the batch is


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one image's trajectory came from, and what asking the model there costs it.

    Attributes:
        pipe: the pipeline.
        snapshots: of all B images, by step, the first and the first clear one's among them.
        watch: of all B images.
        lane: one row: the image's own conditional lane.
        row: of the batch.
        case: that pays.
    """

    pipe: Any
    snapshots: Mapping[int, Start]
    watch: Watch
    lane: Conditioning
    row: int
    case: Case

    @property
    def latents(self) -> Tensor:
        """(C, H, W) at the first step, as the sampler has them."""
        return self.snapshots[0].latents[self.row]

    @torch.no_grad()
    def predict(self, text: Tensor) -> Tensor:
        """As of `Subject.predict`."""
        start = self.snapshots[self.watch.clear]
        return self._denoise(start, text, start.latents[self.row].expand(len(text), -1, -1, -1)).x0_hat

    def denoise(self, text: Tensor, latents: Tensor) -> Prediction:
        """As of `Subject.denoise`."""
        return self._denoise(self.snapshots[0], text, latents)

    def _denoise(self, start: Start, text: Tensor, latents: Tensor) -> Prediction:
        scheduler, timestep = copy_scheduler(start.scheduler), start.scheduler.timesteps[start.step]
        x = scheduler.scale_model_input(latents, timestep).to(start.latents.dtype)
        level, kind = read_level(scheduler, self.watch.timesteps[start.step]), prediction_type(self.pipe)
        size = max(_BATCH, 2 * start.latents.shape[0])
        outputs: list[Tensor] = []
        self.bill(len(text))  # before the call: where it is done again for a backward pass, it ends with the UNet
        with _checkpointed(self.pipe.unet) if torch.is_grad_enabled() else nullcontext():
            for points, part in zip(x.split(size), text.to(self.lane.prompt_embeds).split(size), strict=True):
                rows = torch.zeros(len(part), dtype=torch.long, device=part.device)
                outputs.append(call_unet(self.pipe.unet, points, timestep, self.lane.select(rows).with_prompt(part)))
        return interpret(torch.cat(outputs), x, level, kind)

    def bill(self, lanes: float) -> None:
        """Spends lanes; a broken one counts as a whole one."""
        self.case.lanes += math.ceil(lanes)

    def level(self, step: int) -> NoiseLevel:
        """As of `Subject.level`."""
        return read_level(self.snapshots[step].scheduler, self.watch.timesteps[step])

    def renoise(self, clean: Tensor, noise: Tensor, step: int) -> Tensor:
        """As of `Subject.renoise`."""
        scheduler, level = copy_scheduler(self.snapshots[step].scheduler), self.level(step)
        x = level.a * clean + level.s * noise
        return x / scheduler.scale_model_input(torch.ones_like(x), scheduler.timesteps[step])


def token_encoder(
    pipe: Any, encode: Callable[[Sequence[str]], Tensor], prompt: str | None
) -> Callable[[Tensor], Tensor] | None:
    """As of `Subject.encode_tokens`.

    Args:
        pipe: the pipeline.
        encode: prompts to embeddings, as the call does.
        prompt: of the image; None where the caller gave embeddings.
    """
    if prompt is None or pipe.text_encoder is None:
        return None

    def encode_tokens(tokens: Tensor) -> Tensor:
        here = get_ident()

        def replace(_layer: Any, _ids: Any, embedded: Tensor) -> Tensor | None:
            return tokens.to(embedded) if get_ident() == here else None  # other threads encode prompts of their own

        hook = pipe.text_encoder.get_input_embeddings().register_forward_hook(replace)
        try:
            return encode([prompt])
        finally:
            hook.remove()

    return encode_tokens


@contextmanager
def _checkpointed(unet: Any) -> Generator[None, None, None]:
    """Has the UNet recompute its blocks in a backward pass, so that the pass holds one of them at a time.

    What is left of a lane is the input of each, twice the memory of a lane without gradients (`benchmarks/memory.py`).
    """
    if not hasattr(unet, "enable_gradient_checkpointing") or unet.is_gradient_checkpointing:
        yield
        return
    unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()
