"""Mitigations of the latents: where they start, and what that does to a memory in closed form."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from mitigation.mixtures import KNOWN, assert_forgets, call, mixture_pipeline
from mitigation.worlds import Remembering
from tiny import CountLanes, build, seeded, subject_of, watching

from sd_guard.mitigation import Change, NewSeed, NoiseOptimisation, Renoise, Subject
from sd_guard.mitigation.base import BACKWARD_LANES
from sd_guard.mitigation.latents import sharpness
from sd_guard.mitigation.optimisation import OBJECTIVES
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline


# Seven steps up to the deciding one; back to step 4, three. Five Adam steps before that, of four lanes forth and back.
@pytest.mark.parametrize(
    ("mitigation", "lanes"),
    [
        (Renoise(to=(0.2,)), 6),
        (NoiseOptimisation(), 14 + 5 * 4 * 4),
        (NoiseOptimisation(statistic="cfg_norm"), 14 + 5 * 2 * 4),
        (NoiseOptimisation(statistic="added_detail"), 14 + 5 * 2 * 4),
    ],
)
def test_a_memory_is_left_alone(parts: dict[str, Any], mitigation: Any, lanes: int) -> None:
    assert_forgets(parts, mitigation, lanes)


def test_another_seed_may_be_luckier(parts: dict[str, Any]) -> None:
    """Two thirds of the images of a call are the memory; of those that failed on one seed, most pass on a few more."""
    records = call(mixture_pipeline(parts, NewSeed(seeds=4)), *range(2, 10)).records
    flagged = [record for record in records if record.verdict == "flag"]
    assert len(flagged) == 6
    passed = [record for record in flagged if record.outcome == "rescued"]
    assert len(passed) >= 4
    for record in flagged:
        scores = [attempt.score for attempt in record.attempts]
        assert len(set(scores)) == len(scores)
        assert record.extra_lanes == 14 * len(scores)


def by_sigma(sigma: float) -> dict[str, Any]:
    """Of a subject whose latents are ``x_0 + sigma e``."""
    world = Remembering(by_sigma=True)
    assert world.level.sigma == pytest.approx(sigma)
    return {"level": lambda _step: world.level, "renoise": world.renoise}


def test_seeds_give_noise_that_is_the_images_own() -> None:
    """As strong as the sampler's first latents are, and of the subject's seed, whatever its neighbours' are."""
    first, second = NewSeed().propose(subject_of(**by_sigma(0.75**-1), seed=3))
    again, _ = NewSeed().propose(subject_of(**by_sigma(0.75**-1), seed=3))
    neighbour, _ = NewSeed().propose(subject_of(**by_sigma(0.75**-1), seed=4))
    unit = 1 / Remembering().level.a
    assert first.latents is not None
    assert again.latents is not None
    assert torch.equal(first.latents, again.latents)
    assert float(first.latents.std()) == pytest.approx(unit, rel=0.1)
    drawn = [change.latents for change in (first, second, neighbour)]
    correlated = torch.corrcoef(torch.stack([latents.flatten() for latents in drawn]))
    assert (correlated - torch.eye(3)).abs().max() < 0.25
    assert [change.strength for change in (first, second)] == [1.0, 2.0]


