"""`read_level` against what the schedulers really do to a latent, and `interpret` against exact denoisers."""

from __future__ import annotations

import inspect
import itertools
import logging
import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import is_torchsde_available
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import PointMass

from sd_guard import noise
from sd_guard.noise import (
    CLEAR_SIGMA,
    EARLY_SIGMA,
    SUPPORTED_SCHEDULERS,
    NoiseLevel,
    check_scheduler,
    early_steps,
    first_clear_step,
    interpret,
    read_level,
)

STEPS = 10
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
NO_CLIP = {"DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler"}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# Fresh noise enters these at each step: their noise is known by its statistics only.
STOCHASTIC = {
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "SASolverScheduler",
}
NO_SAMPLE_PREDICTION = {
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "prk": {"skip_prk_steps": False},
    "singlestep-order": {"solver_order": 3},
    "sde": {"algorithm_type": "sde-dpmsolver++"},
}


def build(name: str, option: str, prediction_type: str) -> Any:
    """The scheduler, set to `STEPS` steps."""
    extra: dict[str, Any] = {"clip_sample": False} if name in NO_CLIP else {}
    if name == "PNDMScheduler":
        extra["skip_prk_steps"] = True
    if name == "DPMSolverSDEScheduler":
        extra["noise_sampler_seed"] = 0
    config = SD | extra | OPTIONS[option] | {"prediction_type": prediction_type}
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(STEPS)
    return scheduler


def cases() -> list[Any]:
    """Every scheduler, with every option and parametrisation that it implements."""
    found: list[Any] = []
    for name, option in itertools.product(sorted(SUPPORTED_SCHEDULERS), OPTIONS):
        missing_torchsde = name == "DPMSolverSDEScheduler" and not is_torchsde_available()
        marks = [pytest.mark.skip(reason="torchsde is not installed")] if missing_torchsde else []
        known = inspect.signature(getattr(diffusers, name).__init__).parameters
        if not (missing_torchsde and option == "plain") and not set(OPTIONS[option]) <= set(known):
            continue
        if option == "sde" and not name.startswith("DPMSolver"):
            continue
        types = PREDICTION_TYPES[:2] if name in NO_SAMPLE_PREDICTION else PREDICTION_TYPES
        types = types if option in ("plain", "karras", "prk") else types[:1]
        found += [pytest.param(name, option, p, id=f"{name}-{option}-{p}", marks=marks) for p in types]
    return found


def normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


every_case = pytest.mark.parametrize(("name", "option", "prediction_type"), cases())


@every_case
def test_level_is_that_of_the_latent_itself(name: str, option: str, prediction_type: Any) -> None:
    """With a point mass the latent shows its own (a, s): its coefficients on the image and on the noise.

    The model answers in the latent's own coefficients, so no timestep enters. Deterministic samplers keep the first
    noise vector, and both coefficients are read by projection; stochastic ones are read by regression and by the spread
    over 32,768 entries (standard error of s: 0.4 %). PNDM extrapolates v itself: its latents leave
    the marginal, by 0.08 in s at the worst of ten steps.
    """
    scheduler = build(name, option, prediction_type)
    stochastic = name in STOCHASTIC or option == "sde"
    shape = (2, 4, 64, 64) if stochastic else (2, 4, 8, 8)
    image = 3.0 * torch.sign(normal(shape, 1))
    e = normal(shape, 2)
    e -= (e * image).sum() / image.square().sum() * image
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": torch.Generator().manual_seed(3)} if takes_generator else {}
    drifts = name == "PNDMScheduler" and prediction_type == "v_prediction"
    tolerance = 0.1 if drifts else 0.01 if stochastic else 2e-4
    x = scheduler.add_noise(image, e, scheduler.timesteps[:1].repeat(2))
    seen: list[float] = []
    for t in scheduler.timesteps:
        unet_input = scheduler.scale_model_input(x, t)
        level = read_level(scheduler, t)
        a = float((unet_input * image).sum() / image.square().sum())
        rest = unet_input - a * image
        s = float(rest.square().mean().sqrt()) if stochastic else float((rest * e).sum() / e.square().sum())
        assert level.a == pytest.approx(a, abs=tolerance)
        assert level.s == pytest.approx(s, rel=0.03 if stochastic else 5e-3, abs=tolerance)
        assert level.a**2 + level.s**2 == pytest.approx(1.0, abs=1e-6)
        seen.append(level.sigma)
        e_hat = (unet_input - level.a * image) / level.s if stochastic else e
        output = {"epsilon": e_hat, "v_prediction": level.a * e_hat - level.s * image, "sample": image}[prediction_type]
        x = scheduler.step(output, t, x, **extra).prev_sample
    assert min(seen) < 1.0 < max(seen)


