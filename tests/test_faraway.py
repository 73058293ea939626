"""What the guard does on a device that is not the CPU, and that the stand-in for one is as strict as one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import build, components, make_scheduler, seeded

from sd_guard.bench.base import EVERYBODY
from sd_guard.detection import PrematureDetail
from sd_guard.guard import Guard
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.pipelines.trajectory import denoiser_of, walk
from sd_guard.screening.quick import QuickScreener
from sd_guard.screening.settings import ModelSettings
from sd_guard.statistics import SEED_STATISTICS, STATISTICS
from sd_guard.statistics.base import Denoiser, StepCall
from sd_guard.trace import draw_row_probes
from sd_guard.transfers import index_of, send

faraway = pytest.importorskip("faraway", reason="needs torch with devices in Python", exc_type=ImportError)

PROMPTS, SEEDS = ["a cat", "a red dog", "something else"], [3, 4, 5]


@pytest.fixture(scope="module")
def there() -> torch.device:
    return faraway.faraway()


def whats(noted: list[Any]) -> list[str]:
    return [wait.what for wait in noted]


def test_values_are_brought_to_the_host_by_a_wait(there: torch.device) -> None:
    x = torch.tensor([1.0, 2.0]).to(there)
    with faraway.noted() as noted:
        assert x.tolist() == [1.0, 2.0]
        assert x.sum().item() == 3.0
        assert torch.equal(x.cpu(), torch.tensor([1.0, 2.0]))
        assert bool((x > 0).all())
        assert x[x > 1].shape == (1,)
    assert whats(noted) == ["read", "read", "from the device", "read", "read"]


def test_copies_from_the_host_wait_unless_they_are_told_not_to(there: torch.device) -> None:
    x = torch.zeros(3, 2, device=there)
    with faraway.noted() as noted:
        torch.tensor([1, 2], device=there)
        torch.tensor([1, 2]).to(there)
        x[[0, 2]]
        x[torch.tensor([0, 2])]
        x.copy_(torch.ones(3, 2))
        torch.zeros(2**17).to(there, non_blocking=True)  # more than a driver takes at once
    assert whats(noted) == ["to the device"] * 6
    assert x.tolist() == [[1.0, 1.0]] * 3
    with faraway.noted() as noted:
        torch.full((), 7, device=there)
        torch.arange(3, device=there)
        torch.tensor([1, 2]).to(there, non_blocking=True)
        x * torch.tensor(2.0)  # a number of the host goes along
        send(torch.ones(3), there)
        x[index_of([0, 2], there)]
    assert noted == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tensors_of_two_devices_are_refused(there: torch.device, mode: Any) -> None:
    x = torch.zeros(2, 2, device=there)
    with mode():
        for operation in (torch.add, torch.matmul):
            with pytest.raises(RuntimeError, match="same device"):
                operation(x, torch.ones(2, 2))
        rows = torch.tensor([0], device=there)
        for refused in (
            lambda: torch.ones(2, 2)[rows],
            lambda: torch.ones(2, 2)[x > 0],
            lambda: x.index_select(0, torch.tensor([0])),
            lambda: torch.stack([x[0, 0], torch.tensor(0.0)]),
            lambda: torch.index_put(x, (rows,), torch.ones(2)),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                refused()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, generator=torch.Generator(), device=there)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()


def test_what_is_sent_arrives(there: torch.device) -> None:
    rows = index_of(range(1, 4), there)
    assert (rows.device, rows.dtype, rows.tolist()) == (there, torch.int64, [1, 2, 3])
    assert index_of([], torch.device("cpu")).shape == (0,)
    mask = send(torch.tensor([True, False]), there)
    assert (mask.device, mask.tolist()) == (there, [True, False])
    with faraway.noted() as noted:
        assert send(mask, torch.device("cpu")).tolist() == [True, False]
    assert whats(noted) == ["from the device"]


def test_probes_are_the_same_everywhere_and_come_as_bits(there: torch.device) -> None:
    here = draw_row_probes([3, 2**63 + 1], (4, 5, 5), 7, "cpu", 2)
    with faraway.noted() as noted:
        assert torch.equal(draw_row_probes([3, 2**63 + 1], (4, 5, 5), 7, there, 2).cpu(), here)
    assert whats(noted) == ["from the device"]  # the comparison's own


@pytest.fixture(scope="module")
def both(there: torch.device) -> list[tuple[StepCall, Denoiser]]:
    """The second step of a trajectory, here and there."""
    cases = []
    for device in (torch.device("cpu"), there):
        pipe = build(StableDiffusionPipeline, components()).to(device)
        cases.append((list(walk(pipe, PROMPTS, SEEDS, steps=3))[1], denoiser_of(pipe, SEEDS)))
    return cases


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_statistics_are_those_of_the_cpu(both: list[tuple[StepCall, Denoiser]], name: str) -> None:
    here, elsewhere = (STATISTICS[name]().measure(*case).cpu() for case in both)
    assert here.shape == (len(PROMPTS),)
    torch.testing.assert_close(elsewhere, here, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", sorted(SEED_STATISTICS))
def test_statistics_of_several_seeds_are_those_of_the_cpu(both: list[tuple[StepCall, Denoiser]], name: str) -> None:
    statistic = SEED_STATISTICS[name]()
    here, elsewhere = (statistic.compare(statistic.feature(*case)) for case in both)
    assert elsewhere == pytest.approx(here, rel=1e-3)


def sample(device: torch.device, cls: Any, scheduler: str, guard: Guard | None, **arguments: Any) -> Any:
    pipe = build(cls, components(), make_scheduler(scheduler)).to(device)
    if guard is not None:
        pipe.enable_guard(guard)
    return pipe(PROMPTS, generator=seeded(*SEEDS), num_inference_steps=10, output_type="latent", **arguments)


@pytest.mark.parametrize("arguments", [{}, {"guidance_scale": 1.0}, {"negative_prompt": ["blurry"] * 3}], ids=str)
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "euler_ancestral", "pndm_prk", "dpm_multistep", "lcm"])
def test_unflagged_images_are_the_hosts_there_too(
    there: torch.device, scheduler: str, arguments: dict[str, Any]
) -> None:
    guard = Guard(detector=EVERYBODY)
    plain = sample(there, StableDiffusionPipeline, scheduler, None, **arguments)
    watched = sample(there, GuardedStableDiffusionPipeline, scheduler, guard, **arguments)
    here = sample(torch.device("cpu"), GuardedStableDiffusionPipeline, scheduler, guard, **arguments)
    assert watched.images.device == there
    assert torch.equal(watched.images.cpu(), plain.images.cpu())
    for one, other in zip(watched.records, here.records, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-2)
        assert (one.verdict, one.extra_lanes) == (other.verdict, other.extra_lanes)


@pytest.mark.parametrize("on_failure", ["blank", "keep"])
@pytest.mark.parametrize("scheduler", ["euler_ancestral", "dpm_multistep"])
def test_flagged_images_are_mitigated_there_as_here(there: torch.device, scheduler: str, on_failure: Any) -> None:
    guard = Guard(detector=PrematureDetail(threshold=-math.inf)).with_policy(on_failure=on_failure, budget=120)
    outputs = [
        sample(device, GuardedStableDiffusionPipeline, scheduler, guard) for device in (torch.device("cpu"), there)
    ]
    told = [
        [(r.outcome, r.extra_lanes, sorted((a.mitigation, a.prompt) for a in r.attempts)) for r in output.records]
        for output in outputs
    ]
    assert told[0] == told[1]
    assert all(attempts for _, _, attempts in told[0])
    torch.testing.assert_close(outputs[1].images.cpu(), outputs[0].images, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("arguments", [{}, {"guidance_scale": 1.0}], ids=str)
def test_models_that_take_turns_there_change_nothing(there: torch.device, arguments: dict[str, Any]) -> None:
    outputs = []
    for offload in (False, True):
        pipe = build(GuardedStableDiffusionPipeline, components(), "euler")
        if offload:
            pipe.enable_model_cpu_offload(device=there)
        else:
            pipe.to(there)
        pipe.enable_guard(Guard(detector=PrematureDetail(threshold=-math.inf)))
        own = {"num_inference_steps": 10, "output_type": "pt"} | arguments
        outputs.append(pipe(PROMPTS, generator=seeded(*SEEDS), **own))
    assert torch.equal(outputs[0].images.cpu(), outputs[1].images.cpu())
    assert outputs[0].records == outputs[1].records


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_quick_depth_scores_there_as_here(there: torch.device, scheduler: str) -> None:
    scores = []
    for device in (torch.device("cpu"), there):
        pipe = build(GuardedStableDiffusionPipeline, components(), scheduler).to(device)
        model = ModelSettings(model="tiny/random", steps=8)
        quick = QuickScreener.make(pipe, model, batch_size=2, guard=Guard(detector=EVERYBODY))
        scores.append([record.score for record in quick.measure(PROMPTS, SEEDS)])
    assert scores[1] == pytest.approx(scores[0], abs=1e-2)
