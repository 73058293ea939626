"""What a thread of its own does before it is needed, where the parts of a pipeline can work side by side."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Any, TypeAlias, TypeVar

import torch
from diffusers import StableDiffusionPipeline

_SIGNATURE = inspect.signature(StableDiffusionPipeline.encode_prompt)
_KEPT = 2  # that of the call to come, and that of the one after it

T = TypeVar("T")
Texts: TypeAlias = tuple[tuple[str, Any], ...]


def texts_of(*args: Any, **kwargs: Any) -> Texts | None:
    """What the host's `encode_prompt` is asked, to be compared; None where embeddings are given.

    Args:
        args: of `StableDiffusionPipeline.encode_prompt`, the pipeline first.
        kwargs: likewise.
    """
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    asked = {name: value for name, value in bound.arguments.items() if name != "self"}
    if any(isinstance(value, torch.Tensor) for value in asked.values()):
        return None
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in asked.items())


def take_turns(*parts: Any) -> bool:
    """Whether accelerate moves any of these modules in and out, so that two cannot be at work at once."""
    return any(hasattr(part, "_hf_hook") for part in parts)


def _on_a_thread(work: Callable[[], T]) -> Future[T]:
    """Has a thread of its own do the work; what it raises is raised where the result is asked for."""
    coming: Future[T] = Future()

    @torch.no_grad()
    def run() -> None:
        try:
            coming.set_result(work())
        except BaseException as error:
            coming.set_exception(error)

    Thread(target=run, daemon=True).start()
    return coming


class Ahead:
    """Encodes texts on threads of their own, and keeps the latest two until they are asked for."""

    def __init__(self) -> None:
        """Nothing is on its way."""
        self._coming: dict[Texts, Future[Any]] = {}

    def __reduce__(self) -> tuple[type[Ahead], tuple[()]]:
        """A copy of a pipeline has nothing on its way."""
        return Ahead, ()

    def begin(self, texts: Texts, encode: Callable[[], Any]) -> None:
        """Has `encode` called, unless these texts are on their way."""
        if texts in self._coming:
            return
        self._coming[texts] = _on_a_thread(encode)
        for oldest in list(self._coming)[:-_KEPT]:
            del self._coming[oldest]

    def take(self, texts: Texts | None) -> Future[Any] | None:
        """What is on its way for these texts, once; None if nothing is."""
        return self._coming.pop(texts, None) if texts is not None else None
