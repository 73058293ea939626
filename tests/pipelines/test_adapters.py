"""LoRA adapters, which change the model without changing its weights: real ones of peft, as diffusers loads them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pipelines.calls import STEPS, latents_of
from tiny import EVERYBODY, Identity, build, watching

from sd_guard.fingerprint import take_fingerprint
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline

peft = pytest.importorskip("peft")
LAYERS = {"unet": ["to_k", "to_q", "to_v", "to_out.0"], "text_encoder": ["q_proj", "v_proj"]}


def add(pipe: Any, name: str = "style", component: str = "unet") -> None:
    torch.manual_seed(len(name))
    config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=LAYERS[component])
    getattr(pipe, component).add_adapter(config, adapter_name=name)


def digest(pipe: Any, **call: Any) -> str:
    return take_fingerprint(pipe, steps=STEPS, guidance_scale=7.5, **call).digest


@pytest.fixture
def pipe(own_parts: dict[str, Any]) -> Any:
    pipe = build(GuardedStableDiffusionPipeline, own_parts)
    pipe.enable_guard(watching())
    return pipe


@pytest.mark.parametrize("component", LAYERS)
def test_each_state_of_the_adapters_is_a_model_of_its_own(pipe: Any, component: str) -> None:
    """And the same one again, once it is put back."""
    digests = {"without": digest(pipe)}
    add(pipe, component=component)
    module = getattr(pipe, component)
    digests |= {"on": digest(pipe), "on, by half": digest(pipe, lora_scale=0.5)}
    assert digest(pipe, lora_scale=1.0) == digests["on"]
    module.disable_adapters()
    digests["off"] = digest(pipe)
    assert digest(pipe, lora_scale=0.5) == digests["off"]
    module.enable_adapters()
    assert digest(pipe) == digests["on"]
    add(pipe, "colour", component)
    module.set_adapter("colour")
    digests["another"] = digest(pipe)
    assert len({*digests.values()}) == len(digests)


def test_so_is_each_scale(pipe: Any) -> None:
    add(pipe)
    own = digest(pipe)
    pipe.set_adapters("style", 0.5)
    half = digest(pipe)
    pipe.set_adapters("style", {"unet": {"mid": 0.5}})
    part = digest(pipe)
    assert len({own, half, part}) == 3
    pipe.set_adapters("style", 1.0)
    assert digest(pipe) == own


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_it_is_the_same_model(pipe: Any, whole: bool) -> None:
    add(pipe)
    own = digest(pipe)
    if whole:
        pipe.unet = torch.compile(pipe.unet)
    else:
        pipe.unet.mid_block = torch.compile(pipe.unet.mid_block)
    assert digest(pipe) == own


@pytest.mark.parametrize(
    ("fuse", "unfuse"),
    [
        (lambda pipe: pipe.fuse_lora(["unet"]), lambda pipe: pipe.unfuse_lora(["unet"])),
        (lambda pipe: pipe.unet.fuse_lora(), lambda pipe: pipe.unet.unfuse_lora()),
    ],
    ids=["pipeline", "unet"],
)
def test_fused_by_whomever(pipe: Any, fuse: Callable[[Any], None], unfuse: Callable[[Any], None]) -> None:
    """peft writes it where torch does not notice; and taken out again it leaves rounding errors."""
    add(pipe)
    own = digest(pipe)
    fuse(pipe)
    fused = digest(pipe)
    unfuse(pipe)
    assert own != fused != digest(pipe)


def test_fused_and_unloaded(pipe: Any) -> None:
    before = digest(pipe)
    add(pipe)
    pipe.fuse_lora(["unet"])
    pipe.unload_lora_weights()
    assert digest(pipe) != before


@pytest.mark.parametrize("scale", [None, 0.5])
def test_images_are_the_host_s_and_resumed_ones_arrive_there(pipe: Any, own_parts: dict[str, Any], scale: Any) -> None:
    call = {} if scale is None else {"cross_attention_kwargs": {"scale": scale}}
    without = latents_of(pipe, **call)[0].images
    add(pipe)
    plain = build(StableDiffusionPipeline, own_parts)
    expected, state = latents_of(plain, **call)
    assert not torch.allclose(without, expected.images)
    output, own_state = latents_of(pipe, **call)
    assert torch.equal(output.images, expected.images)
    assert torch.equal(own_state, state)
    assert output.records[0].fingerprint == digest(pipe, lora_scale=scale)
    pipe.enable_guard(watching(-math.inf, (Identity(),), doubt=EVERYBODY))
    for record in latents_of(pipe, **call)[0].records:
        assert [attempt.score for attempt in record.attempts] == [record.score]
