"""A pipeline whose UNet is a Gaussian mixture in closed form: a prompt's memory beside all that is ordinary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from oracles import GaussianMixture
from tiny import CountLanes, build, seeded
from torch import Tensor, nn

from sd_guard.guard import Guard
from sd_guard.noise import NoiseLevel
from sd_guard.observation import Observation
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.policy import Policy
from sd_guard.statistics.sharpness import resemblance

PICTURE = 0.7 * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(100))
SHARE = 0.3  # of a prompt's images that are the memory: guidance makes that all of them
PROMPT = "a dog"
_MEANS = torch.stack([PICTURE.flatten(), torch.zeros(PICTURE.numel())])
REMEMBERED = GaussianMixture(_MEANS, torch.tensor([0.01, 0.25]), torch.tensor([SHARE, 1 - SHARE]))
ORDINARY = GaussianMixture(_MEANS[1:], torch.tensor([0.25]))


class MixtureUnet(nn.Module):
    """``x_0`` is the memory, nearly to the point, or ordinary; without a prompt never the memory.

    The memory hangs on the summary tokens: a lane that attends to none of them, or has its words there instead, has
    none of it.
    """

    def __init__(self, unet: nn.Module, alphas_cumprod: Tensor, empty: Tensor, end: int) -> None:
        super().__init__()
        self.unet, self.alphas_cumprod, self.empty, self.end = unet, alphas_cumprod, empty, end
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

    @property
    def attn_processors(self) -> Any:
        return self.unet.attn_processors

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        level = NoiseLevel.from_alpha_bar(float(self.alphas_cumprod[int(timestep)]))
        prompted = (encoder_hidden_states.float() - self.empty).abs().amax((1, 2)) > 1e-3
        again = torch.arange(encoder_hidden_states.shape[1]) % self.end
        prompted = prompted & (encoder_hidden_states != encoder_hidden_states[:, again]).any(2).any(1)
        if encoder_attention_mask is not None:
            prompted = prompted & encoder_attention_mask[:, self.end :].any(1)
        e_hat = [
            (REMEMBERED if p else ORDINARY).predict_noise(x[None], level) for x, p in zip(sample, prompted, strict=True)
        ]
        return (torch.cat(e_hat),)


@dataclass(frozen=True)
class DetailThere:
    """Scores the detail of the predicted image: about 0.78 of the memory, 0.1 of what is ordinary."""

    threshold: float = 0.4

    def score(self, observations: Any, later: Sequence[Observation] = ()) -> Tensor:
        return observations[-1].values["detail"]

    def in_doubt(self, observations: Any) -> Tensor:
        return torch.zeros(len(observations[0].values["detail"]), dtype=torch.bool)


def mixture_pipeline(parts: dict[str, Any], *plan: Any) -> GuardedStableDiffusionPipeline:
    """Its UNet remembers a picture for every prompt, and its guard knows by the detail of what is predicted."""
    host = build(GuardedStableDiffusionPipeline, parts)
    empty = host.encode_prompt([""], "cpu", 1, False)[0][0].detach()
    ids = host.tokenizer(PROMPT, padding="max_length", truncation=True).input_ids
    unet = MixtureUnet(parts["unet"], host.scheduler.alphas_cumprod, empty, ids.index(host.tokenizer.eos_token_id))
    pipe = build(GuardedStableDiffusionPipeline, {**parts, "unet": unet})
    policy = Policy(budget=1000, max_attempts=9, max_resemblance=0.6)
    looks: dict[str, Any] = {"observe_at": (0.1, 0.2, 0.3), "look_again_at": (), "probes": 0}
    pipe.enable_guard(Guard(plan=plan, detector=DetailThere(), policy=policy, **looks))
    return pipe


def call(pipe: Any, *seeds: int) -> Any:
    """Images of these seeds, all of which are the memory where nothing is done."""
    arguments: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "latent"}
    return pipe([PROMPT] * len(seeds), generator=seeded(*seeds), **arguments)


KNOWN, OTHER = (4, 5), 3  # seeds of memories, and one that is none


def assert_forgets(parts: dict[str, Any], mitigation: Any, lanes: int) -> None:
    """The mitigation's first change turns memories into images with nothing of the picture, for so many lanes each.

    Without it they are the picture; and the image that is not flagged is the same to the bit.
    """
    pipe = mixture_pipeline(parts)
    pipe.enable_guard(pipe.guard.with_policy(on_failure="keep"))
    before = call(pipe, *KNOWN, OTHER)
    pipe = mixture_pipeline(parts, mitigation)
    with CountLanes(pipe.unet) as count:
        after = call(pipe, *KNOWN, OTHER)
    assert torch.equal(after.images[-1], before.images[-1])
    shown = PICTURE[None].expand_as(before.images)
    assert (resemblance(before.images, shown)[:-1] > 0.95).all()
    assert (resemblance(after.images, shown)[:-1].abs() < 0.3).all()
    for record in after.records[:-1]:
        assert (record.outcome, record.extra_lanes) == ("rescued", lanes)
        assert record.attempts[0].score < 0.2 < 0.7 < record.score
    assert after.records[-1].outcome == "passed"
    asked = count.rows - 2 * 20 * 3
    assert asked <= 2 * lanes  # the rest are backward passes, which evaluate nothing
