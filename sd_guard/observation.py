"""What one sampling step shows of its images: the statistics of a UNet call that the sampler made anyway, and probes.

A step's conditional lane is compared with its *control*: the same latent without a prompt. Under classifier-free
guidance with an empty negative prompt the sampler evaluates the control itself; otherwise the guard does, and counts
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sd_guard.lanes import Unet, evaluate_lanes
from sd_guard.noise import Prediction, PredictionType, interpret
from sd_guard.statistics.base import StepCall
from sd_guard.statistics.guidance import cfg_norm
from sd_guard.statistics.lid import probe_products, trajectory_lid
from sd_guard.statistics.sharpness import added_detail, detail, excess_persistence
from sd_guard.trace import FiniteDifference, draw_row_probes, perturb

# name -> (point, lane) of every statistic an observation can hold
STATISTICS: Mapping[str, tuple[str, str]] = {
    "detail": ("noisy", "conditional"),
    "added_detail": ("noisy", "conditional-control"),
    "cfg_norm": ("noisy", "conditional-control"),
    "trajectory_lid": ("noisy", "conditional"),
    "trajectory_lid_control": ("noisy", "control"),
    "excess_persistence": ("noisy", "conditional"),  # since the deciding step
}
PROBED = ("trajectory_lid", "trajectory_lid_control")  # those that cost lanes


@dataclass(frozen=True, slots=True)
class Observation:
    """Statistics of one step.

    Attributes:
        step: index into the scheduler's timesteps.
        dimension: D, the entries of one latent.
        values: name in STATISTICS to (B,) float32; those of the LID are 0 where an image was not probed.
        lanes: extra lane evaluations spent on each of the B images.
        probed: which images got probes for their LID; empty where none did.
        x0_hat: (B, C, H, W) the conditional prediction, float32; None in one that was read back from a record.
    """

    step: int
    dimension: int
    values: Mapping[str, Tensor]
    lanes: tuple[int, ...]
    probed: tuple[int, ...] = ()
    x0_hat: Tensor | None = None

    def select(self, rows: Sequence[int]) -> Observation:
        """The same of some images."""
        values = {name: value[list(rows)] for name, value in self.values.items()}
        probed = tuple(place for place, row in enumerate(rows) if row in self.probed)
        x0_hat = None if self.x0_hat is None else self.x0_hat[list(rows)]
        return replace(self, values=values, lanes=tuple(self.lanes[row] for row in rows), probed=probed, x0_hat=x0_hat)


def predicted_image(observations: Sequence[Observation]) -> Tensor:
    """(B, C, H, W) the conditional prediction of the last of the observations.

    Raises:
        ValueError: it was read back from a record, which holds none.
    """
    x0_hat = observations[-1].x0_hat
    if x0_hat is None:
        raise ValueError("an observation that was read back from a record holds no predicted image")
    return x0_hat


def lanes_of(observations: Sequence[Observation]) -> tuple[int, ...]:
    """Extra lane evaluations spent on each of the B images of a trajectory."""
    return tuple(map(sum, zip(*(seen.lanes for seen in observations), strict=True)))


def with_control(call: StepCall, unet: Unet) -> StepCall:
    """The call with its control: evaluated, and counted, where the sampler did without."""
    if call.control is not None:
        return call
    first = torch.arange(call.x.shape[0], device=call.x.device)
    control = evaluate_lanes(unet, call.x, call.timestep, call.lanes.select(first))
    return replace(call, control=control, spent=1)


def observe(call: StepCall, prediction_type: PredictionType) -> Observation:
    """Takes the statistics of one step that need no probes.

    Args:
        call: what the sampler's UNet call was given and returned, with a control.
        prediction_type: of the UNet.

    Returns:
        (B,) values. A UNet that returned NaN or infinity gives values that are not finite.
    """
    with_prompt, without = _predictions(call, prediction_type)
    values = {
        "detail": detail(with_prompt.x0_hat),
        "added_detail": added_detail(with_prompt.x0_hat, without.x0_hat),
        "cfg_norm": cfg_norm(with_prompt.e_hat, without.e_hat),
    }
    lanes = (call.spent,) * call.x.shape[0]
    return Observation(call.step, call.x[0].numel(), values, lanes, x0_hat=with_prompt.x0_hat)


def look_again(call: StepCall, prediction_type: PredictionType, then: Tensor) -> Observation:
    """What a later step says of the deciding one: no lanes, and no control is needed.

    Args:
        call: of the later step.
        prediction_type: of the UNet.
        then: (B, C, H, W) predicted images at the deciding step, of the same trajectories.
    """
    now = interpret(call.conditional, call.x, call.level, prediction_type).x0_hat
    values = {"excess_persistence": excess_persistence(then, now, call.level)}
    return Observation(call.step, call.x[0].numel(), values, (0,) * call.x.shape[0], x0_hat=now)


@torch.no_grad()
def probe(
    seen: Observation,
    call: StepCall,
    unet: Unet,
    prediction_type: PredictionType,
    rows: Sequence[int],
    *,
    probes: int,
    seeds: Sequence[int],
) -> Observation:
    """Adds the trajectory LID of some images, with their prompt and without, by UNet calls of at most the guided shape.

    Args:
        seen: the free statistics of `call`.
        call: with a control.
        unet: of the sampler.
        prediction_type: of `unet`.
        rows: the images to probe, at least one.
        probes: Rademacher vectors an image, at least 1, shared by its two lanes.
        seeds: one probe seed an image of the batch, in [0, 2^64).
    """
    device, images, own = call.x.device, call.x.shape[0], [seeds[row] for row in rows]
    v = torch.cat([draw_row_probes(own, call.x.shape[1:], call.step, device, k) for k in range(probes)])
    index = torch.tensor(list(rows), device=device).repeat(probes)
    predictions = _predictions(call, prediction_type)

    def traces(v: Tensor, index: Tensor) -> Tensor:
        """(2, N) of N probes: without the prompt, and with it."""
        moved = perturb(call.x[index], v, FiniteDifference().step_for(call.x))
        point = torch.cat([moved.point] * 2)
        output = evaluate_lanes(unet, point, call.timestep, call.lanes.select(torch.cat([index, index + images])))
        e_hat = interpret(output, point, call.level, prediction_type).e_hat
        with_prompt, without = predictions
        base = torch.cat([without.e_hat[index], with_prompt.e_hat[index]])
        return probe_products(torch.cat([v] * 2), e_hat, base, torch.cat([moved.step] * 2)).total.reshape(2, -1)

    trace = torch.cat([traces(*part) for part in zip(v.split(images), index.split(images), strict=True)], dim=1)
    lid = trajectory_lid(seen.dimension, call.level.s, trace).reshape(2, probes, len(rows)).mean(1)
    values = dict(seen.values)
    for name, value in zip(("trajectory_lid_control", "trajectory_lid"), lid, strict=True):
        values[name] = value.new_zeros(images).index_copy(0, index[: len(rows)], value)
    lanes = tuple(spent + 2 * probes * (row in rows) for row, spent in enumerate(seen.lanes))
    return replace(seen, values=values, lanes=lanes, probed=tuple(rows))


def _predictions(call: StepCall, prediction_type: PredictionType) -> tuple[Prediction, Prediction]:
    """With the prompt, and without."""
    assert call.control is not None
    conditional, control = (interpret(o, call.x, call.level, prediction_type) for o in (call.conditional, call.control))
    return conditional, control
