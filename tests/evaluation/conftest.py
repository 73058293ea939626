"""A tiny pipeline, and one of each fake statistic."""

from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from evaluation.fakes import Alike, Norm, Probed
from tiny import build, components


@pytest.fixture
def norm() -> Norm:
    return Norm()


@pytest.fixture
def probed() -> Probed:
    return Probed()


@pytest.fixture
def alike() -> Alike:
    return Alike()


@pytest.fixture(scope="session")
def pipe() -> Any:
    return build(StableDiffusionPipeline, components())
