"""What a mitigation is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sd_guard.noise import NoiseLevel, Prediction

# What the backward pass of one lane costs, in lanes, with checkpointing: by `benchmarks/backward.py` 1.95 on a random
# UNet of Stable Diffusion 1's size, and 2.5 on the reference checkpoints', where Python's share is large.
BACKWARD_LANES = 2.0
_CHANGES_WEIGHTS = ("group_offloading", "layerwise_casting")  # hooks of diffusers that do so after a layer's forward


@dataclass(frozen=True, slots=True)
class Subject:
    """One flagged image, as a mitigation sees it.

    Attributes:
        prompt: its text; None where the caller gave embeddings only.
        prompt_embeds: (tokens, width) conditional embedding that flagged.
        empty_embeds: (tokens, width) embedding of no prompt.
        seed: of any randomness of the mitigation.
        encode: prompts to (N, tokens, width).
        predict: (N, tokens, width) to (N, C, H, W) predicted clean latents at the first step of the image's own
            trajectory that shows anything (`first_clear_step`); spends N lanes.
        lanes_left: extra lanes this image may still spend before an attempt's own cost.
        latents: (C, H, W) first latent of the image's own trajectory, as the sampler has it before
            `scale_model_input`.
        control: (C, H, W) clean latent that the deciding step predicts without the prompt.
        denoise: (N, tokens, width) text and (N, C, H, W) latents, as the sampler has them at the first step, to the
            prediction there; differentiable in both where gradients are enabled. Spends N lanes; a backward pass
            through it has to be billed.
        bill: spends so many lanes, `BACKWARD_LANES` for each lane of a backward pass.
        guidance_scale: of the call; None without guidance.
        steps: of the schedule.
        resumable: steps that a trajectory can be resumed from, ascending; the first is 0.
        level: noise level at one of these steps.
        renoise: clean latents and noise, (C, H, W) each, and one of these steps, to latents as the sampler has them
            there.
        tokenizer: of the prompts; None without one.
        token_embeddings: (V, width') input embeddings of the text encoder; None without one.
        encode_tokens: (1, tokens, width') input embeddings in the place of the prompt's own to (1, tokens, width) its
            embedding, differentiable where gradients are enabled; None without a prompt or a text encoder.
        known: text to (C, H, W): what `predict` has answered for it. Shared by the mitigations of a plan, so that none
            pays for an answer that another has.
    """

    prompt: str | None
    prompt_embeds: Tensor
    empty_embeds: Tensor
    seed: int
    encode: Callable[[Sequence[str]], Tensor]
    predict: Callable[[Tensor], Tensor]
    lanes_left: Callable[[], int]
    latents: Tensor
    control: Tensor
    denoise: Callable[[Tensor, Tensor], Prediction]
    bill: Callable[[float], None]
    guidance_scale: float | None
    steps: int
    resumable: Sequence[int]
    level: Callable[[int], NoiseLevel]
    renoise: Callable[[Tensor, Tensor, int], Tensor]
    tokenizer: Any
    token_embeddings: Tensor | None
    encode_tokens: Callable[[Tensor], Tensor] | None
    known: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


class Guidance(Protocol):
    """An image's own guidance scale."""

    def scale(self, share: float, cfg_norms: Sequence[float]) -> float:
        """Of the next step.

        Args:
            share: of the steps that have been walked, in [0, 1).
            cfg_norms: norm of the difference between the conditional and the other noise prediction, at each step
                since the trajectory was resumed; the last is the next step's.
        """
        ...


@dataclass(frozen=True, slots=True)
class Change:
    """What one attempt changes.

    Attributes:
        mitigation: name of the family.
        strength: in its own unit.
        prompt_embeds: (tokens, width) the new conditional embedding.
        prompt: the rewritten text; None where the words were kept.
        guidance_from: share of the steps, in [0, 1], before which the image is sampled without its prompt.
        guidance: its own guidance scale at each step; None follows the call's.
        latents: (C, H, W) to start from, as the sampler has them at step `resume_from`; None starts from its own.
        other_noise: whether these come from noise that has nothing in common with the image's own.
        resume_from: step; the trajectory before it is the host's own, and the nearest snapshot that is not later is
            what is resumed. Not before the first step that shows anything (`first_clear_step`), unless it brings
            latents or an attempt from there has left too much of the flagged picture.
        attention_mask: (tokens,) bool, False where the conditional lane shall not attend to a token; None masks none.
        anchor_embeds: (tokens, width) text that guidance leads away from; None leaves the call's own.
    """

    mitigation: str
    strength: float
    prompt_embeds: Tensor
    prompt: str | None = None
    guidance_from: float = 0.0
    guidance: Guidance | None = None
    latents: Tensor | None = None
    other_noise: bool = False
    resume_from: int = 0
    attention_mask: Tensor | None = None
    anchor_embeds: Tensor | None = None

    @property
    def own_loop(self) -> bool:
        """Whether the host's loop cannot go on with it.

        Its guidance scale is one number for the batch, a mask would change the kernels of the neighbours, and its other
        lane is what prompts are compared with.
        """
        return any(own is not None for own in (self.guidance, self.attention_mask, self.anchor_embeds))


class Mitigation(Protocol):
    """Proposes changes for one image, the smallest first. Lazy: a later change may spend lanes to be found.

    One that not every pipeline can run also has a method `check(pipe)`, which raises ValueError with one line for the
    user, when the guard is enabled and before each call; one that resumes at shares of the steps names them in
    `resumes_at`, and is refused likewise where no snapshot is kept so late. One that takes gradients enables them
    around its own computations and never around a `yield`.
    """

    def propose(self, subject: Subject) -> Iterator[Change]:
        """Yields changes; ends where the family has nothing more to try or cannot afford it."""
        ...


def sparing(subject: Subject, lanes: int) -> Subject:
    """The subject for a gradient through so many calls of one lane: a backward pass holds the activations of one.

    More than one are not held until then, but done again for it, and billed again. One lane with its gradient takes
    less memory than one more image would (`benchmarks/memory.py`).

    Args:
        subject: that is asked.
        lanes: calls between the tensor that the gradient is taken of and the statistic; of one, the subject itself.
    """
    if lanes == 1:
        return subject

    def denoise(text: Tensor, latents: Tensor) -> Prediction:
        # Nothing in a model that samples draws numbers of its own, so there is no state of theirs to keep.
        return checkpoint(subject.denoise, text, latents, use_reentrant=False, preserve_rng_state=False)

    return replace(subject, denoise=denoise)


def gradient_cost(lanes: int) -> float:
    """Lanes of evaluating so many with gradients, and of the backward pass: more than one are evaluated again."""
    return lanes * (1 + BACKWARD_LANES + (lanes > 1))


def check_gradients(pipe: Any, who: str) -> None:
    """Refuses a pipeline through whose UNet no gradient can be taken.

    Args:
        pipe: a diffusers pipeline.
        who: name of the mitigation that takes it.

    Raises:
        ValueError: the weights are moved away before a backward pass needs them, or gradients are ruled out.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(f"{who} takes gradients, which torch.inference_mode() rules out: call under torch.no_grad()")
    for module in pipe.unet.modules():
        hook = getattr(module, "_hf_hook", None)  # accelerate's, alone or several in one
        moved = any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ())))
        registry = getattr(module, "_diffusers_hook", None)
        changed = registry is not None and any(registry.get_hook(name) for name in _CHANGES_WEIGHTS)
        if moved or changed:
            raise ValueError(
                f"{who} takes gradients, and the UNet's weights are offloaded or cast before a backward pass: "
                "use enable_model_cpu_offload(), or leave it out of the plan"
            )
