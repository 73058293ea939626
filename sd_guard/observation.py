"""What one sampling step shows of its images: the statistics of a UNet call that the sampler made anyway, and probes.

A step's conditional lane is compared with its *control*: the same latent without a prompt. Under classifier-free
guidance with an empty negative prompt the sampler evaluates the control itself; otherwise the guard does, and counts
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sd_guard.compiled import of_one_shape
from sd_guard.lanes import Unet, evaluate_lanes
from sd_guard.noise import Prediction, PredictionType, interpret
from sd_guard.statistics.base import Denoiser, StepCall
from sd_guard.statistics.guidance import cfg_norm
from sd_guard.statistics.lid import probe_products, trajectory_lid
from sd_guard.statistics.seed_agreement import OTHER_SEED_LANES, excess_agreement, predict_from_other_seed
from sd_guard.statistics.sharpness import detail_and_added, excess_persistence
from sd_guard.trace import FiniteDifference, draw_row_probes, perturb
from sd_guard.transfers import index_of

# name -> (point, lane) of every statistic an observation can hold
STATISTICS: Mapping[str, tuple[str, str]] = {
    "detail": ("noisy", "conditional"),
    "added_detail": ("noisy", "conditional-control"),
    "cfg_norm": ("noisy", "conditional-control"),
    "trajectory_lid": ("noisy", "conditional"),
    "trajectory_lid_control": ("noisy", "control"),
    "excess_agreement": ("noisy", "conditional-control"),
    "excess_persistence": ("noisy", "conditional"),  # since the deciding step
}
PROBED = ("trajectory_lid", "trajectory_lid_control", "excess_agreement")  # those that cost lanes


@dataclass(frozen=True, slots=True)
class Question:
    """What images in doubt are asked together.

    Attributes:
        probes: Rademacher vectors for the trajectory LID, shared by the lanes with and without the prompt; 0 for none.
        seeds: numbers of the other seeds, the next after those that were asked before.
    """

    probes: int
    seeds: range

    @property
    def lanes(self) -> int:
        """Lane evaluations an image."""
        return 2 * self.probes + OTHER_SEED_LANES * len(self.seeds)


@dataclass(frozen=True, slots=True)
class Observation:
    """Statistics of one step.

    Attributes:
        step: index into the scheduler's timesteps.
        dimension: D, the entries of one latent.
        values: name in STATISTICS to (B,) float32; those in PROBED are 0 where an image was not probed.
        lanes: extra lane evaluations spent on each of the B images.
        probed: name in PROBED to the images that it was measured of, ascending.
        x0_hat: (B, C, H, W) the conditional prediction, float32; None in one that was read back from a record.
    """

    step: int
    dimension: int
    values: Mapping[str, Tensor]
    lanes: tuple[int, ...]
    probed: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    x0_hat: Tensor | None = None

    def has(self, name: str, row: int) -> bool:
        """Whether a statistic that is in `values` was measured of this image."""
        return name not in PROBED or row in self.probed.get(name, ())

    def select(self, rows: Sequence[int]) -> Observation:
        """The same of some images."""
        index = index_of(rows, next(iter(self.values.values())).device)
        values = {name: value[index] for name, value in self.values.items()}
        probed = {
            name: tuple(place for place, row in enumerate(rows) if row in own) for name, own in self.probed.items()
        }
        x0_hat = None if self.x0_hat is None else self.x0_hat[index]
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


def read_values(observations: Sequence[Observation]) -> list[tuple[Observation, str, list[float]]]:
    """Every statistic with its B values, read at once: each on its own would be waited for."""
    named = [(seen, name) for seen in observations for name in seen.values]
    table = torch.stack([seen.values[name] for seen, name in named]).tolist() if named else []
    return [(seen, name, values) for (seen, name), values in zip(named, table, strict=True)]


def with_control(call: StepCall, unet: Unet, rows: int) -> StepCall:
    """The call with its control: evaluated, and counted, where the sampler did without.

    Args:
        call: of the sampler.
        unet: that it called.
        rows: of that call, the shape that a compiled UNet is asked in.
    """
    if call.control is not None:
        return call
    first = torch.arange(call.x.shape[0], device=call.x.device)
    control = evaluate_lanes(of_one_shape(unet, rows), call.x, call.timestep, call.lanes.select(first))
    return replace(call, control=control, spent=1)


def observe(call: StepCall, prediction_type: PredictionType) -> Observation:
    """Takes the statistics of one step that need no probes.

    Args:
        call: what the sampler's UNet call was given and returned, with a control.
        prediction_type: of the UNet.

    Returns:
        (B,) values. A UNet that returned NaN or infinity gives values that are not finite.
    """
    return observe_all([call], prediction_type)[0]


def observe_all(calls: Sequence[StepCall], prediction_type: PredictionType) -> list[Observation]:
    """`observe` of several steps of one trajectory, at once: they are small, and what is launched is what they cost."""
    both = [_both(call, prediction_type) for call in calls]
    x0_hat, e_hat = (torch.cat(parts, dim=1) for parts in zip(*((p.x0_hat, p.e_hat) for p in both), strict=True))
    names = ("detail", "added_detail", "cfg_norm")
    measured = torch.stack([*detail_and_added(*x0_hat), cfg_norm(*e_hat)]).reshape(len(names), len(calls), -1)
    return [
        Observation(
            step=call.step,
            dimension=call.x[0].numel(),
            values=dict(zip(names, values, strict=True)),
            lanes=(call.spent,) * call.x.shape[0],
            x0_hat=own.x0_hat[0],
        )
        for call, own, values in zip(calls, both, measured.unbind(1), strict=True)
    ]


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
def probe(seen: Observation, call: StepCall, model: Denoiser, rows: Sequence[int], question: Question) -> Observation:
    """Adds what costs lanes, of some images: their trajectory LID, and their agreement with other seeds.

    Args:
        seen: of `call`, with the answers to the questions before.
        call: with a control.
        model: behind the trajectory; its `seeds` are those of the probes, one an image of the batch.
        rows: the images to probe, at least one.
        question: what is measured.
    """
    measured: dict[str, Tensor] = {}
    if question.probes:
        control, conditional = _lids(call, model, rows, question.probes)
        measured |= {"trajectory_lid_control": control, "trajectory_lid": conditional}
    if question.seeds:
        agreements = _agreements(call, model, rows, question.seeds)
        measured["excess_agreement"] = mean_agreement(seen, rows, agreements, question.seeds)
    return add_probed(seen, measured, rows, question.lanes)


def mean_agreement(seen: Observation, rows: Sequence[int], agreements: Tensor, seeds: range) -> Tensor:
    """(N,) mean over all other seeds so far, from (K, N) excess agreements with those that are new."""
    total = agreements.sum(0)
    if seeds.start:
        before = seen.values["excess_agreement"]
        total = total + seeds.start * before[index_of(rows, before.device)]
    return total / seeds.stop


def add_probed(seen: Observation, measured: Mapping[str, Tensor], rows: Sequence[int], lanes: int) -> Observation:
    """The observation with what was measured of some of its images only.

    Args:
        seen: of B images.
        measured: name in PROBED to (N,).
        rows: N images.
        lanes: that each of them cost.
    """
    values, probed, spent = dict(seen.values), dict(seen.probed), list(seen.lanes)
    for name, value in measured.items():
        before = values.get(name, value.new_zeros(len(spent)))
        values[name] = before.index_copy(0, index_of(rows, value.device), value)
        probed[name] = tuple(sorted({*rows, *probed.get(name, ())}))
    for row in rows:
        spent[row] += lanes
    return replace(seen, values=values, lanes=tuple(spent), probed=probed)


def _lids(call: StepCall, model: Denoiser, rows: Sequence[int], probes: int) -> Tensor:
    """(2, N) trajectory LID of N rows without the prompt and with it, by UNet calls of at most the guided shape."""
    device, images, own = call.x.device, call.x.shape[0], [model.seeds[row] for row in rows]
    v = torch.cat([draw_row_probes(own, call.x.shape[1:], call.step, device, k) for k in range(probes)])
    index = index_of(rows, device).repeat(probes)
    with_prompt, without = _predictions(call, model.prediction_type)

    def traces(v: Tensor, index: Tensor) -> Tensor:
        """(2, N) of N probes: without the prompt, and with it."""
        moved = perturb(call.x[index], v, FiniteDifference().step_for(call.x))
        point = torch.cat([moved.point] * 2)
        output = evaluate_lanes(model.unet, point, call.timestep, call.lanes.select(torch.cat([index, index + images])))
        e_hat = interpret(output, point, call.level, model.prediction_type).e_hat
        base = torch.cat([without.e_hat[index], with_prompt.e_hat[index]])
        return probe_products(torch.cat([v] * 2), e_hat, base, torch.cat([moved.step] * 2)).total.reshape(2, -1)

    trace = torch.cat([traces(*part) for part in zip(v.split(images), index.split(images), strict=True)], dim=1)
    return trajectory_lid(call.x[0].numel(), call.level.s, trace).reshape(2, probes, len(rows)).mean(1)


def _agreements(call: StepCall, model: Denoiser, rows: Sequence[int], seeds: range) -> Tensor:
    """(K, N) excess agreement of N rows with what their prompts show from the noise of each of K other seeds."""
    index = index_of(rows, call.x.device)
    lanes = call.lanes.select(index + call.x.shape[0])
    with_prompt, without = (prediction.x0_hat[index] for prediction in _predictions(call, model.prediction_type))
    others = [
        predict_from_other_seed(model, lanes, call.x[index], [model.seeds[row] for row in rows], number)
        for number in seeds
    ]
    return torch.stack([excess_agreement(with_prompt, without, other, call.level) for other in others])


def _both(call: StepCall, prediction_type: PredictionType) -> Prediction:
    """(2, B, C, H, W): with the prompt, and without."""
    assert call.control is not None
    outputs = torch.stack([call.conditional, call.control])
    return interpret(outputs, call.x.expand_as(outputs), call.level, prediction_type)


def _predictions(call: StepCall, prediction_type: PredictionType) -> tuple[Prediction, Prediction]:
    """With the prompt, and without."""
    both = _both(call, prediction_type)
    return Prediction(both.e_hat[0], both.x0_hat[0]), Prediction(both.e_hat[1], both.x0_hat[1])
