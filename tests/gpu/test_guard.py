"""The guard on a GPU: half precision, offload, attention kernels, compilation, two devices.

What needs no GPU to be wrong is also run on the CPU. Everything is on the bundled checkpoint.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import Tensor

from sd_guard.bench.architectures import build_pipeline
from sd_guard.bench.base import EVERYBODY, NOBODY
from sd_guard.detection import PrematureDetail
from sd_guard.guard import Guard, GuardRecord
from sd_guard.observation import Observation
from sd_guard.pipelines import trajectory
from sd_guard.pipelines.trajectory import _initial_latents as initial_latents
from sd_guard.pipelines.trajectory import denoiser_of, walk
from sd_guard.pipelines.watching import Watching
from sd_guard.reference import load_truth

DEFAULT = Guard().detector.threshold
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Of half precision against float32, on any device: about three times what the CPU shows on these twelve prompts.
# Score; added detail; CFG norm, relative; LID, a share of the latent dimension.
BOUNDS = {"float16": (0.08, 0.02, 0.01, 0.006), "bfloat16": (0.25, 0.15, 0.09, 0.025)}


@cache
def rows() -> list[str]:
    """Three prompts of each family."""
    truth = [row for row in load_truth() if row["split"] == "tune"]
    families = ("novel", "plain", "verbatim", "template")
    return [row["prompt"] for f in families for row in [row for row in truth if row["family"] == f][:3]]


def on(device: str, dtype: Any = "float32") -> Any:
    return build_pipeline("reference", torch.device(device), dtype)


def sample(pipe: Any, count: int = 4, **options: Any) -> Any:
    seeds = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return pipe(rows()[:count], generator=seeds, num_inference_steps=5, output_type="latent", **options)


def scores(records: list[GuardRecord]) -> Tensor:
    return torch.tensor([record.score for record in records])


def same_noise(pipe: Any, scheduler: Any, generators: list[torch.Generator], embeds: Tensor) -> Tensor:
    """What is drawn in float32, rounded: torch 2.11 draws other noise in half precision."""
    full = initial_latents(pipe, scheduler, generators, embeds.float())
    return full.to(embeds.dtype)


@cache
def look(device: str, dtype: str) -> tuple[Tensor, list[Observation]]:
    """Scores and observations of all prompts at the deciding step of fifty, each with probes."""
    pipe, guard, seeds = on(device, dtype), Guard(detector=EVERYBODY), range(len(rows()))
    watching = Watching(guard, denoiser_of(pipe, seeds), guard.steps(50), [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajectory, "_initial_latents", same_noise)
        for call in walk(pipe, rows(), seeds, steps=50):
            if (decided := watching.watch(call)) is not None:
                return torch.tensor(decided[0]), watching.seen
    raise AssertionError("the deciding step is one of fifty")


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", "bfloat16"),  # float16 holds there too, and takes minutes
        pytest.param("cuda", "bfloat16", marks=pytest.mark.gpu),
        pytest.param("cuda", "float16", marks=pytest.mark.gpu),
    ],
)
def test_half_precision_gives_the_statistics_of_float32(device: str, dtype: str) -> None:
    by_score, by_detail, by_norm, by_lid = BOUNDS[dtype]
    (full, seen), (half, seen_half) = look(device, "float32"), look(device, dtype)
    assert (half - full).abs().max() < by_score
    assert torch.equal(half > DEFAULT, full > DEFAULT)  # its verdicts
    for a, b in zip(seen_half, seen, strict=True):
        assert (a.values["added_detail"] - b.values["added_detail"]).abs().max() < by_detail
        assert (a.values["cfg_norm"] / b.values["cfg_norm"] - 1).abs().max() < by_norm
    for name in ("trajectory_lid", "trajectory_lid_control"):
        difference = seen_half[-1].values[name] - seen[-1].values[name]
        assert difference.abs().max() / seen[-1].dimension < by_lid


@pytest.mark.gpu
def test_a_gpu_gives_the_statistics_of_the_cpu() -> None:
    """Its convolutions are rounded to ten bits unless told otherwise, as those of float16 are."""
    by_score, by_detail, by_norm, by_lid = BOUNDS["float16"]
    (here, seen), (there, seen_there) = look("cpu", "float32"), look("cuda", "float32")
    assert (there.cpu() - here).abs().max() < by_score
    for a, b in zip(seen_there, seen, strict=True):
        assert (a.values["added_detail"].cpu() - b.values["added_detail"]).abs().max() < by_detail
        assert (a.values["cfg_norm"].cpu() / b.values["cfg_norm"] - 1).abs().max() < by_norm
    lids = [looks[-1].values["trajectory_lid"].cpu() for looks in (seen_there, seen)]
    assert (lids[0] - lids[1]).abs().max() / seen[-1].dimension < by_lid


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.gpu), "bfloat16"])
def test_unflagged_images_are_bit_for_bit_those_of_the_host(device: str, dtype: str) -> None:
    pipe = on(device, dtype)
    plain = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    expected = sample(plain).images
    for detector in (NOBODY, EVERYBODY):
        pipe.enable_guard(Guard(detector=detector))
        output = sample(pipe)
        assert torch.equal(output.images, expected)
        assert {record.extra_lanes for record in output.records} == {
            0 if detector == NOBODY else Guard().lanes_in_doubt
        }


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload_changes_no_image_and_no_score(offload: str) -> None:
    there, offloaded = on("cuda", "float16"), on("cpu", "float16")
    getattr(offloaded, offload)(device="cuda")
    outputs = []
    for pipe in (there, offloaded):
        pipe.enable_guard(Guard(detector=EVERYBODY))
        outputs.append(sample(pipe))
    assert torch.equal(outputs[0].images.cpu(), outputs[1].images.cpu())
    assert torch.equal(scores(outputs[0].records), scores(outputs[1].records))


def use_xformers(pipe: Any) -> None:
    pytest.importorskip("xformers")
    pipe.enable_xformers_memory_efficient_attention()


def compile_unet(pipe: Any) -> None:
    pytest.importorskip("triton")
    pipe.unet = torch.compile(pipe.unet)


def compile_blocks(pipe: Any) -> None:
    pytest.importorskip("triton")
    pipe.unet.compile_repeated_blocks(fullgraph=True)


def record_graphs(pipe: Any) -> None:
    """CUDA graphs: each output is written over the last one."""
    pytest.importorskip("triton")
    pipe.unet = torch.compile(pipe.unet, mode="reduce-overhead")


@pytest.mark.gpu
@pytest.mark.parametrize("change", [use_xformers, compile_unet, compile_blocks, record_graphs])
def test_other_kernels_change_no_verdict_and_the_guard_no_image_with_them(change: Callable[[Any], None]) -> None:
    pipe = on("cuda", "float16")
    pipe.enable_guard(Guard(detector=EVERYBODY))
    without = sample(pipe)
    torch.compiler.reset()
    change(pipe)
    watched = sample(pipe)
    pipe.disable_guard()
    assert torch.equal(watched.images, sample(pipe).images)
    assert (scores(watched.records) - scores(without.records)).abs().max() < BOUNDS["float16"][0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_second_gpu_gives_what_the_first_one_does_and_leaves_it_current() -> None:
    outputs = []
    for device in ("cuda:0", "cuda:1"):
        pipe = on(device, "float16")
        pipe.enable_guard(replace(Guard(), detector=PrematureDetail(threshold=-math.inf)))
        outputs.append(sample(pipe))
        assert outputs[-1].images.device == torch.device(device)
        assert torch.cuda.current_device() == 0
    first, second = (output.records for output in outputs)
    assert (scores(first) - scores(second)).abs().max() < BOUNDS["float16"][0]
    assert [record.verdict for record in second] == ["flag"] * len(second)
    assert [len(record.attempts) for record in first] == [len(record.attempts) for record in second]


@pytest.fixture
def synchronisations() -> Iterator[list[warnings.WarningMessage]]:
    """Warnings of torch wherever the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("detector", "more"), [(NOBODY, 1), (EVERYBODY, 1 + len(Guard().questions))])
def test_the_host_waits_in_the_loop_for_decisions_only(
    synchronisations: list[warnings.WarningMessage], detector: PrematureDetail, more: int
) -> None:
    """As tests/bench/test_synchronisation.py counts on the CPU, but by what CUDA itself sees, with a level by index."""
    pipe = on("cuda", "float16")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    counts = []
    for guard in (None, Guard(detector=detector)):
        pipe.disable_guard()
        if guard is not None:
            pipe.enable_guard(guard)
        sample(pipe)  # reads the weights' fingerprint, once
        marks: list[int] = []
        hook = pipe.unet.register_forward_pre_hook(lambda *_, marks=marks: marks.append(waits(synchronisations)))
        sample(pipe)
        hook.remove()
        counts.append(marks[-1] - marks[0])
    assert counts[1] - counts[0] == more


def waits(caught: list[warnings.WarningMessage]) -> int:
    return sum("synchroniz" in str(warning.message) for warning in caught)
