"""What one sampling step shows of its images: the statistics of a UNet call that the sampler made anyway, and probes.

A step's conditional lane is compared with its *control*: the same latent without a prompt. Under classifier-free
guidance with an empty negative prompt the sampler evaluates the control itself; otherwise the guard does, and counts
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sd_guard.lanes import Unet, evaluate_lanes
from sd_guard.noise import PredictionType, interpret
from sd_guard.statistics.base import StepCall
from sd_guard.statistics.guidance import cfg_norm
from sd_guard.statistics.lid import probe_products, trajectory_lid
from sd_guard.statistics.sharpness import detail, log_detail_ratio
from sd_guard.trace import FiniteDifference, draw_row_probes, perturb

# name -> (point, lane) of every statistic an observation can hold
STATISTICS: Mapping[str, tuple[str, str]] = {
    "detail": ("noisy", "conditional"),
    "log_detail_ratio": ("noisy", "conditional/control"),
    "cfg_norm": ("noisy", "conditional-control"),
    "trajectory_lid": ("noisy", "conditional"),
    "trajectory_lid_control": ("noisy", "control"),
}


@dataclass(frozen=True, slots=True)
class Observation:
    """Statistics of one step.

    Attributes:
        step: index into the scheduler's timesteps.
        dimension: D, the entries of one latent.
        values: name in STATISTICS to (B,) float32.
        lanes: extra lane evaluations spent on each image.
        x0_hat: (B, C, H, W) the conditional prediction, float32; None in one that was read back from a record.
    """

    step: int
    dimension: int
    values: Mapping[str, Tensor]
    lanes: int
    x0_hat: Tensor | None = None


def predicted_image(observations: Sequence[Observation]) -> Tensor:
    """(B, C, H, W) the conditional prediction of the last of the observations.

    Raises:
        ValueError: it was read back from a record, which holds none.
    """
    x0_hat = observations[-1].x0_hat
    if x0_hat is None:
        raise ValueError("an observation that was read back from a record holds no predicted image")
    return x0_hat


@torch.no_grad()
def observe(
    call: StepCall, unet: Unet, prediction_type: PredictionType, *, probes: int, seeds: Sequence[int]
) -> Observation:
    """Takes the statistics of one step.

    Args:
        call: what the sampler's UNet call was given and returned.
        unet: for probes, and for a control that the sampler did not evaluate.
        prediction_type: of `unet`.
        probes: Rademacher vectors for the trajectory LID, two lanes each; 0 takes the free statistics only.
        seeds: one probe seed an image, in [0, 2^64).

    Returns:
        (B,) values. A UNet that returned NaN or infinity gives values that are not finite.
    """
    images, spent = call.x.shape[0], 0
    control = call.control
    if control is None:
        first = torch.arange(images, device=call.x.device)
        control, spent = evaluate_lanes(unet, call.x, call.timestep, call.lanes.select(first)), 1
    with_prompt = interpret(call.conditional, call.x, call.level, prediction_type)
    without = interpret(control, call.x, call.level, prediction_type)
    values = {
        "detail": detail(with_prompt.x0_hat),
        "log_detail_ratio": log_detail_ratio(with_prompt.x0_hat, without.x0_hat),
        "cfg_norm": cfg_norm(with_prompt.e_hat, without.e_hat),
    }
    if probes:
        base = torch.cat([without.e_hat, with_prompt.e_hat])
        traces = [_probe(call, unet, prediction_type, base, seeds, probe) for probe in range(probes)]
        lid = trajectory_lid(call.x[0].numel(), call.level.s, torch.stack(traces).mean(0))
        values["trajectory_lid_control"], values["trajectory_lid"] = lid.chunk(2)
    return Observation(call.step, call.x[0].numel(), values, spent + 2 * probes, with_prompt.x0_hat)


def _probe(
    call: StepCall, unet: Unet, prediction_type: PredictionType, base: Tensor, seeds: Sequence[int], probe: int
) -> Tensor:
    """(2B,) trace estimates from one vector an image, shared by its two lanes: a call of the guided call's shape."""
    v = draw_row_probes(seeds, call.x.shape[1:], call.step, call.x.device, probe)
    moved = perturb(call.x, v, FiniteDifference().step_for(call.x.dtype))
    point = torch.cat([moved.point] * 2)
    output = evaluate_lanes(unet, point, call.timestep, call.lanes)
    e_hat = interpret(output, point, call.level, prediction_type).e_hat
    return probe_products(torch.cat([v] * 2), e_hat, base, torch.cat([moved.step] * 2)).total
