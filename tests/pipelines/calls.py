"""Calls of three images that pipelines are compared by."""

from __future__ import annotations

from typing import Any

import torch
from tiny import seeded

from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipelineOutput

STEPS = 6
PROMPTS = ["x", "a dog on the moon", "blue"]
GENERATORS = {
    "list": lambda: seeded(1, 2, 3),
    "single": lambda: torch.Generator().manual_seed(1),
    "none": lambda: None,
}


def latents_of(pipe: Any, mode: str = "list", **arguments: Any) -> tuple[Any, torch.Tensor]:
    """Output of a call that starts from a known global state, and the global state that it leaves."""
    arguments = {"prompt": PROMPTS, "num_inference_steps": STEPS, "output_type": "latent"} | arguments
    if "generator" not in arguments:
        arguments["generator"] = GENERATORS[mode]()
    torch.manual_seed(7)
    output = pipe(**arguments)
    return output, torch.get_rng_state()


def scores_of(output: GuardedStableDiffusionPipelineOutput) -> list[float]:
    assert output.records is not None
    return [record.score for record in output.records]
