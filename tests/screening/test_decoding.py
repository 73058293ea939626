"""Images that are decoded later are those that the pipeline would have made, and cost no row but their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from screening.fakes import Pretender
from tiny import build, components, watching

from benchmarks.null_runs import null_settings
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.screening import decoding
from sd_guard.screening.decoding import can_overlap, decode_later
from sd_guard.screening.jobs import Job
from sd_guard.screening.records import read_run
from sd_guard.screening.runner import plan_run, screen
from sd_guard.screening.screener import FullScreener, Screener
from sd_guard.screening.settings import ModelSettings, RunSettings

MODEL = ModelSettings(model="tiny/random", steps=3, guidance_scale=5.0)
JOBS = [Job(i, f"a red ring number {i}", None, i) for i in range(3)]


def make_pipe() -> GuardedStableDiffusionPipeline:
    pipe = build(GuardedStableDiffusionPipeline, components())
    pipe.enable_guard(watching())
    return pipe


def test_they_are_those_of_the_pipeline() -> None:
    pipe = make_pipe()
    screened = FullScreener(pipe, MODEL).screen(JOBS)
    generators = [torch.Generator().manual_seed(job.seed) for job in JOBS]
    expected = pipe([job.prompt for job in JOBS], generator=generators, num_inference_steps=3, guidance_scale=5.0)
    for make, image in zip(screened.images.values(), expected.images, strict=True):
        difference = np.asarray(make(), dtype=int) - np.asarray(image, dtype=int)
        assert np.abs(difference).max() <= 1  # one alone is rounded otherwise than in a batch
        assert np.asarray(image).std() > 1


def test_a_safety_checker_has_its_say() -> None:
    pipe = make_pipe()
    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    asked: list[torch.Size] = []

    def check(images: torch.Tensor, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, list[bool]]:
        asked.append(images.shape)
        return torch.zeros_like(images), [True]

    pipe.run_safety_checker = check  # type: ignore[method-assign]
    assert not np.asarray(decode_later(pipe, latents)()).any()
    assert [shape[0] for shape in asked] == [1]


@pytest.mark.parametrize("overlap", [False, True])
def test_where_nothing_is_gained_they_are_made_at_once(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "can_overlap", lambda pipe, latents: overlap)
    pipe, calls = make_pipe(), []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda *args, **kwargs: calls.append(1) or decode(*args, **kwargs)
    make = decode_later(pipe, torch.zeros(4, 8, 8))
    assert len(calls) == (not overlap)
    make()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("device", "by_turns", "gains"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_a_cpu_and_parts_that_take_turns_gain_nothing(device: str, by_turns: bool, gains: bool) -> None:
    hooked = SimpleNamespace(_hf_hook=object()) if by_turns else SimpleNamespace()
    pipe, latents = SimpleNamespace(unet=SimpleNamespace(), vae=hooked), SimpleNamespace(device=torch.device(device))
    assert can_overlap(pipe, latents) is gains  # type: ignore[arg-type]


class Waiting(Pretender):
    """Its second batch is not done before an image of the first one is."""

    def __init__(self) -> None:
        super().__init__()
        self.decoded = threading.Event()
        self.threads: set[int] = set()

    def __call__(self, **arguments: Any) -> Any:
        output = super().__call__(**arguments)
        assert len(self.calls) == 2 or self.decoded.wait(10)
        return output

    def screener(self, settings: RunSettings) -> Screener:
        def decode(_: Any, image: Image.Image) -> Callable[[], Image.Image]:
            def make() -> Image.Image:
                self.threads.add(threading.get_ident())
                self.decoded.set()
                return image

            return make

        return FullScreener(self, settings.model, settings.keep_before, decode)


def test_one_batch_is_decoded_while_the_next_is_sampled(tmp_path: Path) -> None:
    settings, pipe = null_settings(tmp_path, ["a", "b", "c", "d"], batch_size=2), Waiting()
    assert screen(plan_run(settings), pipe.screener) is not None
    assert {row["outcome"] for row in read_run(tmp_path / "run")} == {"passed"}
    assert pipe.threads.isdisjoint({threading.get_ident()})


class Undecodable(Pretender):
    """Images of "dark", and those that the guard has not touched, cannot be decoded."""

    def screener(self, settings: RunSettings) -> Screener:
        def decode(_: Any, image: Any) -> Callable[[], Image.Image]:
            def make() -> Image.Image:
                if image.dark:
                    raise RuntimeError("CUDA out of memory\nsecond line")
                return image.image

            return make

        return FullScreener(self, settings.model, settings.keep_before, decode)

    def __call__(self, *, prompt: list[str], **arguments: Any) -> Any:
        output = super().__call__(prompt=prompt, **arguments)
        dark = ["dark" in text or not self.guarded for text in prompt]
        images = [SimpleNamespace(image=image, dark=each) for image, each in zip(output.images, dark, strict=True)]
        return SimpleNamespace(images=images, records=output.records)


def test_an_image_that_cannot_be_decoded_costs_its_own_row_and_no_other(tmp_path: Path) -> None:
    settings = null_settings(tmp_path, ["a", "dark b", "memorized c"], batch_size=3, keep_before=True)
    summary = screen(plan_run(settings), Undecodable().screener)
    assert summary is not None
    a, dark, memorized = read_run(tmp_path / "run")
    assert (a["outcome"], a["image"]) == ("passed", "images/000000-0.png")
    assert (dark["outcome"], dark["image"]) == ("unscored", None)
    assert dark["reason"] == "RuntimeError: CUDA out of memory"
    assert (memorized["outcome"], memorized["image_before"]) == ("rescued", None)
    assert sorted(path.name for path in (tmp_path / "run" / "images").iterdir()) == ["000000-0.png", "000002-0.png"]
    assert summary.total.unscored == 1
