"""The noise level a UNet call is made at, and what its output says about noise and image.

Everything downstream speaks of one forward process, ``x = a x_0 + s e``, where ``x`` is what the UNet is given (after
``scale_model_input``). This file is the only one that knows how each diffusers scheduler stores ``a`` and ``s``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

PredictionType: TypeAlias = Literal["epsilon", "v_prediction", "sample"]

# Schedulers that look their noise level up by training timestep, and keep no step index worth trusting.
_BY_TIMESTEP: Final = frozenset({"DDIMScheduler", "DDPMScheduler", "PNDMScheduler"})
# As above, but each step jumps to a fresh noising of the predicted image.
_CONSISTENCY: Final = frozenset({"LCMScheduler", "TCDScheduler"})
# Schedulers that walk a list of ``sigma = s / a``, with a step index.
_BY_SIGMA: Final = frozenset(
    {
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DPMSolverSDEScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "SASolverScheduler",
    }
)
SUPPORTED_SCHEDULERS: Final = _BY_TIMESTEP | _CONSISTENCY | _BY_SIGMA

# By which a noise prediction's error is multiplied at most where its clean latent still shows anything. Stable
# Diffusion's own schedule begins at 14.6. Chosen on `tune` rows of a reference checkpoint that begins at 131.
CLEAR_SIGMA: Final = 20.0
# Below which a step of a short schedule is no early one any more: once the latents hold the picture, the model sees it
# without the prompt, too. Chosen on `tune` rows of nine reference checkpoints with 8 to 40 steps; 7 did nearly as well.
EARLY_SIGMA: Final = 8.0

_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class NoiseLevel:
    """Coefficients of ``x = a x_0 + s e`` in the UNet's input space, where ``a^2 + s^2 = 1``.

    Attributes:
        a: Weight of the clean latent, from 1 (no noise) to 0.
        s: Standard deviation of the noise.
    """

    a: float
    s: float

    @classmethod
    def from_sigma(cls, sigma: float) -> NoiseLevel:
        """The level of ratio ``sigma = s / a`` (Karras et al. 2022, arXiv 2206.00364, after input scaling)."""
        a = 1.0 / math.hypot(1.0, sigma)
        return cls(a, sigma * a)

    @classmethod
    def from_alpha_bar(cls, alpha_bar: float) -> NoiseLevel:
        """The level of cumulative product ``alpha_bar = a^2`` (Ho et al. 2020, arXiv 2006.11239)."""
        return cls(math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar))

    @property
    def sigma(self) -> float:
        """Noise-to-signal ratio ``s / a``; infinite where nothing is left of the image."""
        return self.s / self.a if self.a > 0.0 else math.inf


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one UNet output says, in float32 or better.

    Attributes:
        e_hat: Predicted noise, (B, *S).
        x0_hat: Predicted clean latent (Tweedie's posterior mean), (B, *S).
    """

    e_hat: Tensor
    x0_hat: Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or untouched where it is float64 already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_scheduler(scheduler: Any) -> None:
    """Refuse, before any sampling, a scheduler whose noise level or parametrisation is not understood.

    Args:
        scheduler: A diffusers scheduler, or a subclass of one.

    Raises:
        TypeError: The class belongs to another forward process, or is unknown.
        ValueError: The class is known, but is configured for another forward process or output.
    """
    name = type(scheduler).__name__
    remedy = "use DDIM, Euler or DPMSolverMultistep with the checkpoint's own scheduler config"
    lineage = {base.__name__ for base in type(scheduler).__mro__}
    if not lineage & SUPPORTED_SCHEDULERS:
        if name.startswith("EDM"):
            why = "scales the UNet's input and output by EDM preconditioning"
        elif name.startswith("FlowM"):
            why = "integrates a flow-matching velocity, not a noise prediction"
        else:
            why = "is not among the schedulers whose noise level sd_guard can read"
        raise TypeError(f"{name} {why}; {remedy}.")
    config = scheduler.config
    prediction_type = config.get("prediction_type", "epsilon")
    if config.get("use_flow_sigmas", False) or prediction_type == "flow_prediction":
        raise ValueError(f"{name} is configured for flow matching; {remedy}, and use_flow_sigmas=False.")
    _check_prediction_type(prediction_type, name)
    if config.get("variance_type") in ("learned", "learned_range"):
        raise ValueError(f"{name} expects a learned variance, which no Stable Diffusion UNet predicts; {remedy}.")


def read_level(scheduler: Any, timestep: int | float | Tensor) -> NoiseLevel:
    """Noise level of the latent that the UNet is about to be given.

    Call it where the UNet is called: after ``scale_model_input`` and before ``step``. It reads the scheduler's state
    and changes nothing. Schedulers with a step index are read by it, since second-order ones visit a timestep twice,
    and a timestep on the GPU then costs no synchronisation (KDPM2 alone keeps its middle levels on the GPU).

    Args:
        scheduler: A scheduler that `check_scheduler` accepts, after ``set_timesteps``.
        timestep: The scheduler's current timestep, one for the whole batch.

    Returns:
        The level, the same for each image of the batch.
    """
    check_scheduler(scheduler)
    lineage = {base.__name__ for base in type(scheduler).__mro__}
    if lineage & _BY_SIGMA:
        return NoiseLevel.from_sigma(_read_sigma(scheduler, timestep, lineage))
    name = type(scheduler).__name__
    if lineage & _CONSISTENCY and name not in _warned:
        _warned.add(name)
        logger.warning("%s does not follow the probability-flow trajectory: calibrate for it separately.", name)
    return NoiseLevel.from_alpha_bar(float(scheduler.alphas_cumprod[int(timestep)]))


