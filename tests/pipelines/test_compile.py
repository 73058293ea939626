"""A compiled UNet: one graph, the sampler's own, serves probes and other seeds, and stays what the sampler runs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pipelines.calls import PROMPTS, latents_of, scores_of
from tiny import EVERYBODY, NOBODY, CountLanes, Forget, build, make_scheduler, seeded, watching

from sd_guard.compiled import OneShape, no_new_graphs, of_one_shape
from sd_guard.guard import Guard
from sd_guard.lanes import Conditioning, evaluate_lanes
from sd_guard.mitigation import EmbeddingNoise, EmbeddingOptimisation, WordAblation
from sd_guard.pipelines.session import Session
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.policy import Policy
from sd_guard.screening.quick import QuickScreener
from sd_guard.screening.settings import ModelSettings

HOW = ["wrapped", "in place", "blocks"]


class Graphs:
    """A compiler whose graphs are the code itself, numbered; notes each that is run."""

    def __init__(self) -> None:
        self.made, self.run = 0, list[int]()

    def __call__(self, module: Any, _inputs: Any) -> Callable[..., Any]:
        number = self.made
        self.made += 1

        def run(*args: Any) -> Any:
            self.run.append(number)
            return module.forward(*args)

        return run


@pytest.fixture
def graphs() -> Graphs:
    torch._dynamo.reset()
    return Graphs()


def test_without_the_guard_another_batch_takes_the_graph_of_the_first_one(graphs: Graphs) -> None:
    """What the guard must not do: if this fails, torch has changed, and `no_new_graphs` may have become needless."""
    layer = torch.compile(torch.nn.Linear(4, 4), backend=graphs)
    with torch.no_grad():
        for rows in (6, 2, 6):
            layer(torch.zeros(rows, 4))
    assert graphs.run == [0, 1, 1]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("count", [1, 3])
def test_nothing_is_compiled_for_the_guard_whoever_is_in_doubt_or_flagged(
    guarded: Any, own_parts: dict[str, Any], graphs: Graphs, count: int, how: str
) -> None:
    pipe = build(GuardedStableDiffusionPipeline, own_parts)
    pipe.enable_guard(watching(doubt=EVERYBODY))
    call = {"prompt": PROMPTS[:count], "generator": None}

    def sample() -> list[float]:
        return scores_of(latents_of(pipe, **call | {"generator": seeded(1, 2, 3)[:count]})[0])

    scores = sorted(sample())
    compiled(pipe, graphs, how)
    pipe.disable_guard()
    latents_of(pipe, **call)
    made, pattern = graphs.made, list(graphs.run)
    assert made > 0
    plan = (EmbeddingNoise(strengths=(1.0,)), WordAblation(), EmbeddingOptimisation(), Forget())
    for doubt in (NOBODY, (-math.inf, scores[0] + 1e-6), EVERYBODY, (scores[0] - 1e-6, math.inf)):
        for threshold in (math.inf, scores[0] - 1e-6, -math.inf):
            pipe.enable_guard(watching(threshold, plan, doubt=doubt, other_seeds=2))
            sample()
    assert graphs.made == made
    graphs.run.clear()
    pipe.disable_guard()
    latents_of(pipe, **call)
    assert graphs.run == pattern


def compiled(pipe: Any, graphs: Graphs, how: str) -> Any:
    """The UNet itself, which has been compiled."""
    unet = pipe.unet
    if how == "in place":
        unet.compile(backend=graphs)
    elif how == "blocks":
        unet.compile_repeated_blocks(backend=graphs)
    else:
        pipe.unet = torch.compile(unet, backend=graphs)
    return unet


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("other_seeds", [0, 2])
def test_detection_has_calls_of_the_samplers_shape_only(
    own_parts: dict[str, Any], graphs: Graphs, other_seeds: int, how: str
) -> None:
    """With a negative prompt, the control is one more."""
    pipe = build(GuardedStableDiffusionPipeline, own_parts)
    unet = compiled(pipe, graphs, how)
    pipe.enable_guard(watching(doubt=EVERYBODY))
    scores = sorted(scores_of(latents_of(pipe)[0]))
    for negative in (None, "grey"):
        pipe.enable_guard(watching(doubt=(scores[1], math.inf), other_seeds=other_seeds))
        with CountLanes(unet) as counted:
            output, _ = latents_of(pipe, negative_prompt=None if negative is None else [negative] * 3)
        assert {shape[0] for shape in counted.shapes} == {6}
        spent = sum(record.extra_lanes for record in output.records or ())
        assert spent < counted.rows - 6 * len(pipe.scheduler.timesteps)  # what fills a call up is billed to nobody


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "heun", "unipc", "lcm"])
@pytest.mark.parametrize("arguments", [{}, {"negative_prompt": ["grey"] * 3}, {"guidance_scale": 1.0}])
def test_detection_runs_the_samplers_graph(
    own_parts: dict[str, Any], graphs: Graphs, scheduler: str, arguments: dict[str, Any]
) -> None:
    """Whatever differs in a call's arguments, were it the timestep's dtype, would have it run without."""
    pipe = build(GuardedStableDiffusionPipeline, own_parts, scheduler)
    unet = compiled(pipe, graphs, "wrapped")
    pipe.disable_guard()
    with CountLanes(unet) as counted:
        latents_of(pipe, **arguments)
    a_call = len(graphs.run) / len(counted.shapes)
    graphs.run.clear()
    pipe.enable_guard(watching(doubt=EVERYBODY, other_seeds=2))
    with CountLanes(unet) as counted:
        latents_of(pipe, **arguments)
    assert len(graphs.run) == a_call * len(counted.shapes)
    assert len(counted.shapes) > 6 + 4


def test_a_single_image_that_is_sampled_again_has_the_samplers_shape_throughout(
    own_parts: dict[str, Any], graphs: Graphs
) -> None:
    pipe = build(GuardedStableDiffusionPipeline, own_parts)
    unet = compiled(pipe, graphs, "wrapped")
    pipe.enable_guard(watching(-math.inf, doubt=EVERYBODY, other_seeds=2), budget=1000)
    for negative in (None, "grey"):
        with CountLanes(unet) as counted:
            output, _ = latents_of(pipe, prompt="x", negative_prompt=negative, generator=seeded(1))
        assert [len(record.attempts) for record in output.records] == [1]
        assert {shape[0] for shape in counted.shapes} == {2}


def test_scores_and_images_are_those_of_a_unet_that_is_not_compiled(own_parts: dict[str, Any], graphs: Graphs) -> None:
    pipe = build(GuardedStableDiffusionPipeline, own_parts)
    guard = watching(-math.inf, (Forget(),), doubt=EVERYBODY, other_seeds=2)
    pipe.enable_guard(guard)
    before, _ = latents_of(pipe)
    pipe.unet = torch.compile(pipe.unet, backend=graphs)
    pipe.enable_guard(guard)
    after, _ = latents_of(pipe)
    assert torch.allclose(before.images, after.images, atol=1e-5)
    assert scores_of(after) == pytest.approx(scores_of(before), abs=1e-5)
    spent = [[record.extra_lanes for record in output.records or ()] for output in (before, after)]
    assert spent[0] == spent[1]


@pytest.mark.parametrize("count", [1, 4, 5, 11])
def test_one_shape_gives_the_rows_that_were_asked_for(own_parts: dict[str, Any], count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, 8, 8, generator=generator)
    lanes = Conditioning(torch.randn(count, 16, 32, generator=generator), attention_mask=torch.ones(count, 16).bool())
    unet = own_parts["unet"]
    expected = evaluate_lanes(unet, x, 500, lanes)
    assert of_one_shape(unet, 4) is unet
    unet.forward = Overwrites(unet)
    with CountLanes(unet) as counted:
        found = evaluate_lanes(OneShape(unet, 4), x, 500, lanes)
    assert {shape[0] for shape in counted.shapes} == {4}
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_stance_is_given_back_by_the_last_thread_that_took_it(graphs: Graphs) -> None:
    layer = torch.compile(torch.nn.Linear(4, 4), backend=graphs)
    first, second = threading.Event(), threading.Event()

    def other() -> None:
        with no_new_graphs():
            first.set()
            second.wait(10)

    thread = threading.Thread(target=other)
    with torch.no_grad():
        layer(torch.zeros(6, 4))
        with no_new_graphs():
            thread.start()
            first.wait(10)
        layer(torch.zeros(2, 4))  # the other thread is not done
        assert graphs.made == 1
        second.set()
        thread.join()
        layer(torch.zeros(2, 4))
    assert graphs.made == 2


def test_an_error_gives_the_stance_back(graphs: Graphs) -> None:
    layer = torch.compile(torch.nn.Linear(4, 4), backend=graphs)
    with pytest.raises(KeyError), no_new_graphs():
        raise KeyError("x")
    with torch.no_grad():
        layer(torch.zeros(2, 4))
    assert graphs.made == 1


class Overwrites:
    """A UNet as a CUDA graph has it: each output is in the same memory, and whatever was there before is gone."""

    def __init__(self, unet: Any) -> None:
        self.forward, self.buffers = unet.forward, dict[Sequence[int], torch.Tensor]()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        output = self.forward(*args, **kwargs)[0]
        if torch.is_grad_enabled():
            return (output,)
        for buffer in self.buffers.values():
            buffer.fill_(math.nan)
        return (self.buffers.setdefault(output.shape, torch.empty_like(output)).copy_(output),)


def outcomes(output: Any) -> list[Any]:
    return [
        (record.outcome, record.score, record.extra_lanes, record.statistics, record.attempts)
        for record in output.records
    ]


@pytest.mark.parametrize(
    ("scheduler", "prediction_type"),
    [
        ("ddim", "epsilon"),
        ("ddim", "v_prediction"),
        ("ddim", "sample"),
        ("dpm_multistep", "epsilon"),
        ("euler_ancestral", "v_prediction"),
        ("heun", "epsilon"),
    ],
)
@pytest.mark.parametrize("arguments", [{}, {"guidance_scale": 1.0}, {"negative_prompt": ["grey"] * 3}])
def test_outputs_that_are_overwritten_change_nothing(
    own_parts: dict[str, Any], scheduler: str, prediction_type: str, arguments: dict[str, Any]
) -> None:
    pipe = build(GuardedStableDiffusionPipeline, own_parts, make_scheduler(scheduler, prediction_type=prediction_type))
    plan = (EmbeddingNoise(strengths=(1.0,)), WordAblation(), Forget())
    guard = watching(-math.inf, plan, doubt=EVERYBODY, other_seeds=2, look_again_at=(0.7, 0.98))
    found = []
    for overwritten in (False, True):
        if overwritten:
            pipe.unet.forward = Overwrites(pipe.unet)
        for policy in (guard.policy, Policy(margin=math.inf, on_failure="keep")):
            pipe.enable_guard(Guard(**{name: getattr(guard, name) for name in guard.__slots__} | {"policy": policy}))
            output, _ = latents_of(pipe, **arguments)
            found.append((output.images, outcomes(output)))
    for before, after in zip(found[:2], found[2:], strict=True):
        assert torch.equal(before[0], after[0])
        assert before[1] == after[1]


def test_outputs_that_are_overwritten_change_no_score_of_quick_depth(own_parts: dict[str, Any]) -> None:
    pipe, prompts = build(GuardedStableDiffusionPipeline, own_parts), [f"a dog {place}" for place in range(7)]
    found = []
    for overwritten in (False, True):
        if overwritten:
            pipe.unet.forward = Overwrites(pipe.unet)
        guard = watching(doubt=EVERYBODY, other_seeds=2, observe_at=(0.13, 0.3))
        screener = QuickScreener.make(pipe, ModelSettings(model="tiny/random", steps=8), batch_size=2, guard=guard)
        found.append([(record.score, record.statistics) for record in screener.measure(prompts, [0, 1] * 3 + [2])])
    assert found[0] == found[1]


def test_a_session_gives_the_stance_back_when_it_fails(
    guarded: Any, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ArithmeticError("x")

    monkeypatch.setattr(Session, "_decide", fail)
    with pytest.raises(ArithmeticError):
        latents_of(guarded(watching()))
    layer = torch.compile(torch.nn.Linear(4, 4), backend=graphs)
    layer(torch.zeros(2, 4))
    assert graphs.made == 1
