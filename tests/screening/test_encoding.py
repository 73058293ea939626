"""Texts that are encoded ahead are those that would have been encoded at once."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sd_guard.screening.encoding import encoding

CPU = torch.device("cpu")


class Encoder:
    """Says the length of each prompt, when it may."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.unet, self.text_encoder = SimpleNamespace(), SimpleNamespace()

    def encode_prompt(self, prompts: list[str], *_: Any) -> tuple[Tensor]:
        assert self.gate.wait(10)
        assert not torch.is_grad_enabled()
        self.calls.append(prompts)
        self.threads.add(threading.get_ident())
        return (torch.tensor([float(len(prompt)) for prompt in prompts])[:, None, None],)


def test_each_prompt_is_encoded_once_in_calls_of_one_shape() -> None:
    pipe, prompts = Encoder(), ["a", "bb", "a", "ccc", "bb", "dddd"]
    with encoding(pipe, prompts, size=3, device=CPU) as texts:
        assert texts.first(3).flatten().tolist() == [1, 2, 1]
        assert texts.first(6).flatten().tolist() == [1, 2, 1, 3, 2, 4]
    assert pipe.calls == [["a", "bb", "ccc"], ["dddd", "", ""]]
    assert pipe.threads.isdisjoint({threading.get_ident()})


def test_the_first_are_there_before_the_last() -> None:
    pipe = Encoder()
    with encoding(pipe, ["a", "bb"], size=1, device=CPU) as texts:
        assert texts.first(1).flatten().tolist() == [1]
        pipe.gate.clear()
        threading.Timer(0.1, pipe.gate.set).start()
        assert texts.first(2).flatten().tolist() == [1, 2]


def test_parts_that_take_turns_do_not_overlap() -> None:
    pipe = Encoder()
    pipe.unet._hf_hook = object()
    with encoding(pipe, ["a", "bb", "ccc"], size=1, device=CPU):
        assert len(pipe.calls) == 3


def test_an_encoder_that_fails_says_so_where_it_is_waited_for() -> None:
    class Broken(Encoder):
        def encode_prompt(self, prompts: list[str], *_: Any) -> tuple[Tensor]:
            if prompts == ["bb"]:
                raise RuntimeError("no room")
            return super().encode_prompt(prompts)

    with encoding(Broken(), ["a", "bb"], size=1, device=CPU) as texts:
        assert texts.first(1).flatten().tolist() == [1]
        with pytest.raises(RuntimeError, match="no room"):
            texts.first(2)
