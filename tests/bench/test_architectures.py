"""Full-size architectures have the published sizes, and make a pipeline that works."""

from __future__ import annotations

import pytest
import torch

from sd_guard.bench import architectures
from sd_guard.bench.architectures import ARCHITECTURES, TOKENS, Architecture, build_networks, build_pipeline
from sd_guard.bench.base import prompts

# Of the published weights: UNet, autoencoder, text encoder.
PARAMETERS = {"sd15": (859_520_964, 83_653_863, 123_060_480), "sd21": (865_910_724, 83_653_863, 340_387_840)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_network_has_the_published_number_of_parameters(name: str) -> None:
    networks = build_networks(ARCHITECTURES[name], torch.device("meta"), torch.float16)
    counted = tuple(sum(p.numel() for p in networks[part].parameters()) for part in ("unet", "vae", "text_encoder"))
    assert counted == PARAMETERS[name]
    assert {p.dtype for network in networks.values() for p in network.parameters()} == {torch.float16}


def test_random_networks_make_a_pipeline_that_samples_at_clips_context(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ARCHITECTURES["sd21"]
    unet = {"block_out_channels": (8,) * 4, "attention_head_dim": 2, "norm_num_groups": 4, "layers_per_block": 1}
    vae = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "layers_per_block": 1, "sample_size": 64}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = Architecture(
        unet=whole.unet | unet | {"cross_attention_dim": 8, "sample_size": 8},
        vae=whole.vae | vae,
        text_encoder=whole.text_encoder | text,
    )
    monkeypatch.setitem(architectures.ARCHITECTURES, "sd21", small)
    pipes = [build_pipeline("sd21", torch.device("cpu"), "float32") for _ in range(2)]
    for ours, again in zip(pipes[0].unet.parameters(), pipes[1].unet.parameters(), strict=True):
        assert torch.equal(ours, again)
        assert not ours.requires_grad
    assert pipes[0].encode_prompt(prompts(1), "cpu", 1, False)[0].shape == (1, TOKENS, 8)
    output = pipes[0](prompts(2), num_inference_steps=2)
    assert [image.size for image in output.images] == [(64, 64)] * 2
    assert [record.verdict for record in output.records] == ["pass", "pass"]


def test_prompts_are_as_many_as_asked_for_and_all_different() -> None:
    assert len(set(prompts(300))) == 300
