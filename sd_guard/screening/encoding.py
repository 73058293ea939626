"""Prompts are encoded while the UNet is busy with those before them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sd_guard.pipelines.ahead import take_turns
from sd_guard.transfers import index_of


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
        return ready[index_of(wanted, self.device)]

    def cancel(self) -> None:
        """Leaves undone what was not begun."""
        for part in self.parts:
            part.cancel()


@dataclass(slots=True)
class Encoder:
    """Encodes prompts on a thread of its own, in the order in which they are asked for.

    The same prompt of a batch once, in calls of one shape. A pipeline whose parts are moved to the device by turns has
    one at work at a time: there all prompts of a batch are encoded first.

    Attributes:
        pipe: a pipeline.
        size: prompts a call of the text encoder; the last call of a batch is filled up.
        device: of the embeddings.
    """

    pipe: Any
    size: int
    device: torch.device
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)
    _next: tuple[str, ...] | None = field(default=None, init=False)
    _coming: dict[tuple[str, ...], Texts] = field(default_factory=dict[tuple[str, ...], Texts], init=False)

    def expect(self, prompts: Sequence[str]) -> None:
        """Names a batch that is likely to be asked for after the next one: it is begun as soon as that is."""
        self._next = tuple(prompts)

    def encode(self, prompts: Sequence[str]) -> Texts:
        """At least one prompt, begun now, or with the batch before."""
        texts = self._coming.pop(tuple(prompts), None) or self._begin(prompts)
        if take_turns(self.pipe.unet, self.pipe.text_encoder):
            texts.parts[-1].result()
        elif self._next is not None:
            for dropped in self._coming.values():
                dropped.cancel()
            self._coming, self._next = {self._next: self._begin(self._next)}, None
        return texts

    def _begin(self, prompts: Sequence[str]) -> Texts:
        once = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        texts = list(once)
        parts = [self._thread.submit(self._encode, texts[i : i + self.size]) for i in range(0, len(texts), self.size)]
        return Texts([once[prompt] for prompt in prompts], parts, self.size, self.device)

    @torch.no_grad()
    def _encode(self, part: list[str]) -> Tensor:
        filled = part + [""] * (self.size - len(part))
        return self.pipe.encode_prompt(filled, self.device, 1, False)[0]