def test_renoising_goes_back_to_an_observed_step() -> None:
    """With the control's prediction, at that step's own level; no step is tried twice."""
    asked: list[int] = []

    def renoise(clean: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
        asked.append(step)
        return 10 * step + clean + 0 * noise

    subject = subject_of(steps=50, resumable=(0, 1, 3), renoise=renoise)
    changes = list(Renoise(to=(0.06, 0.05, 0.04, 0.03)).propose(subject))
    assert [(change.strength, change.resume_from) for change in changes] == [(3 / 50, 3), (1 / 50, 1)]
    assert asked == [3, 1]
    for change, step in zip(changes, asked, strict=True):
        assert change.latents is not None
        torch.testing.assert_close(change.latents, 10 * step + subject.control)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm_multistep_karras"])
def test_what_is_renoised_is_at_the_level_of_its_step(parts: dict[str, Any], scheduler: str) -> None:
    """In the sampler's own units: scaled for the UNet, it is ``a x_0 + s e``."""
    subjects: list[Subject] = []

    @dataclass(frozen=True)
    class Ask:
        def propose(self, subject: Subject) -> Iterator[Change]:
            subjects.append(subject)
            yield from ()

    pipe: Any = build(GuardedStableDiffusionPipeline, parts, scheduler)
    pipe.enable_guard(watching(-1e9, (Ask(),)))
    pipe("a dog", generator=seeded(1), num_inference_steps=6, output_type="latent")
    (subject,) = subjects
    assert list(subject.resumable) == [0, 1, 3]
    clean, noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(6)
    for step in subject.resumable:
        pipe.scheduler._step_index = None
        timestep = pipe.scheduler.timesteps[step]
        noised = pipe.scheduler.scale_model_input(subject.renoise(clean, noise, step), timestep)
        level = subject.level(step)
        assert level.a**2 == pytest.approx(1 - level.s**2)
        torch.testing.assert_close(noised, level.a * clean + level.s * noise, rtol=1e-4, atol=1e-4)
    levels = [subject.level(step).s for step in subject.resumable]
    assert levels == sorted(levels, reverse=True)


def test_sharpness_in_closed_form() -> None:
    """The difference of two Gaussians' noise predictions is linear in x, and so is its growth along itself."""
    world = Remembering()
    subject = world.subject()
    z = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))
    unit = torch.ones_like(z)

    def difference(x: torch.Tensor) -> torch.Tensor:
        text = torch.stack([subject.empty_embeds, subject.prompt_embeds])
        without, with_prompt = world.denoise(text, x.expand(2, -1, -1, -1)).e_hat
        return with_prompt - without

    a, s = world.level.a, world.level.s

    def slope(m: float) -> float:
        variance = float(torch.exp(torch.tensor(-3 * m)))
        return (1 - a**2 * variance / (s**2 + a**2 * variance)) / s

    d = difference(z)
    expected = float(d.norm()) + slope(1.0) - slope(0.0)  # linear: d(z + n) = d(z) + (slopes) n, along d itself
    before = world.budget
    assert float(sharpness(subject, z, unit)) == pytest.approx(expected, rel=1e-4)
    assert before - world.budget == 4


