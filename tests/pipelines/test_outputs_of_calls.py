"""What a guarded call returns: the host's own output and records, blank images, or an error."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pipelines.calls import latents_of, scores_of
from tiny import watching

from sd_guard.pipelines.stable_diffusion import (
    GuardedStableDiffusionPipelineOutput,
    MemorizedGenerationError,
)


def test_tuple(guarded: Any) -> None:
    pipe = guarded(watching())
    expected, _ = latents_of(pipe)
    made, _ = latents_of(pipe, return_dict=False)
    assert type(made) is tuple
    assert len(made) == 2
    assert torch.equal(made[0], expected.images)
    assert made[1] is None


def test_output_is_the_hosts(guarded: Any) -> None:
    output, _ = latents_of(guarded(watching()))
    assert isinstance(output, GuardedStableDiffusionPipelineOutput)
    assert output["records"] is output.records
    assert list(output.keys()) == ["images", "records"]  # None is left out, as in the host's output


class Censor(torch.nn.Module):
    """A safety checker that flags the first image."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, clip_input: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
        images = images.clone()
        images[0] = 0
        return images, [row == 0 for row in range(len(images))]


def test_safety_checker_still_runs(guarded: Any) -> None:
    class Extractor:
        def __call__(self, images: Any, return_tensors: str) -> Any:
            batch = type("Batch", (), {"pixel_values": torch.zeros(len(images), 3, 8, 8)})()
            batch.to = lambda device: batch
            return batch

    pipe = guarded(watching())
    before, _ = latents_of(pipe, output_type="np")
    pipe.safety_checker, pipe.feature_extractor = Censor(), Extractor()
    output, _ = latents_of(pipe, output_type="np")
    assert output.nsfw_content_detected == [True, False, False]
    assert not output.images[0].any()
    assert np.array_equal(output.images[1:], before.images[1:])
    assert [record.outcome for record in output.records] == ["passed"] * 3
    assert latents_of(pipe, output_type="np", return_dict=False)[0][1] == [True, False, False]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_blocked_images_are_blank(plain: Any, guarded: Any, output_type: str) -> None:
    pipe = guarded(watching())
    scores = scores_of(latents_of(pipe)[0])
    pipe.enable_guard(watching(sorted(scores)[1], plan=()))
    expected, _ = latents_of(plain(), output_type=output_type)
    output, _ = latents_of(pipe, output_type=output_type)
    assert type(output.images) is type(expected.images)
    for row, record in enumerate(output.records):
        image, host = np.asarray(output.images[row]), np.asarray(expected.images[row])
        assert host.any()
        assert image.dtype == host.dtype
        blocked = row == int(np.argmax(scores))
        assert record.outcome == ("blocked" if blocked else "passed")
        assert np.array_equal(image, np.zeros_like(host) if blocked else host)


def test_keep(plain: Any, guarded: Any) -> None:
    expected, _ = latents_of(plain())
    output, _ = latents_of(guarded(watching(-math.inf, ()), on_failure="keep"))
    assert [(record.verdict, record.outcome) for record in output.records] == [("flag", "kept")] * 3
    assert torch.equal(output.images, expected.images)


def test_raise(guarded: Any) -> None:
    pipe = guarded(watching())
    scores = scores_of(latents_of(pipe)[0])
    pipe.enable_guard(watching(sorted(scores)[1], plan=()), on_failure="raise")
    with pytest.raises(MemorizedGenerationError, match="1 of 3 images stayed memorized") as caught:
        latents_of(pipe)
    output = caught.value.output
    outcomes = [record.outcome for record in output.records]
    assert sorted(outcomes) == ["blocked", "passed", "passed"]
    assert [bool(image.any()) for image in output.images] == [outcome == "passed" for outcome in outcomes]
