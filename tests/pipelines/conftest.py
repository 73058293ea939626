"""Tiny pipelines on shared random weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from tiny import build, components

from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline


@pytest.fixture(scope="session")
def parts() -> dict[str, Any]:
    """Components that no test may change."""
    return components()


@pytest.fixture
def own_parts(parts: dict[str, Any]) -> dict[str, Any]:
    """A copy that a test may change."""
    return copy.deepcopy(parts)


@pytest.fixture
def plain(parts: dict[str, Any]) -> Callable[..., StableDiffusionPipeline]:
    """Makes the host's pipeline."""
    return lambda scheduler=None: build(StableDiffusionPipeline, parts, scheduler)


@pytest.fixture
def guarded(parts: dict[str, Any]) -> Callable[..., GuardedStableDiffusionPipeline]:
    """Makes the guarded pipeline on the same components."""

    def make(guard: Any, scheduler: Any = None, **options: Any) -> GuardedStableDiffusionPipeline:
        pipe = build(GuardedStableDiffusionPipeline, parts, scheduler)
        pipe.enable_guard(guard, **options)
        return pipe

    return make
