"""Prompts are encoded while the UNet is busy with those before them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sd_guard.pipelines.ahead import take_turns


@dataclass(frozen=True, slots=True)
class Texts:
    """Embeddings of N prompts that are on their way.

    Attributes:
        places: of each prompt, among those that differ, in the order of their first appearance.
        parts: embeddings of `size` of those each, (size, tokens, width).
        size: of a part.
        device: of the embeddings.
    """

    places: Sequence[int]
    parts: Sequence[Future[Tensor]]
    size: int
    device: torch.device

    def first(self, count: int) -> Tensor:
        """(count, tokens, width) embeddings of the first `count` prompts, as soon as they are there."""
        wanted = self.places[:count]
        ready = torch.cat([part.result() for part in self.parts[: max(wanted) // self.size + 1]])
        return ready[torch.tensor(wanted, device=self.device)]


@contextmanager
def encoding(pipe: Any, prompts: Sequence[str], *, size: int, device: torch.device) -> Generator[Texts]:
    """While entered, encodes on another thread; the same prompt once, in calls of one shape.

    A pipeline whose parts are moved to the device by turns has one at work at a time: there it encodes all of them
    first.

    Args:
        pipe: a pipeline.
        prompts: at least one.
        size: prompts a call of the text encoder; the last call is filled up.
        device: of the embeddings.
    """
    once = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    texts = list(once)

    @torch.no_grad()
    def encode(start: int) -> Tensor:
        part = texts[start : start + size]
        return pipe.encode_prompt(part + [""] * (size - len(part)), device, 1, False)[0]

    with ThreadPoolExecutor(1) as thread:
        parts = [thread.submit(encode, start) for start in range(0, len(texts), size)]
        if take_turns(pipe.unet, pipe.text_encoder):
            parts[-1].result()
        try:
            yield Texts([once[prompt] for prompt in prompts], parts, size, device)
        finally:
            thread.shutdown(cancel_futures=True)