def first_clear_step(scheduler: Any, timesteps: Sequence[float]) -> int:
    """The first step whose predicted clean latent is not mostly the model's own error.

    ``x0_hat = (x - s e_hat) / a``: a predicted noise that is wrong by 1 % makes an image that is wrong by 1 % of
    ``sigma``, which is over 100 at the start of a linear schedule. The other parametrisations multiply no error.

    Args:
        scheduler: A supported scheduler, after ``set_timesteps``.
        timesteps: Its timesteps, on the host.

    Returns:
        An index into `timesteps`; 0 for any parametrisation but `epsilon`, and where no step is clear.
    """
    if scheduler.config.get("prediction_type", "epsilon") != "epsilon":
        return 0
    sigmas = _sigmas_at(scheduler, timesteps)
    return next((step for step, sigma in enumerate(sigmas) if sigma <= CLEAR_SIGMA), 0)


class EarlySteps(NamedTuple):
    """The steps of a schedule that show something and are made in much noise, at least one.

    Attributes:
        start: The first.
        stop: The one after the last.
        order: Evaluations that the scheduler makes for a step of its own: each of them is a timestep.
    """

    start: int
    stop: int
    order: int = 1


def early_steps(scheduler: Any, timesteps: Sequence[float]) -> EarlySteps:
    """The steps from `first_clear_step` on that are made in noise of at least `EARLY_SIGMA`.

    Args:
        scheduler: A supported scheduler, after ``set_timesteps``.
        timesteps: Its timesteps, on the host.
    """
    clear = first_clear_step(scheduler, timesteps)
    later = _sigmas_at(scheduler, timesteps[clear + 1 :])
    early = sum(1 for _ in takewhile(lambda sigma: sigma >= EARLY_SIGMA, later))
    return EarlySteps(clear, clear + 1 + early, getattr(scheduler, "order", 1))


def _sigmas_at(scheduler: Any, timesteps: Sequence[float]) -> Iterator[float]:
    """Noise levels by the training schedule, one after the other; read at once."""
    alpha_bar = scheduler.alphas_cumprod.tolist()
    return (NoiseLevel.from_alpha_bar(alpha_bar[int(t)]).sigma for t in timesteps)


def nearest_level(alphas_cumprod: Tensor, sigma: float) -> tuple[int, NoiseLevel]:
    """The training timestep whose noise level is nearest to `sigma`, by the logarithm, and that level.

    Args:
        alphas_cumprod: (T,) the checkpoint's own schedule.
        sigma: Noise-to-signal ratio, above 0.
    """
    levels = [NoiseLevel.from_alpha_bar(value) for value in alphas_cumprod.tolist()]
    nearest = min(range(len(levels)), key=lambda t: abs(math.log(max(levels[t].sigma, 1e-12) / sigma)))
    return nearest, levels[nearest]


def interpret(model_output: Tensor, x: Tensor, level: NoiseLevel, prediction_type: PredictionType) -> Prediction:
    """Turn a UNet output of any parametrisation into predicted noise and predicted clean latent.

    Where the division is by zero (an epsilon prediction at ``a = 0``, a sample prediction at ``s = 0``) the result is
    not finite, so that whatever is computed from it reads as unscored.

    Args:
        model_output: What the UNet returned for `x`, (B, *S), any floating dtype.
        x: The UNet's input, (B, *S).
        level: The noise level of `x`.
        prediction_type: The scheduler's ``config.prediction_type``.

    Returns:
        Noise and clean latent with ``x = a x0_hat + s e_hat``, float64 if an argument is, else float32.
    """
    if model_output.shape != x.shape:
        raise ValueError(f"The UNet returned {tuple(model_output.shape)} for an input of {tuple(x.shape)}.")
    _check_prediction_type(prediction_type, "interpret")
    out, x = at_least_float32(model_output), at_least_float32(x)
    a, s = level.a, level.s
    if prediction_type == "epsilon":
        return Prediction(e_hat=out, x0_hat=(x - s * out) / a)
    if prediction_type == "v_prediction":  # v = a e - s x_0 (Salimans and Ho 2022, arXiv 2202.00512)
        return Prediction(e_hat=a * out + s * x, x0_hat=a * x - s * out)
    return Prediction(e_hat=(x - a * out) / s, x0_hat=out)


def _check_prediction_type(prediction_type: str, who: str) -> None:
    known = get_args(PredictionType)
    if prediction_type not in known:
        raise ValueError(f"{who}: unknown prediction_type {prediction_type!r}; set it to one of {', '.join(known)}.")


def _read_sigma(scheduler: Any, timestep: int | float | Tensor, lineage: set[str]) -> float:
    index = scheduler.step_index
    if index is None:  # the scheduler settles it in its first step(): the same rule, without writing it
        index = scheduler.begin_index
    if index is None:
        on_schedule = timestep.to(scheduler.timesteps.device) if isinstance(timestep, Tensor) else timestep
        index = scheduler.index_for_timestep(on_schedule)
    if getattr(scheduler, "state_in_first_order", True) or "HeunDiscreteScheduler" in lineage:
        return float(scheduler.sigmas[index])
    # The second evaluation of a two-stage step happens between two entries of `sigmas`.
    if "KDPM2DiscreteScheduler" in lineage:
        return float(scheduler.sigmas_interpol[index])
    if "KDPM2AncestralDiscreteScheduler" in lineage:
        return float(scheduler.sigmas_interpol[index - 1])
    return float(scheduler.mid_point_sigma)