@every_case
def test_level_is_what_the_model_is_told(name: str, option: str, prediction_type: Any) -> None:
    """A UNet knows its level by the timestep alone: the level read is that timestep's, so x0_hat is the point mass.

    Some schedulers hand the UNet a rounded (Karras) or a truncated (exponential, beta) timestep for a level between
    two: they differ from the level by up to 0.5 and 1 timestep, x0_hat by up to 1 % and 4 %. All others agree to 1e-3.
    """
    scheduler = build(name, option, prediction_type)
    image = 3.0 * torch.sign(normal((1, 4, 8, 8), 1))
    unet = PointMass(image).as_unet(scheduler, prediction_type)
    whole = not scheduler.timesteps.is_floating_point()
    rounded = option == "karras" and (whole or name.startswith("KDPM2"))
    truncated = option in ("exponential", "beta") and whole
    steps_off, x0_off = (1.001, 0.12) if truncated else (0.501, 0.03) if rounded else (1e-3, 2e-3)
    x = scheduler.add_noise(image, normal((1, 4, 8, 8), 2), scheduler.timesteps[:1])
    for t in scheduler.timesteps:
        unet_input = scheduler.scale_model_input(x, t)
        level = read_level(scheduler, t)
        assert abs(unet.timestep_of(level) - float(t)) < steps_off
        output = unet(unet_input, t, encoder_hidden_states=None, return_dict=False)[0]
        got = interpret(output, unet_input, level, prediction_type)
        assert (got.x0_hat - image).abs().max() < x0_off
        x = scheduler.step(output, t, x).prev_sample


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_reading_follows_begin_index_and_changes_nothing(name: str) -> None:
    scheduler = build(name, "plain", "epsilon")
    start = 3 * scheduler.order
    t = scheduler.timesteps[start]
    before_index = read_level(scheduler, t)
    scheduler.set_begin_index(start)
    assert read_level(scheduler, t) == before_index
    assert scheduler.step_index is None
    scheduler.scale_model_input(torch.zeros(1), t)
    assert read_level(scheduler, t) == before_index
    assert before_index.sigma == pytest.approx(float(scheduler.sigmas[start]), rel=1e-6)


def test_custom_timesteps_of_ddpm() -> None:
    scheduler = build("DDPMScheduler", "plain", "epsilon")
    scheduler.set_timesteps(timesteps=[977, 400, 3])
    for t in scheduler.timesteps:
        assert read_level(scheduler, t).a ** 2 == pytest.approx(float(scheduler.alphas_cumprod[t]), rel=1e-6)


def test_subclasses_are_read_as_their_parents() -> None:
    class Mine(diffusers.DDIMScheduler):
        pass

    scheduler = Mine(**SD)
    scheduler.set_timesteps(STEPS)
    assert read_level(scheduler, 500).a == pytest.approx(math.sqrt(float(scheduler.alphas_cumprod[500])))


def test_terminal_level_without_signal() -> None:
    """With zero terminal SNR the first level is pure noise: v-prediction still names an image, epsilon cannot."""
    scheduler = diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    level = read_level(scheduler, scheduler.timesteps[0])
    assert (level.a, level.s, level.sigma) == (0.0, 1.0, math.inf)
    x, out = normal((1, 4, 8, 8), 0), normal((1, 4, 8, 8), 1)
    assert torch.equal(interpret(out, x, level, "v_prediction").x0_hat, -out)
    assert not interpret(out, x, level, "epsilon").x0_hat.isfinite().any()


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("EDMEulerScheduler", {}, "EDM preconditioning"),
        ("EDMDPMSolverMultistepScheduler", {}, "EDM preconditioning"),
        ("FlowMatchEulerDiscreteScheduler", {}, "flow-matching"),
        ("CogVideoXDDIMScheduler", {}, "not among"),
        ("DDIMInverseScheduler", {}, "not among"),
        ("IPNDMScheduler", {}, "not among"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "flow matching"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "flow matching"),
        ("DDIMScheduler", {"prediction_type": "x0"}, "unknown prediction_type 'x0'"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "learned variance"),
    ],
)
def test_foreign_schedulers_are_refused_by_name_with_a_remedy(name: str, config: dict[str, Any], words: str) -> None:
    scheduler = getattr(diffusers, name)(**config)
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        check_scheduler(scheduler)
    message = str(caught.value)
    assert name in message and "\n" not in message and ("use DDIM" in message or "set it to" in message)
    with pytest.raises((TypeError, ValueError), match=words):
        read_level(scheduler, 1)


