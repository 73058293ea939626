"""Copies of a sampler's state, whole or for some images: what a resumed trajectory starts from.

A multistep scheduler remembers earlier model outputs, and resetting its step index alone would resume a different
trajectory. So a snapshot is every attribute: lists and per-image tensors copied, tables and the tensors in lists kept
(schedulers replace those, and never write to them).
"""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

import torch
from torch import Tensor

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None


class _NoiseOfSome:
    """What a scheduler's own source of noise (a Brownian tree, grown for a whole batch) has for some of its images."""

    def __init__(self, sampler: Any, rows: Tensor) -> None:
        self.sampler, self.rows = sampler, rows

    def __call__(self, *times: Any) -> Tensor:
        noise: Tensor = self.sampler(*times)
        return noise[self.rows.to(noise.device)]


def share_noise(snapshot: Any, scheduler: Any) -> None:
    """Gives a scheduler's source of noise to a snapshot from before it was grown, in the scheduler's first step.

    It answers alike whoever asks, and when. A copy that grew its own would resume another trajectory, and take the seed
    from the caller's global random state.
    """
    if getattr(snapshot, "noise_sampler", scheduler) is None:
        snapshot.noise_sampler = scheduler.noise_sampler


def copy_scheduler(scheduler: Any) -> Any:
    """An independent scheduler at the same point of the same schedule; configuration and tables are shared."""
    twin = copy.copy(scheduler)
    for name, value in vars(twin).items():
        if isinstance(value, (list, dict)) and name != "_internal_dict":
            vars(twin)[name] = copy.copy(value)
        elif isinstance(value, Tensor) and value.ndim > 1:  # PNDM's Runge-Kutta steps add to theirs in place
            vars(twin)[name] = value.clone()
    return twin


def select_images(scheduler: Any, rows: Tensor, latents: Tensor) -> Any:
    """A copy of `scheduler` whose per-image tensors keep only `rows`.

    Args:
        scheduler: at any point of a trajectory over `latents`.
        rows: (F,) int64 indices of images.
        latents: (B, C, H, W); a tensor of this shape in the scheduler is per image.
    """
    twin = copy_scheduler(scheduler)
    for name, value in vars(twin).items():
        if name != "_internal_dict":
            vars(twin)[name] = _map_images(value, latents.shape, lambda t: t[rows.to(t.device)])
    if getattr(twin, "noise_sampler", None) is not None:
        twin.noise_sampler = _NoiseOfSome(twin.noise_sampler, rows)
    return twin


def replace_images(scheduler: Any, resumed: Any, rows: Tensor, latents: Tensor) -> None:
    """Writes the per-image tensors of `resumed` (F images) over `rows` of `scheduler` (B images), both at one step.

    The other images' values are not touched: a changed tensor is a new one.
    """
    for name, value in vars(scheduler).items():
        if name != "_internal_dict":
            vars(scheduler)[name] = _merge_images(value, vars(resumed)[name], rows, latents.shape)


def _map_images(value: Any, shape: torch.Size, select: Any) -> Any:
    if isinstance(value, Tensor) and value.shape == shape:
        return select(value)
    if isinstance(value, list):
        return [_map_images(item, shape, select) for item in value]
    return value


def _merge_images(value: Any, resumed: Any, rows: Tensor, shape: torch.Size) -> Any:
    if isinstance(value, Tensor) and value.shape == shape and isinstance(resumed, Tensor):
        return value.index_copy(0, rows.to(value.device), resumed.to(value))
    if isinstance(value, list) and isinstance(resumed, list) and len(value) == len(resumed):
        return [_merge_images(a, b, rows, shape) for a, b in zip(value, resumed, strict=True)]
    return value


def generator_states(generator: Generators) -> list[Tensor]:
    """The states of the call's generators, in order; empty without any."""
    if generator is None:
        return []
    return [g.get_state() for g in (generator if isinstance(generator, list) else [generator])]


def fork_generators(generator: Generators, states: list[Tensor], rows: list[int], seed: int) -> Generators:
    """Generators for a resumed trajectory of some images; the call's own generators are not advanced.

    With a list, each image's own noise is repeated. With one generator for the batch, or none, the noise of a sub-batch
    cannot be the batch's: it is drawn from a fork, so that the neighbours' noise stays what it was.
    """
    if isinstance(generator, list):
        return [_fork(generator[row], states[row]) for row in rows]
    if generator is None:
        return torch.Generator().manual_seed(seed)
    return _fork(generator, states[0])


def _fork(generator: torch.Generator, state: Tensor) -> torch.Generator:
    twin = torch.Generator(device=generator.device)
    twin.set_state(state)
    return twin
