"""A Stable Diffusion pipeline of random weights, built in memory: a UNet call takes milliseconds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import is_torchsde_available
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sd_guard.guard import Guard
from sd_guard.mitigation import Change, Subject
from sd_guard.observation import Observation
from sd_guard.policy import Policy

WIDTH, TOKENS = 32, 16
TRAINING = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}

# Every scheduler that the guard has to leave alone, and to resume: class, options.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "steps_offset": 1}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    "pndm_prk": ("PNDMScheduler", {"skip_prk_steps": False, "steps_offset": 1}),
    "lms": ("LMSDiscreteScheduler", {"steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {"steps_offset": 1}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {"steps_offset": 1}),
    "heun": ("HeunDiscreteScheduler", {"steps_offset": 1}),
    "kdpm2": ("KDPM2DiscreteScheduler", {"steps_offset": 1}),
    "kdpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {"steps_offset": 1}),
    "dpm_multistep": ("DPMSolverMultistepScheduler", {"steps_offset": 1}),
    "dpm_multistep_karras": ("DPMSolverMultistepScheduler", {"steps_offset": 1, "use_karras_sigmas": True}),
    "dpm_multistep_sde": ("DPMSolverMultistepScheduler", {"steps_offset": 1, "algorithm_type": "sde-dpmsolver++"}),
    "dpm_singlestep": ("DPMSolverSinglestepScheduler", {}),
    "sa_solver": ("SASolverScheduler", {"steps_offset": 1}),
    "unipc": ("UniPCMultistepScheduler", {"steps_offset": 1}),
    "deis": ("DEISMultistepScheduler", {"steps_offset": 1}),
    "lcm": ("LCMScheduler", {"steps_offset": 1}),
    "tcd": ("TCDScheduler", {"steps_offset": 1}),
}
if is_torchsde_available():
    SCHEDULERS["dpm_sde"] = ("DPMSolverSDEScheduler", {"steps_offset": 1})


def make_scheduler(name: str, **options: Any) -> Any:
    """A scheduler of SCHEDULERS on Stable Diffusion's own betas."""
    kind, own = SCHEDULERS[name]
    return getattr(diffusers, kind)(**TRAINING, **own, **options)


def byte_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of the 256 bytes, with and without the end of a word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)


def components(seed: int = 0, prediction_type: str = "epsilon", **unet_options: Any) -> dict[str, Any]:
    """What a StableDiffusionPipeline is made of, without a safety checker."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=4,
            norm_num_groups=4,
            cross_attention_dim=WIDTH,
            **unet_options,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
        )
        tokenizer = byte_tokenizer()
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        # A random text path hardly reaches the output: louder, prompts differ enough to be told apart.
        for name, weight in unet.named_parameters():
            if name.endswith("attn2.to_v.weight"):
                weight.data.mul_(20.0)
    return {
        "vae": vae.eval(),
        "text_encoder": text_encoder.eval(),
        "tokenizer": tokenizer,
        "unet": unet.eval(),
        "scheduler": make_scheduler("ddim", prediction_type=prediction_type),
        "safety_checker": None,
        "feature_extractor": None,
    }


def build(cls: type[StableDiffusionPipeline], parts: dict[str, Any], scheduler: str | Any | None = None) -> Any:
    """A quiet pipeline on shared weights, with a scheduler of its own."""
    if scheduler is None:
        scheduler = DDIMScheduler.from_config(parts["scheduler"].config)
    elif isinstance(scheduler, str):
        scheduler = make_scheduler(scheduler)
    pipe = cls(**{**parts, "scheduler": scheduler}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class CountLanes:
    """Counts the rows that a UNet is given, and their shapes, while entered."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.unet, self.rows, self.shapes = unet, 0, []

    def __enter__(self) -> CountLanes:
        self._hook = self.unet.register_forward_pre_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _count(self, _module: Any, args: tuple[Any, ...]) -> None:
        self.rows += args[0].shape[0]
        self.shapes.append(tuple(args[0].shape))


@dataclass(frozen=True)
class Identity:
    """Changes nothing: what is resumed has to arrive where it was."""

    def propose(self, subject: Subject) -> Iterator[Change]:
        yield Change("identity", 0.0, subject.prompt_embeds)


@dataclass(frozen=True)
class Forget:
    """Samples without the prompt, so that conditional and control lanes agree and nothing is left to flag."""

    def propose(self, subject: Subject) -> Iterator[Change]:
        yield Change("forget", 1.0, subject.empty_embeds, "")


def subject_of(prompt: str | None = "a dog", tokens: int = 3, width: int = 4, **fields: Any) -> Subject:
    """A subject whose model may not be asked, but for what is given."""

    def unpaid(*_: object) -> Any:
        raise AssertionError("it costs no lanes to propose")

    embeds = torch.randn(tokens, width, generator=torch.Generator().manual_seed(9))
    latents, control = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    asked = dict.fromkeys(("encode", "predict", "denoise", "bill", "level", "renoise"), unpaid)
    given: dict[str, Any] = {
        "prompt": prompt,
        "prompt_embeds": embeds,
        "empty_embeds": torch.zeros(tokens, width),
        "seed": 0,
        "lanes_left": lambda: 10_000,
        "latents": latents,
        "control": control,
        "guidance_scale": 7.5,
        "steps": 50,
        "resumable": (0,),
        "tokenizer": None,
        "token_embeddings": None,
        "encode_tokens": None,
    }
    return Subject(**(asked | given | fields))


# Scores between which an image is in doubt, and so is probed: no image, or every one with a score.
NOBODY, EVERYBODY = (math.inf, -math.inf), (-math.inf, math.inf)


@dataclass(frozen=True)
class DetailRatio:
    """The free half of the default detector: what is tested here must not depend on how the halves are weighted.

    Images in doubt are probed, which costs and is recorded, and leaves their scores as they are.
    """

    threshold: float
    doubt: tuple[float, float] = NOBODY

    def score(self, observations: Sequence[Observation], later: Sequence[Observation] = ()) -> torch.Tensor:
        return torch.stack([seen.values["added_detail"] for seen in observations]).mean(0)

    def in_doubt(self, observations: Sequence[Observation]) -> torch.Tensor:
        score = self.score(observations)
        return (score > self.doubt[0]) & (score < self.doubt[1])


def watching(
    threshold: float = math.inf, plan: Any = (Forget(),), *, doubt: tuple[float, float] = NOBODY, **options: Any
) -> Guard:
    """A guard that looks at two steps, decides once and in the middle of sampling, and flags above `threshold`."""
    options = {
        "observe_at": (0.2, 0.5),
        "look_again_at": (),
        "probes": 1,
        "other_seeds": 0,
        "detector": DetailRatio(threshold, doubt),
    } | options
    policy = Policy(margin=0.0, max_resemblance=1.0)  # on random weights all predictions look alike
    return Guard(plan=plan, policy=policy, **options)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that was refused has said: one line, and nothing besides."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err
