"""Every suite on tiny networks: its cases, and the lanes that each must cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tiny import build, components

from sd_guard.bench import jacobians, mitigation, overhead, run
from sd_guard.bench.base import Bench, Case
from sd_guard.bench.peers import peers
from sd_guard.bench.screen import screen
from sd_guard.bench.settings import BenchSettings
from sd_guard.guard import Guard
from sd_guard.mitigation import MITIGATIONS
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.screening.quick import QUICK

Measure = Callable[..., dict[str, dict[str, Any]]]
STEPS = 4
PROBES = Guard().lanes_in_doubt  # lanes of an image in doubt


def test_overhead_of_nothing_flagged_is_the_probes_of_images_in_doubt(measure: Measure) -> None:
    lines = measure("overhead", steps=STEPS, batches=(2,))
    names = ("unguarded", "guarded, none in doubt", "guarded, all probed once", "guarded, all in doubt")
    for kernel in ("matmul", "sdpa"):
        plain, none, once, every = (lines.pop(f"{kernel}, {name}") for name in names)
        assert plain["lanes"] == none["lanes"] == 2 * STEPS * 2
        assert once["lanes"] == plain["lanes"] + 2 * 2
        assert every["lanes"] == plain["lanes"] + PROBES * 2
        assert plain["flops"] == none["flops"] < once["flops"] < every["flops"]
        assert every["baseline"] == plain["case"]
        assert every["ratio"] == every["seconds"] / plain["seconds"]
        assert plain["failed"] is none["failed"] is once["failed"] is every["failed"] is None
    absent = [lines.pop(f"absent, {name}") for name in names]
    assert {(line["lanes"] >= 2 * STEPS * 2, line["failed"]) for line in absent} == {(True, None)}
    assert absent[0]["flops"] < plain["flops"] / 2
    assert not lines


def test_only_the_kernels_and_guards_that_are_asked_for_are_measured(measure: Measure) -> None:
    lines = measure("overhead", steps=STEPS, batches=(1,), kernels=("absent",), guards=("once", "none"), flops=False)
    assert [*lines] == ["absent, unguarded", "absent, guarded, all probed once", "absent, guarded, none in doubt"]
    assert {line["flops"] for line in lines.values()} == {line["ceiling_share"] for line in lines.values()} == {None}
    assert all(line["lanes"] for line in lines.values())
    least, most = lines["absent, guarded, none in doubt"]["ratio_quartiles"]
    assert least <= lines["absent, guarded, none in doubt"]["ratio"] <= most
    assert lines["absent, unguarded"]["seconds_more"] == 0


def test_a_kernel_that_is_not_installed_is_a_line_that_says_so(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(unet: Any) -> Any:
        raise ModuleNotFoundError("No module named 'sage'")

    monkeypatch.setattr(overhead, "KERNELS", {"sage": missing, "sdpa": overhead.KERNELS["sdpa"]})
    lines = measure("overhead", steps=STEPS, batches=(1,))
    assert lines["sage"]["failed"] == "ValueError: ModuleNotFoundError: No module named 'sage'"
    assert lines["sage"]["seconds"] is None
    assert lines["sdpa, unguarded"]["failed"] is None


def test_a_suite_that_cannot_be_set_up_is_a_line_and_the_next_batch_is_measured(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_small(bench: Bench) -> Iterator[Sequence[Case]]:
        if bench.batch > 1:
            raise torch.OutOfMemoryError("too large")
        yield [Case(name="small", pipe=bench.pipe, run=lambda: None)]

    monkeypatch.setitem(run.SUITES, "screen", only_small)
    lines = measure("screen", batches=(2, 1))
    assert {case: line["failed"] for case, line in lines.items()} == {
        "set-up 2": "ValueError: OutOfMemoryError: too large",
        "small 1": None,
    }


def test_screen_is_held_to_the_same_calls_of_the_bare_unet(measure: Measure) -> None:
    lines = measure("screen", steps=STEPS, batches=(3,))
    for name, calls in (("none in doubt", 1), ("all in doubt", 1 + QUICK.other_seeds)):
        bare, quick = lines[f"bare UNet, {name}"], lines[f"quick depth, {name}"]
        assert bare["lanes"] == quick["lanes"] == 3 * calls
        assert quick["extra_lanes"] == calls
        assert bare["prompts"] == quick["prompts"] == 3
        assert quick["flops"] == bare["flops"]  # the text encoder's are of another thread, and not counted


@pytest.mark.parametrize("batch", [1, 3])
def test_a_compiled_unet_is_one_graph_for_screening_and_bare(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled anew in the middle of a measurement costs a minute; and another graph is another UNet."""
    pipe, graphs = build(GuardedStableDiffusionPipeline, components()), []

    def keep(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("sd_guard.bench.screen.compile_anew", lambda unet: torch.compile(unet, backend=keep))
    settings = BenchSettings(suite="screen", steps=STEPS, compile=True)
    torch.compiler.reset()
    for cases in screen(Bench(settings, torch.device("cpu"), "float32", batch, pipe)):
        for case in cases:
            case.run()
    assert len(graphs) == 1


def test_every_mitigation_is_a_case() -> None:
    pipe = build(GuardedStableDiffusionPipeline, components())
    (cases,) = mitigation.mitigation(Bench(BenchSettings(suite="mitigation"), torch.device("cpu"), "float32", 1, pipe))
    assert [case.name for case in cases] == ["none", *MITIGATIONS]


def test_an_attempt_is_made_and_taken_whatever_comes_of_it(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    some = ("embedding_noise", "lower_guidance", "embedding_optimisation")
    monkeypatch.setattr(mitigation, "MITIGATIONS", {name: MITIGATIONS[name] for name in some})
    lines = measure("mitigation", steps=STEPS, batches=(2,))
    for name, line in lines.items():
        assert (line["failed"], line["flagged"], line["attempts"]) == (None, 2, 0 if name == "none" else 2), line
    # What costs nothing to propose resumes up to the deciding step, the first of four; in a loop of its own, all.
    assert lines["none"]["lanes"] == 2 * STEPS * 2
    assert lines["embedding_noise"]["lanes"] == (2 * STEPS + 2) * 2
    assert lines["lower_guidance"]["lanes"] == (2 * STEPS + 2 * STEPS) * 2
    assert lines["embedding_optimisation"]["extra_lanes"] > lines["embedding_noise"]["extra_lanes"] == 2


def test_peers_cost_what_their_papers_say(measure: Measure) -> None:
    lines = measure("peers", steps=STEPS, dtypes=("bfloat16",))
    assert all(line["failed"] is None for line in lines.values())
    predicted_and_multiplied = 4 * 2 + 4 * 2
    assert {case: line["lanes"] for case, line in lines.items()} == {
        "unguarded image": 2 * STEPS,
        "guard, quick depth": 1,
        "guard, trajectory LID, 1 probe": 1,
        "guard, first decision, all in doubt": 2 + PROBES,
        "guard, first decision, all in doubt, 4 images": 4 * (2 + PROBES),
        "wen, first step, 4 images": 4 * 2,
        "wen, all steps, 4 images": 4 * 2 * STEPS,
        "sail, forward mode, 4 images": predicted_and_multiplied,
        "sail, forward mode, 4 images, float32": predicted_and_multiplied,
        "flipd, 1 Gaussian probe, forward mode, float32": 1 + 1,
        "flipd, 50 Gaussian probes, forward mode, float32": 1 + 50,
    }


def test_peers_in_full_precision_are_none_of_them_twice() -> None:
    pipe = build(GuardedStableDiffusionPipeline, components())
    (cases,) = peers(Bench(BenchSettings(suite="peers", steps=2), torch.device("cpu"), "float32", 1, pipe))
    assert sum("sail" in case.name for case in cases) == 1
    assert {id(case.pipe) for case in cases} == {id(pipe)}


def test_trace_says_how_far_off_each_method_is(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jacobians, "REFERENCE_PROBES", 8)
    monkeypatch.setattr(jacobians, "COMPARED", 4)
    monkeypatch.setattr(jacobians, "_POWERS", (0, 14))
    lines = measure("trace", steps=STEPS, batches=(2,), dtypes=("float32", "bfloat16"))
    assert len(lines) == 2 * (1 + 6)
    assert all(line["failed"] is None for line in lines.values())
    assert jacobians.reference_point.cache_info().misses == 1  # both dtypes are held to the same
    exact = lines["forward-mode float32"]
    assert exact["error"] == 0.0  # the reference itself
    assert exact["error_1_probes"] > 0
    assert exact["reference_stderr"] > 0
    assert lines["reverse-mode float32"]["error"] < 1e-6
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 0.02)):
        names = ("finite-difference", "finite-difference, step 2^-0", "finite-difference, step 2^-14")
        default, far, near = (lines[f"{name} {dtype}"]["error"] for name in names)
        assert default < bound
        assert default < min(far, near)
        assert lines[f"finite-difference {dtype}"]["lanes"] == lines[f"evaluation {dtype}"]["lanes"] == 2
        assert lines[f"central {dtype}"]["lanes"] == 2 * 2
