"""Counts against closed forms; failures and turns."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import build, components

from sd_guard.bench.base import Case
from sd_guard.bench.measuring import CountFlops, counted, matmul_ceiling, measure_by_turns, spread, time_run
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline

CPU = torch.device("cpu")


def test_operations_of_products_forward_backward_and_of_tangents() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    product = 2 * 3 * 5 * 7
    with CountFlops() as plain:
        a @ b
    assert plain.total == product
    with CountFlops() as tangents:
        torch.func.jvp(lambda x: x @ b, (a,), (torch.ones_like(a),))
    assert 2 * product <= tangents.total <= 3 * product  # torch also multiplies by the zero tangent of b
    with CountFlops() as pulled:
        torch.func.vjp(lambda x: x @ b, a)[1](torch.ones(3, 7))
    assert pulled.total == 2 * product


def test_lanes_are_those_of_the_network_before_it_was_compiled() -> None:
    pipe = build(GuardedStableDiffusionPipeline, components())
    own, wrapped = pipe.unet, torch.compile(pipe.unet, backend="eager")
    pipe.unet = wrapped
    with counted(pipe) as count:
        assert pipe.unet is own
        pipe(["a", "b", "c"], num_inference_steps=2, output_type="latent")
    assert count.lanes == 2 * 2 * 3
    assert count.flops > 0
    assert pipe.unet is wrapped
    own(torch.zeros(1, 4, 8, 8), 1, encoder_hidden_states=torch.zeros(1, 16, 32))
    assert count.lanes == 12  # the hook is gone


def test_cases_run_by_turns_and_a_failure_ends_its_own_case_only(tmp_path: Path) -> None:
    pipe, order = build(GuardedStableDiffusionPipeline, components()), []

    def fail() -> None:
        order.append("b")
        if len(order) > 3:
            raise torch.OutOfMemoryError("no memory\nfor this")

    cases = [
        Case(name="a", pipe=pipe, run=lambda: order.append("a"), examine=lambda: {"error": 0.5}),
        Case(name="b", pipe=pipe, run=fail),
    ]
    a, b = measure_by_turns(cases, CPU, warmup=0, repeats=3, trace_path=lambda name: tmp_path / f"{name}.json")
    assert order == ["a", "b", "a", "b", "a", "a", "a"]
    assert (len(a.runs), a.failed, a.figures) == (3, None, {"error": 0.5})
    assert (b.runs, b.failed) == ([], "OutOfMemoryError: no memory")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert "traceEvents" in json.loads((tmp_path / "a.json").read_text())


def test_every_other_turn_goes_backwards_and_none_begins_when_the_time_is_over() -> None:
    pipe, order = build(GuardedStableDiffusionPipeline, components()), []
    cases = [Case(name=name, pipe=pipe, run=partial(order.append, name)) for name in "abc"]
    found = measure_by_turns(cases, CPU, warmup=0, repeats=3, flops=False)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert {(len(each.runs), each.count.lanes, each.count.flops) for each in found} == {(3, 0, None)}
    slow = [Case(name=name, pipe=pipe, run=lambda: time.sleep(0.03)) for name in "ab"]
    assert {len(each.runs) for each in measure_by_turns(slow, CPU, warmup=0, repeats=50, seconds=0.1)} == {2}
    assert {len(each.runs) for each in measure_by_turns(slow, CPU, warmup=0, repeats=50, seconds=1e-9)} == {1}


def test_the_clock_and_its_spread() -> None:
    run = time_run(lambda: time.sleep(0.02), CPU)
    assert 0.02 <= run.seconds < 2
    assert (run.resident, run.peak) == (None, None)
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == (2.0, 3.0, 4.0)


def test_the_ceiling_is_that_of_a_machine() -> None:
    assert 1e8 < matmul_ceiling(CPU, torch.float32) < 1e14


def test_no_run_is_timed_of_a_case_that_cannot_be_examined() -> None:
    def examine() -> dict[str, float]:
        raise NotImplementedError("no derivative")

    pipe = build(GuardedStableDiffusionPipeline, components())
    case = Case(name="a", pipe=pipe, run=lambda: pytest.fail("was run"), examine=examine)
    (found,) = measure_by_turns([case], CPU, warmup=1, repeats=1)
    assert (found.failed, found.count, found.runs) == ("NotImplementedError: no derivative", None, [])