def test_consistency_models_warn_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_warned", set())
    scheduler = build("LCMScheduler", "plain", "epsilon")
    with caplog.at_level(logging.WARNING, logger="sd_guard.noise"):
        for t in scheduler.timesteps:
            read_level(scheduler, t)
    assert [r.name for r in caplog.records] == ["sd_guard.noise"]
    assert "probability-flow" in caplog.text


@pytest.mark.parametrize("name", sorted(SUPPORTED_SCHEDULERS - {"DPMSolverSDEScheduler"}))
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_early_steps_are_those_in_much_noise(name: str, kind: str) -> None:
    scheduler = build(name, "plain", kind)
    for count in (1, 4, 10, 40):
        scheduler.set_timesteps(count)
        timesteps = scheduler.timesteps.tolist()
        early = early_steps(scheduler, timesteps)
        assert early.stop > early.start and early.start == first_clear_step(scheduler, timesteps)
        levels = [NoiseLevel.from_alpha_bar(float(scheduler.alphas_cumprod[int(t)])).sigma for t in timesteps]
        assert all(sigma >= EARLY_SIGMA for sigma in levels[early.start + 1 : early.stop])
        assert early.stop == len(levels) or levels[early.stop] < EARLY_SIGMA
        assert early.order == (2 if name.startswith(("Heun", "KDPM2", "DPMSolverSDE")) else 1)


@pytest.mark.parametrize("name", sorted(SUPPORTED_SCHEDULERS - {"DPMSolverSDEScheduler"}))
def test_the_first_clear_step_is_where_the_noise_has_come_down(name: str) -> None:
    plain = build(name, "plain", "epsilon")
    linear = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    scheduler = type(plain).from_config(plain.config, **linear)
    scheduler.set_timesteps(40)
    timesteps = scheduler.timesteps.tolist()
    step = first_clear_step(scheduler, timesteps)
    before, there = (read_level(scheduler, scheduler.timesteps[i]).sigma for i in (step - 1, step))
    # Timesteps between two of the training's, and middle stages of KDPM2, are read exactly in the loop only.
    assert there / 1.05 <= CLEAR_SIGMA < before * 1.05
    assert getattr(scheduler, "step_index", None) is None
    assert first_clear_step(plain, plain.timesteps.tolist()) == 0  # Stable Diffusion's betas begin below it


def test_where_no_error_is_multiplied_every_step_is_clear() -> None:
    linear = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "rescale_betas_zero_snr": True}
    for kind in PREDICTION_TYPES:
        scheduler = diffusers.DDIMScheduler(**linear, prediction_type=kind, timestep_spacing="trailing")
        scheduler.set_timesteps(40)
        step = first_clear_step(scheduler, scheduler.timesteps.tolist())
        assert (step > 0) == (kind == "epsilon"), kind
    assert first_clear_step(build("DDIMScheduler", "plain", "epsilon"), []) == 0


@settings(deadline=None)
@given(
    angle=st.floats(0.01, math.pi / 2 - 0.01),
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_parametrisations_agree(angle: float, prediction_type: Any, dtype: torch.dtype) -> None:
    """All three recover (x_0, e), in float32 at least, with x = a x0_hat + s e_hat whatever the output is."""
    level = NoiseLevel(math.cos(angle), math.sin(angle))
    x0, e = normal((2, 3, 4), 1).double(), normal((2, 3, 4), 2).double()
    x = (level.a * x0 + level.s * e).to(dtype)
    output = {"epsilon": e, "v_prediction": level.a * e - level.s * x0, "sample": x0}[prediction_type].to(dtype)
    got = interpret(output, x, level, prediction_type)
    assert got.e_hat.dtype == got.x0_hat.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        level.a * got.x0_hat.double() + level.s * got.e_hat.double(), x.double(), atol=5e-5, rtol=1e-4
    )
    loss = torch.finfo(dtype).eps * 10 / min(level.a, level.s) + 1e-5
    assert (got.x0_hat - x0).abs().max() < loss
    assert (got.e_hat - e).abs().max() < loss


def test_wrong_shapes_and_types_are_refused() -> None:
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="returned"):
        interpret(torch.zeros(1, 8, 8, 8), x, NoiseLevel(0.6, 0.8), "epsilon")
    with pytest.raises(ValueError, match="unknown prediction_type"):
        interpret(x, x, NoiseLevel(0.6, 0.8), "velocity")  # type: ignore[arg-type]
