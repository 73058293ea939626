"""Texts that are encoded ahead are those that would have been encoded at once."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sd_guard.screening.encoding import Encoder

CPU = torch.device("cpu")


class Model:
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


@pytest.mark.parametrize("expected", [False, True])
def test_each_prompt_is_encoded_once_in_calls_of_one_shape(expected: bool) -> None:
    pipe, prompts = Model(), ["a", "bb", "a", "ccc", "bb", "dddd"]
    encoder = Encoder(pipe, 3, CPU)
    if expected:
        encoder.expect(prompts)
        encoder.encode(["before"])
    texts = encoder.encode(prompts)
    assert texts.first(3).flatten().tolist() == [1, 2, 1]
    assert texts.first(6).flatten().tolist() == [1, 2, 1, 3, 2, 4]
    assert pipe.calls[expected:] == [["a", "bb", "ccc"], ["dddd", "", ""]]
    assert pipe.threads.isdisjoint({threading.get_ident()})


def test_the_first_are_there_before_the_last() -> None:
    pipe = Model()
    texts = Encoder(pipe, 1, CPU).encode(["a", "bb"])
    assert texts.first(1).flatten().tolist() == [1]
    pipe.gate.clear()
    threading.Timer(0.1, pipe.gate.set).start()
    assert texts.first(2).flatten().tolist() == [1, 2]


def test_what_is_expected_is_encoded_after_what_comes_first_and_before_it_is_asked_for() -> None:
    pipe = Model()
    encoder = Encoder(pipe, 2, CPU)
    encoder.expect(["b", "bb"])
    encoder.encode(["a", "a "])
    assert encoder.encode(["b", "bb"]).first(2).flatten().tolist() == [1, 2]
    assert pipe.calls == [["a", "a "], ["b", "bb"]]
    encoder.encode(["b", "bb"]).first(2)  # a batch is given out once
    assert pipe.calls[2:] == [["b", "bb"]]


def test_a_batch_that_was_expected_in_vain_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(Model(), 2, CPU)
    for batch, following in ((["a"], ["b"]), (["c"], ["d"]), (["e"], ["f"])):
        encoder.expect(following)
        encoder.encode(batch).first(1)
    assert list(encoder._coming) == [("f",)]
    encoder.encode(["halves of", "e"]).first(2)  # as a batch that failed is tried again
    assert list(encoder._coming) == [("f",)]


def test_what_was_not_begun_is_left_undone() -> None:
    pipe = Model()
    encoder = Encoder(pipe, 1, CPU)
    pipe.gate.clear()
    encoder.encode(["a", "bb", "ccc"]).cancel()
    pipe.gate.set()
    encoder.encode(["dddd"]).first(1)
    assert pipe.calls in ([["dddd"]], [["a"], ["dddd"]])  # whether the thread had taken the first one up


def test_parts_that_take_turns_do_not_overlap() -> None:
    pipe = Model()
    pipe.unet._hf_hook = object()
    encoder = Encoder(pipe, 1, CPU)
    encoder.expect(["a", "bb", "ccc"])
    assert pipe.calls == []
    encoder.encode(["a", "bb", "ccc"])
    assert len(pipe.calls) == 3


def test_an_encoder_that_fails_says_so_where_it_is_waited_for() -> None:
    class Broken(Model):
        def encode_prompt(self, prompts: list[str], *_: Any) -> tuple[Tensor]:
            if prompts == ["bb"]:
                raise RuntimeError("no room")
            return super().encode_prompt(prompts)

    encoder = Encoder(Broken(), 1, CPU)
    encoder.expect(["a", "bb"])
    texts = encoder.encode(["a", "bb"])
    assert texts.first(1).flatten().tolist() == [1]
    with pytest.raises(RuntimeError, match="no room"):
        texts.first(2)
    assert encoder.encode(["a"]).first(1).flatten().tolist() == [1]
