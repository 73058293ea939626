"""Stable Diffusion 1.5 and 2.1-base of random weights, from their public configurations: the same cost, no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sd_guard.bench.settings import Arch
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.reference import checkpoint_path
from sd_guard.screening.settings import Dtype

TOKENS: Final = 77  # of CLIP's context; the bundled tokenizer, which is used, pads to fewer by itself


@dataclass(frozen=True, slots=True)
class Architecture:
    """Configurations of the networks, as in the `config.json` of each; what is left out has diffusers' default there.

    Attributes:
        unet: of `UNet2DConditionModel`.
        vae: of `AutoencoderKL`.
        text_encoder: of `CLIPTextModel`.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]


_UNET: Final = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
_VAE: Final = {
    "sample_size": 512,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
_TEXT: Final = {"vocab_size": 49408, "max_position_embeddings": TOKENS}
ARCHITECTURES: Final[dict[str, Architecture]] = {
    "sd15": Architecture(
        unet={**_UNET, "cross_attention_dim": 768, "attention_head_dim": 8},
        vae=_VAE,
        text_encoder={
            **_TEXT,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_act": "quick_gelu",
        },
    ),
    "sd21": Architecture(
        unet={
            **_UNET,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        vae=_VAE,
        text_encoder={
            **_TEXT,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
    ),
}


def build_pipeline(arch: Arch, device: torch.device, dtype: Dtype) -> GuardedStableDiffusionPipeline:
    """A quiet guarded pipeline; its weights take no gradient, and are the same whenever it is built on one device.

    Args:
        arch: `reference` loads the bundled checkpoint.
        device: weights are made where they are used.
        dtype: they are drawn in float32, and rounded to it.
    """
    if arch == "reference":
        pipe = GuardedStableDiffusionPipeline.from_pretrained(
            checkpoint_path(), torch_dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
        )
        pipe.to(device)
    else:
        parts: dict[str, Any] = {
            **build_networks(ARCHITECTURES[arch], device, getattr(torch, dtype)),
            "tokenizer": CLIPTokenizer.from_pretrained(checkpoint_path() / "tokenizer", model_max_length=TOKENS),
            # DDIM on Stable Diffusion's own betas, which the bundled checkpoint was trained on.
            "scheduler": DDIMScheduler.from_pretrained(checkpoint_path(), subfolder="scheduler"),
            "safety_checker": None,
            "feature_extractor": None,
        }
        pipe = GuardedStableDiffusionPipeline(**parts, requires_safety_checker=False)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_networks(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """UNet, autoencoder and text encoder of random weights; on the device `meta` they cost neither time nor memory."""
    tokens: dict[str, Any] = {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }  # only a pooled output would read them
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        networks: dict[str, Any] = {
            "unet": UNet2DConditionModel(**architecture.unet),
            "vae": AutoencoderKL(**architecture.vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**architecture.text_encoder, **tokens)),
        }
    return {name: network.to(dtype) for name, network in networks.items()}
