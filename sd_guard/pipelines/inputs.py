"""The arguments of a guarded call that the guard needs, and what it reads off the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sd_guard.fingerprint import Fingerprint
from sd_guard.noise import PredictionType
from sd_guard.snapshots import Generators

# Locals of the host's denoising loop that a guarded call may change at the end of a step, and those that it reads there
# where it looks at what the step did, with guidance and without.
RETURNED_TENSORS = ("latents", "prompt_embeds")
LOOP_TENSORS = (
    *RETURNED_TENSORS,
    "latent_model_input",
    "noise_pred",
    "timestep_cond",
    "added_cond_kwargs",
    "cross_attention_kwargs",
)
GUIDED_TENSORS = ("noise_pred_uncond", "noise_pred_text")


@dataclass(frozen=True, slots=True)
class CallInputs:
    """One guarded call.

    Attributes:
        prompts: one an image; None where the caller gave embeddings.
        generator: as given.
        seed: for what has no generator of its own.
        guided: whether the host runs classifier-free guidance.
        control_is_empty: whether the host's other lane is that of the empty prompt.
        guidance_scale: as given.
        guidance_rescale: as given.
        eta: as given.
        encode: prompts to (N, tokens, width) embeddings, as the host would.
        fingerprint: of this configuration, taken when it is first asked for.
    """

    prompts: list[str] | None
    generator: Generators
    seed: int
    guided: bool
    control_is_empty: bool
    guidance_scale: float
    guidance_rescale: float
    eta: float
    encode: Callable[[Sequence[str]], Tensor]
    fingerprint: Callable[[], Fingerprint]

    def seed_of(self, row: int) -> int | None:
        """Initial seed of an image's generator; None without one."""
        if self.generator is None:
            return None
        return (self.generator[row] if isinstance(self.generator, list) else self.generator).initial_seed()

    def probe_seed_of(self, row: int) -> int:
        """In [0, 2^64): an image with its own generator keeps its probes whatever else is in the batch."""
        own = self.generator[row].initial_seed() if isinstance(self.generator, list) else row
        return (own + 0x9E3779B97F4A7C15 * (self.seed + 1)) % 2**64


def prediction_type(pipe: Any) -> PredictionType:
    """The parametrisation of the pipeline's UNet, as its scheduler declares it."""
    return pipe.scheduler.config.get("prediction_type", "epsilon")


def prompts_of(arguments: dict[str, Any]) -> list[str] | None:
    """The prompt of each image of the batch."""
    prompt = arguments["prompt"]
    if prompt is None:
        return None
    prompts: list[str] = [prompt] if isinstance(prompt, str) else list(prompt)
    return [text for text in prompts for _ in range(arguments["num_images_per_prompt"])]


def size_of(arguments: dict[str, Any], factor: int) -> dict[str, int | None]:
    """Height and width of the images in pixels, None where they are the model's own; latents that are given decide.

    As in the host, one of them without the other counts for nothing.
    """
    latents: Tensor | None = arguments["latents"]
    sides = [arguments["height"], arguments["width"]] if latents is None else [factor * n for n in latents.shape[-2:]]
    return dict(zip(("height", "width"), sides if all(sides) else (None, None), strict=True))


def clip_skip_of(arguments: dict[str, Any]) -> int | None:
    """Layers of the text encoder that the call skips: none where it gives embeddings."""
    return arguments["clip_skip"] if arguments["prompt_embeds"] is None else None


def as_long(embeds: Tensor, tokens: int) -> Tensor:
    """(N, tokens, width) embeddings of as many tokens as the prompts': cut, which a causal encoder does not notice.

    Prompts longer than the encoder takes are several of its texts in a row; so is what is compared with them.

    Args:
        embeds: (N, tokens', width), as the text encoder makes them.
        tokens: of the prompts that the caller gave embeddings of.
    """
    return embeds.repeat(1, -(-tokens // embeds.shape[1]), 1)[:, :tokens]


def lora_scale_of(arguments: dict[str, Any]) -> float | None:
    """What the call multiplies the scales of its adapters by."""
    return (arguments["cross_attention_kwargs"] or {}).get("scale")


def is_empty(negative_prompt: str | list[str] | None) -> bool:
    """Whether the other lane of guidance has no text."""
    texts = negative_prompt if isinstance(negative_prompt, (list, tuple)) else [negative_prompt]
    return not any(texts)
