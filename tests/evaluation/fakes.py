"""Statistics of which every value can be computed again by hand."""

from dataclasses import dataclass

import torch

from sd_guard.lanes import evaluate_lanes
from sd_guard.trace import draw_row_probes


@dataclass(frozen=True)
class Norm:
    """Free, anywhere; lower is memorized."""

    name: str = "norm"
    higher_is_memorized: bool = False
    lanes: float = 0.0
    at: tuple[float, ...] | None = None

    def measure(self, call, model):
        return model.read(call, "conditional").e_hat.flatten(1).norm(dim=1)


@dataclass(frozen=True)
class Probed:
    """Two lanes, at two steps of its own, with probes of the image's own seed."""

    name: str = "probed"
    higher_is_memorized: bool = True
    lanes: float = 2
    at: tuple[float, ...] | None = (0.2, 0.6)

    def measure(self, call, model):
        v = draw_row_probes(model.seeds, call.x.shape[1:], call.step, call.x.device)
        out = evaluate_lanes(model.unet, torch.cat([call.x + v] * 2), call.timestep, call.lanes)
        return out.double().chunk(2)[1].flatten(1).sum(1)


@dataclass(frozen=True)
class Alike:
    """Of the seeds of a prompt: the mean distance to their mean, at the first step."""

    name: str = "alike"
    higher_is_memorized: bool = False
    lanes: float = 0.0
    at: tuple[float, ...] | None = (0.0,)

    def feature(self, call, model):
        return model.read(call, "conditional").x0_hat

    def compare(self, features):
        return float((features - features.mean(0)).flatten(1).norm(dim=1).mean())
