"""Gradients of statistics, and the embedding that follows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mitigation.worlds import Remembering
from tiny import CountLanes, build, seeded, watching
from torch import Tensor

from sd_guard.mitigation import EmbeddingOptimisation
from sd_guard.mitigation.base import BACKWARD_LANES
from sd_guard.mitigation.optimisation import OBJECTIVES, measure, slope
from sd_guard.noise import Prediction
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline


def looked_at(world: Remembering, statistic: str, text: Tensor | None = None, **options: Any) -> Tensor:
    subject = world.subject()
    without = world.denoise(subject.empty_embeds[None], subject.latents[None])
    text = subject.prompt_embeds[None] if text is None else text
    return measure(OBJECTIVES[statistic], subject, text, subject.latents[None], without, **options)


@pytest.mark.parametrize("by_sigma", [False, True])
@pytest.mark.parametrize("probes", [1, 3])
def test_the_lid_is_that_of_the_closed_form(by_sigma: bool, probes: int) -> None:
    """Its Jacobian is a multiple of the identity, which a Rademacher vector measures exactly."""
    world = Remembering(by_sigma=by_sigma)
    assert float(looked_at(world, "trajectory_lid", probes=probes)) == pytest.approx(
        world.trajectory_lid(1.0), rel=1e-3
    )


@pytest.mark.parametrize("by_sigma", [False, True])
def test_flipd_is_taken_at_the_tweedie_point(by_sigma: bool) -> None:
    world = Remembering(by_sigma=by_sigma)
    subject, a = world.subject(), world.level.a
    there = world.denoise(subject.prompt_embeds[None], subject.latents[None])
    clean = world.denoise(subject.prompt_embeds[None], world.scale * a * there.x0_hat)
    expected = world.trajectory_lid(1.0) + float(clean.e_hat.square().sum())
    assert float(looked_at(world, "flipd")) == pytest.approx(expected, rel=1e-3)


def test_the_free_statistics_are_those_of_the_detector() -> None:
    world = Remembering()
    subject = world.subject()
    with_prompt, without = (
        world.denoise(text[None], subject.latents[None]) for text in (subject.prompt_embeds, subject.empty_embeds)
    )
    difference = with_prompt.e_hat - without.e_hat
    assert float(looked_at(world, "cfg_norm")) == pytest.approx(float(difference.norm()), rel=1e-5)
    guided = without.e_hat + 7.5 * difference
    assert float(looked_at(world, "score_norm")) == pytest.approx(float(guided.norm()) / world.level.s, rel=1e-5)


@pytest.mark.parametrize("by_sigma", [False, True])
@pytest.mark.parametrize("statistic", OBJECTIVES)
def test_the_gradient_is_the_slope(statistic: str, by_sigma: bool) -> None:
    """Against a finite difference of the statistic itself, along the entries that hold the memory."""
    world = Remembering(by_sigma=by_sigma)
    text = world.subject().prompt_embeds[None].clone().requires_grad_()
    objective = OBJECTIVES[statistic]
    gradient = slope(objective, world.subject(), looked_at(world, statistic, text), text)
    gradient = gradient if objective.rises else -gradient
    with torch.no_grad():
        step = torch.zeros_like(text)
        step[:, 1:, 0] = 0.01
        rise = looked_at(world, statistic, text + step) - looked_at(world, statistic, text - step)
    assert float(gradient[:, 1:, 0].sum()) == pytest.approx(float(rise) / 0.02, rel=0.02)
    assert torch.equal(gradient[..., 1:], torch.zeros_like(gradient[..., 1:]))


def test_each_draw_has_probes_of_its_own() -> None:
    """On a Jacobian that is no multiple of the identity."""
    mix = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) / 16

    @dataclass
    class Mixing(Remembering):
        def denoise(self, text: Tensor, latents: Tensor) -> Prediction:
            return Prediction((latents.flatten(1) @ mix).reshape(latents.shape), latents)

    first, again, other = (float(looked_at(Mixing(), "trajectory_lid", draw=draw)) for draw in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("by_sigma", [False, True])
@pytest.mark.parametrize("statistic", OBJECTIVES)
def test_the_embedding_forgets(statistic: str, by_sigma: bool) -> None:
    """Each statistic moves the way it should, and with it what is remembered, step by step."""
    world = Remembering(by_sigma=by_sigma)
    changes = list(EmbeddingOptimisation(statistic=statistic, steps=(2, 5, 20)).propose(world.subject()))
    assert [(change.mitigation, change.strength, change.prompt) for change in changes] == [
        ("embedding_optimisation", strength, None) for strength in (2.0, 5.0, 20.0)
    ]
    texts = torch.stack([world.subject().prompt_embeds, *(change.prompt_embeds for change in changes)])
    memories = world.memory(texts).tolist()
    assert memories == sorted(memories, reverse=True)
    assert memories[-1] < 0.9
    values = [float(looked_at(world, statistic, text[None])) for text in texts]
    assert values == sorted(values, reverse=OBJECTIVES[statistic].rises)
    assert torch.equal(texts[:, 0], texts[:1, 0].expand(4, -1)), "the first token's place stays"


@pytest.mark.parametrize(("statistic", "target"), [("cfg_norm", 8.0), ("trajectory_lid", 12.0)])
def test_it_stops_at_the_target(statistic: str, target: float) -> None:
    world, rises = Remembering(), OBJECTIVES[statistic].rises
    (change,) = EmbeddingOptimisation(statistic=statistic, target=target, steps=(200,)).propose(world.subject())
    reached = float(looked_at(world, statistic, change.prompt_embeds[None]))
    assert 1 < change.strength < 200
    assert reached <= target if rises else reached >= target
    assert reached == pytest.approx(target, rel=0.1)


def test_what_meets_the_target_already_is_left_alone() -> None:
    assert list(EmbeddingOptimisation(target=1e6).propose(Remembering().subject())) == []


@pytest.mark.parametrize("statistic", OBJECTIVES)
@given(st.integers(0, 80))
def test_the_budget_is_kept(statistic: str, budget: int) -> None:
    """Lanes are asked for before they are spent: a step's, those of its gradient, and the control's."""
    world = Remembering(budget=budget)
    list(EmbeddingOptimisation(statistic=statistic, probes=2).propose(world.subject()))
    lanes = {"trajectory_lid": 3, "flipd": 4}.get(statistic, 1)
    lanes *= 1 + BACKWARD_LANES + (lanes > 1)
    steps = min(20, (budget - 1) // lanes) if budget >= 1 + lanes else 0
    assert budget - world.budget == (1 + steps * lanes if steps else 0)


def test_steps_too_small_for_bfloat16_add_up() -> None:
    """The tensor that is optimised is float32: 50 steps of a thousandth are lost in bfloat16 next to 1."""
    world = Remembering()
    embeds = world.subject().prompt_embeds.bfloat16()
    subject = world.subject(prompt_embeds=embeds, empty_embeds=torch.zeros_like(embeds))
    (change,) = EmbeddingOptimisation(steps=(50,), rate=0.01).propose(subject)
    assert change.prompt_embeds.dtype == torch.bfloat16
    moved = (embeds - change.prompt_embeds)[1:, 0].float()
    assert torch.allclose(moved, torch.full((2,), 50 * 0.01 * float(embeds.float().std())), rtol=0.1)


def test_a_model_that_breaks_ends_it() -> None:
    @dataclass
    class Broken(Remembering):
        def denoise(self, text: Tensor, latents: Tensor) -> Prediction:
            good = super().denoise(text, latents)
            return Prediction(good.e_hat * torch.nan, good.x0_hat)

    assert list(EmbeddingOptimisation().propose(Broken().subject())) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"statistic": "detail"}, "statistic='detail' has no gradient; use one of cfg_norm, score_norm, "),
        ({"steps": ()}, r"steps=\(\) must hold"),
        ({"steps": (5, 2)}, r"steps=\(5, 2\) must hold .* ascending"),
        ({"steps": (0, 2)}, r"steps=\(0, 2\) must hold .* at least 1"),
        ({"rate": 0.0}, "rate=0.0 moves nothing"),
        ({"probes": 0}, "probes=0 measure no Jacobian"),
    ],
)
def test_settings_that_no_run_could_use(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingOptimisation(**settings)


@dataclass(frozen=True, kw_only=True)
class Spied(EmbeddingOptimisation):
    """Tells the statistic of the first step before any change and at each."""

    told: list[float]

    def propose(self, subject: Any) -> Any:
        objective, latents = OBJECTIVES[self.statistic], subject.latents[None]

        def tell(text: Tensor) -> None:
            without = subject.denoise(subject.empty_embeds[None], latents)
            self.told.append(float(measure(objective, subject, text[None], latents, without)))

        tell(subject.prompt_embeds)
        for change in super().propose(subject):
            tell(change.prompt_embeds)
            yield change


@pytest.mark.parametrize(("scheduler", "dtype"), [("euler", torch.float32), ("ddim", torch.bfloat16)])
@pytest.mark.parametrize("statistic", OBJECTIVES)
def test_in_a_pipeline(parts: dict[str, Any], statistic: str, scheduler: str, dtype: torch.dtype) -> None:
    """The flagged image's statistic moves the right way, its neighbour is bit for bit what it was, all is billed.

    In bfloat16 the trace of a Jacobian by one probe is lost in rounding at the first step: there only that it runs.
    """
    pipe: Any = build(GuardedStableDiffusionPipeline, parts, scheduler).to(dtype)
    call: dict[str, Any] = {"prompt": ["a dog", "blue"], "num_inference_steps": 6, "output_type": "latent"}
    pipe.disable_guard()
    plain = pipe(**call, generator=seeded(1, 2))
    pipe.enable_guard(watching(plan=()))
    scores = [record.score for record in pipe(**call, generator=seeded(1, 2)).records]
    plan = (Spied(statistic=statistic, steps=(3,), rate=0.3, told=[]),)
    pipe.enable_guard(watching(sum(scores) / 2, plan), budget=200)
    processors = dict(pipe.unet.attn_processors)
    with CountLanes(pipe.unet) as count:
        output = pipe(**call, generator=seeded(1, 2))
    flagged = scores.index(max(scores))
    assert torch.equal(output.images[1 - flagged], plain.images[1 - flagged])
    assert [len(record.attempts) for record in output.records] == [1 - flagged, flagged]
    backwards = 3 * BACKWARD_LANES * OBJECTIVES[statistic].lanes(1)
    assert count.rows + backwards == 2 * 6 * 2 + sum(record.extra_lanes for record in output.records)
    before, after = plan[0].told
    if dtype == torch.float32 or OBJECTIVES[statistic].probed is None:
        assert after < before if OBJECTIVES[statistic].rises else after > before
    assert pipe.unet.attn_processors == processors
    assert not pipe.unet.is_gradient_checkpointing
    assert all(weight.grad is None for weight in pipe.unet.parameters())


def test_weights_that_come_and_go_are_refused(parts: dict[str, Any]) -> None:
    pipe: Any = build(GuardedStableDiffusionPipeline, parts)

    class Moving:
        offload = True

    pipe.unet.conv_in._hf_hook = Moving()
    try:
        with pytest.raises(ValueError, match=r"embedding_optimisation takes gradients, and .* weights are offloaded"):
            pipe.enable_guard(watching(plan=(EmbeddingOptimisation(),)))
    finally:
        del pipe.unet.conv_in._hf_hook