@pytest.mark.parametrize("sigma", [False, True])
@pytest.mark.parametrize("statistic", ["sharpness", *OBJECTIVES])
def test_the_gradient_is_the_slope(statistic: str, sigma: bool) -> None:
    """Against a finite difference of the statistic along itself."""
    world = Remembering(by_sigma=sigma)
    mitigation = NoiseOptimisation(statistic=statistic)
    unit = world.scale * torch.ones(4, 8, 8)
    subject = world.subject()
    z = (subject.latents / unit).requires_grad_()
    _, gradient = mitigation._follow(subject, z, unit, 0)
    if statistic == "trajectory_lid":  # the same everywhere, in this world
        assert gradient.abs().max() < 1e-2
        return
    step = gradient / gradient.norm()
    ahead, _ = mitigation._follow(subject, (z + step).detach().requires_grad_(), unit, 0)
    behind, _ = mitigation._follow(subject, (z - step).detach().requires_grad_(), unit, 0)
    rises = statistic == "sharpness" or OBJECTIVES[statistic].rises
    assert (ahead - behind) / 2 * (1 if rises else -1) == pytest.approx(float(gradient.norm()), rel=0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told(NoiseOptimisation):
    """Keeps the values that it saw."""

    told: list[float] = field(default_factory=list)

    def _follow(self, *args: Any) -> tuple[float, torch.Tensor]:
        value, gradient = NoiseOptimisation._follow(self, *args)
        self.told.append(value)
        return value, gradient


@pytest.mark.parametrize("budget", [0, 15, 16, 79, 80, 81, 10_000])
def test_the_budget_and_the_steps_are_bounds(budget: int) -> None:
    """Sixteen lanes a step, four of them again: no step is begun that cannot be paid, and none beyond the last."""
    world = Remembering(budget=budget)
    changes = list(NoiseOptimisation(steps=(2, 5)).propose(world.subject()))
    steps = min(5, budget // 16)
    assert budget - world.budget == 16 * steps
    assert [change.strength for change in changes] == [step for step in (2.0, 5.0) if step <= steps]
    assert 16 == 4 * (2 + BACKWARD_LANES)


def test_it_stops_at_the_target() -> None:
    """On the way it falls; where it is met at once, there is nothing to change."""
    watched = Told(steps=(10,))
    (_,) = watched.propose(Remembering().subject())
    falling = watched.told
    assert falling == sorted(falling, reverse=True)
    target = (falling[3] + falling[4]) / 2
    (change,) = NoiseOptimisation(steps=(10,), target=target).propose(Remembering().subject())
    assert change.strength == 4.0
    assert list(NoiseOptimisation(steps=(10,), target=falling[0] + 1).propose(Remembering().subject())) == []


def test_the_pull_keeps_the_latent_likely() -> None:
    """A latent that grew is drawn back; without the pull it is not."""
    norms = {}
    for pull in (0.0, 50.0):
        (change,) = NoiseOptimisation(steps=(10,), pull=pull).propose(Remembering().subject())
        assert change.latents is not None
        norms[pull] = float(change.latents.norm())
    assert norms[50.0] < norms[0.0]


@pytest.mark.parametrize("statistic", ["sharpness", "cfg_norm", "added_detail"])
@pytest.mark.parametrize(("scheduler", "dtype"), [("euler", torch.float32), ("ddim", torch.bfloat16)])
def test_in_a_pipeline(parts: dict[str, Any], scheduler: str, dtype: torch.dtype, statistic: str) -> None:
    """The statistic falls, in bfloat16 too; the neighbour is the same to the bit, and the model is left as it was."""
    pipe: Any = build(GuardedStableDiffusionPipeline, parts, scheduler).to(dtype)
    arguments: dict[str, Any] = {"prompt": ["a dog", "blue"], "num_inference_steps": 6, "output_type": "latent"}
    pipe.disable_guard()
    plain = pipe(**arguments, generator=seeded(1, 2))
    pipe.enable_guard(watching(plan=()))
    scores = [record.score for record in pipe(**arguments, generator=seeded(1, 2)).records]
    watched = Told(statistic=statistic, steps=(3,))
    pipe.enable_guard(watching(sum(scores) / 2, (watched,)), budget=100)
    processors = dict(pipe.unet.attn_processors)
    with CountLanes(pipe.unet) as count:
        output = pipe(**arguments, generator=seeded(1, 2))
    flagged = scores.index(max(scores))
    assert [len(record.attempts) for record in output.records] == [1 - flagged, flagged]
    assert torch.equal(output.images[1 - flagged], plain.images[1 - flagged])
    assert count.rows + 3 * watched._lanes * BACKWARD_LANES == 24 + sum(record.extra_lanes for record in output.records)
    assert watched.told[-1] < watched.told[0]
    assert pipe.unet.attn_processors == processors
    assert not pipe.unet.is_gradient_checkpointing
    assert all(weight.grad is None for weight in pipe.unet.parameters())
    pipe.to(torch.float32)


def test_without_gradients_it_is_refused_before_anything_is_sampled(parts: dict[str, Any]) -> None:
    pipe = mixture_pipeline(parts, NoiseOptimisation())
    with torch.inference_mode(), CountLanes(pipe.unet) as count:  # noqa: SIM117
        with pytest.raises(ValueError, match=r"^noise_optimisation takes gradients, which torch.inference_mode\(\)"):
            call(pipe, *KNOWN)
    assert count.rows == 0


CPU = torch.device("cpu")
WEIGHTS: dict[str, Any] = {
    "sequential offload": lambda unet: cpu_offload(unet, CPU),
    "group offload": lambda unet: unet.enable_group_offload(CPU, CPU, offload_type="leaf_level"),
    "layerwise casting": lambda unet: unet.enable_layerwise_casting(torch.float16, torch.float32),
    "model offload": lambda unet: cpu_offload_with_hook(unet, CPU),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_a_backward_pass_would_miss_are_refused(parts: dict[str, Any], name: str) -> None:
    """A model that is moved as a whole stays where it is until another one is wanted."""
    unet = copy.deepcopy(parts["unet"])
    pipe: Any = build(GuardedStableDiffusionPipeline, {**parts, "unet": unet})
    WEIGHTS[name](unet)
    if name == "model offload":
        pipe.enable_guard(watching(-1e9, (NoiseOptimisation(steps=(1,)),)), budget=100)
        output = pipe("a dog", generator=seeded(1), num_inference_steps=6, output_type="latent")
        assert [attempt.strength for attempt in output.records[0].attempts] == [1.0]
        return
    with pytest.raises(ValueError, match=r"^noise_optimisation takes gradients, and .* weights are offloaded or cast"):
        pipe.enable_guard(watching(plan=(NoiseOptimisation(),)))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (NewSeed, {"seeds": 0}, "seeds=0 tries nothing; give at least 1"),
        (Renoise, {"to": (1.0,)}, r"to=\(1.0,\) must hold shares of the steps in \[0, 1\)"),
        (Renoise, {"to": ()}, r"to=\(\) must hold"),
        (NoiseOptimisation, {"statistic": "luck"}, "statistic='luck' has no gradient; use one of"),
        (NoiseOptimisation, {"steps": ()}, "steps="),
        (NoiseOptimisation, {"steps": (5, 2)}, "ascending"),
        (NoiseOptimisation, {"rate": 0.0}, "rate=0.0 moves nothing"),
        (NoiseOptimisation, {"pull": -1.0}, "pull=-1.0 pushes"),
        (NoiseOptimisation, {"probes": 0}, "probes=0 measure no Jacobian"),
    ],
)
def test_settings_that_no_run_could_use(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)
