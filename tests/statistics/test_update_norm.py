"""The length of a step, against NumPy and against what a DDIM step is."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from sd_guard.pipelines.trajectory import denoiser_of
from sd_guard.statistics.update_norm import LatentUpdateNorm
from tests.statistics.cases import SEEDS, tiny_calls, tiny_pipe


def test_equals_the_length_of_a_ddim_step():
    pipe = tiny_pipe()
    calls, model = tiny_calls(pipe), denoiser_of(pipe, SEEDS)
    for call, following in itertools.pairwise(calls):
        guided = call.control + 7.5 * (call.conditional - call.control)
        x0 = (call.latents - call.level.s * guided) / call.level.a
        expected = following.level.a * x0 + following.level.s * guided - call.latents
        value = LatentUpdateNorm().measure(call, model)
        np.testing.assert_allclose(value, np.linalg.norm(expected.flatten(1).numpy(), axis=1), rtol=1e-5)


@pytest.mark.parametrize("missing", ["latents", "next_latents"])
def test_needs_the_latents(missing):
    pipe = tiny_pipe()
    call = dataclasses.replace(tiny_calls(pipe, steps=1)[0], **{missing: None})
    with pytest.raises(ValueError, match="latents"):
        LatentUpdateNorm().measure(call, denoiser_of(pipe, SEEDS))


def test_half_precision_does_not_overflow():
    pipe = tiny_pipe()
    call = tiny_calls(pipe, steps=1)[0]
    half = {"latents": torch.zeros(3, 4, 64, 64).half(), "next_latents": torch.full((3, 4, 64, 64), 600.0).half()}
    value = LatentUpdateNorm().measure(dataclasses.replace(call, **half), denoiser_of(pipe, SEEDS))
    assert value.tolist() == [600.0 * 128] * 3
