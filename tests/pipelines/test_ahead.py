"""Texts that are encoded ahead are those of the call that takes them, and of no other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pipelines.calls import PROMPTS, STEPS, latents_of
from tiny import build, watching

from sd_guard.fingerprint import take_fingerprint
from sd_guard.pipelines import ahead, stable_diffusion
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline


@contextmanager
def threads_of(encoder: torch.nn.Module) -> Iterator[list[bool]]:
    """Of each call of the text encoder, whether it was on this thread; none may build a graph."""
    here, seen = threading.get_ident(), []

    def look(*_: Any) -> None:
        assert not torch.is_grad_enabled()
        seen.append(threading.get_ident() == here)

    hook = encoder.register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize(("guidance_scale", "calls"), [(7.5, 2), (1.0, 1)])
def test_a_call_takes_what_was_encoded_for_it(guarded: Any, plain: Any, guidance_scale: float, calls: int) -> None:
    pipe, call = guarded(watching()), {"guidance_scale": guidance_scale}
    expected, state = latents_of(plain(), **call)
    pipe.encode_ahead(PROMPTS, guidance_scale=guidance_scale)
    with threads_of(pipe.text_encoder) as seen:
        output, own_state = latents_of(pipe, **call)
        assert True not in seen[:-1]  # the last may be the guard's own, for no prompt
        again, _ = latents_of(pipe, **call)
        assert seen.count(True) >= calls  # it was taken once
    assert torch.equal(output.images, expected.images)
    assert torch.equal(again.images, expected.images)
    assert torch.equal(state, own_state)


@pytest.mark.parametrize(
    "call",
    [
        {"prompt": PROMPTS[::-1]},
        {"negative_prompt": ["red"] * len(PROMPTS)},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2, "generator": None},
    ],
)
def test_another_call_encodes_its_own(guarded: Any, plain: Any, call: dict[str, Any]) -> None:
    pipe = guarded(watching())
    expected, _ = latents_of(plain(), **call)
    pipe.encode_ahead(PROMPTS)
    assert torch.equal(latents_of(pipe, **call)[0].images, expected.images)


def test_embeddings_that_are_given_are_used(guarded: Any, plain: Any) -> None:
    pipe = guarded(watching())
    given = dict(zip(("prompt_embeds", "negative_prompt_embeds"), torch.randn(2, 3, 16, 32), strict=True))
    expected, _ = latents_of(plain(), prompt=None, **given)
    pipe.encode_ahead(PROMPTS)
    assert torch.equal(latents_of(pipe, prompt=None, **given)[0].images, expected.images)


def test_what_cannot_be_encoded_is_said_by_the_call_that_needs_it(guarded: Any) -> None:
    pipe = guarded(watching())

    def fail(*_: Any) -> None:
        raise RuntimeError("no room")

    hook = pipe.text_encoder.register_forward_pre_hook(fail)
    pipe.encode_ahead(PROMPTS)
    with pytest.raises(RuntimeError, match="no room"):
        latents_of(pipe)
    hook.remove()
    assert len(latents_of(pipe)[0].records) == len(PROMPTS)


def test_the_latest_two_are_kept() -> None:
    texts, encoded = ahead.Ahead(), []
    for name in ("a", "b", "b", "c"):
        texts.begin((("prompt", name),), lambda name=name: encoded.append(name) or name)
    assert texts.take((("prompt", "a"),)) is None
    assert [texts.take((("prompt", name),)).result(10) for name in ("c", "b")] == ["c", "b"]
    assert texts.take((("prompt", "b"),)) is None
    assert sorted(encoded) == ["a", "b", "c"]


def test_one_string_is_no_list_and_an_empty_list_nothing_to_encode(guarded: Any) -> None:
    pipe = guarded(watching())
    with pytest.raises(TypeError, match=r"^prompts is one string; give encode_ahead the list"):
        pipe.encode_ahead("a dog")
    pipe.encode_ahead([])
    assert pipe._ahead is None


def test_parts_that_take_turns_encode_nothing_ahead(guarded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = guarded(watching())
    monkeypatch.setattr(pipe.unet, "_hf_hook", object(), raising=False)
    with threads_of(pipe.text_encoder) as seen:
        pipe.encode_ahead(PROMPTS)
    assert pipe._ahead is None
    assert not seen


@pytest.mark.parametrize(
    ("output_type", "place"), [("np", ["loop", "fingerprint", "images"]), ("latent", ["loop", "images", "fingerprint"])]
)
def test_the_fingerprint_is_taken_once_while_a_gpu_decodes(
    guarded: Any, monkeypatch: pytest.MonkeyPatch, output_type: str, place: list[str]
) -> None:
    """Of a call without a callback; with one, before it is first called (below)."""
    order, take, pipe = ["loop"], stable_diffusion.take_fingerprint, guarded(watching())
    postprocess = pipe.image_processor.postprocess

    def look(*args: Any, **options: Any) -> Any:
        order.append("fingerprint")
        return take(*args, **options)

    def images(*args: Any, **options: Any) -> Any:
        order.append("images")
        return postprocess(*args, **options)

    monkeypatch.setattr(stable_diffusion, "take_fingerprint", look)
    monkeypatch.setattr(pipe.image_processor, "postprocess", images)
    hook = pipe.unet.register_forward_pre_hook(lambda *_: order.__setitem__(slice(None), ["loop"]))
    output, _ = latents_of(pipe, output_type=output_type)
    hook.remove()
    assert order == place
    assert len({record.fingerprint for record in output.records}) == 1


@pytest.mark.parametrize("deprecated", [False, True])
@pytest.mark.parametrize("changed_at", [0, STEPS - 1])
def test_the_fingerprint_is_of_the_weights_before_a_callback_changes_them(
    own_parts: dict[str, Any], changed_at: int, deprecated: bool
) -> None:
    pipe = build(GuardedStableDiffusionPipeline, own_parts)
    before = take_fingerprint(pipe, steps=STEPS, guidance_scale=7.5).digest

    def change(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == changed_at:
            with torch.no_grad():
                pipe.unet.conv_in.weight.mul_(2.0)
        return tensors

    def change_too(step: int, timestep: Any, _latents: Any) -> None:
        change(pipe, step, timestep, {})

    old, new = {"callback": change_too, "callback_steps": 1}, {"callback_on_step_end": change}
    output, _ = latents_of(pipe, **(old if deprecated else new))
    assert {record.fingerprint for record in output.records} == {before}
    assert take_fingerprint(pipe, steps=STEPS, guidance_scale=7.5).digest != before
