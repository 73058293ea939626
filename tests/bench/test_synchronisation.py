"""How often the guard makes the host wait for the device, seen by a device that is none (`tests/faraway.py`)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny import build, components, seeded

from sd_guard.bench.base import EVERYBODY, NOBODY
from sd_guard.detection import PrematureDetail
from sd_guard.guard import Guard
from sd_guard.mitigation import MITIGATIONS, Mitigation
from sd_guard.mitigation.latents import NewSeed
from sd_guard.observation import Observation
from sd_guard.pipelines.escalation import Escalation
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.pipelines.trajectory import walk
from sd_guard.policy import Policy
from sd_guard.screening.quick import QuickScreener
from sd_guard.screening.settings import ModelSettings

faraway = pytest.importorskip("faraway", reason="needs torch with devices in Python", exc_type=ImportError)

STEPS = 10
LATER = [step for step in Guard().later_steps(STEPS) if step < STEPS - 1]  # what the last waits for, all do
ARGUMENTS = [{}, {"guidance_scale": 1.0}, {"negative_prompt": ["blurry"] * 2}]
FLAG_ALL = PrematureDetail(threshold=-math.inf)
# Those that differentiate cannot: autograd does not run on a device that is written in Python.
PLANS: dict[str, Sequence[Mitigation]] = {"default": Guard().plan} | {
    name: (mitigation(),)
    for name, mitigation in MITIGATIONS.items()
    if name not in ("later", "embedding_optimisation", "token_replacement", "noise_optimisation")
}
# Where a decision is read from. Guidance that follows its own strength reads it at each step.
DECISIONS = {
    "detection.py:decide",
    "session.py:_read",
    "escalation.py:_compare",
    "escalation.py:_best",
    "prompt.py:_judge",
    "reanchoring.py:_shares",
    "replay.py:go_on",
}


def far(cls: Any, scheduler: str = "euler") -> Any:
    return build(cls, components(), scheduler).to(faraway.faraway())


def waits(pipe: Any, **arguments: Any) -> list[Any]:
    """What was waited for between the first and the last UNet call of the loop."""
    own = {"prompt": ["a dog", "x"], "num_inference_steps": STEPS, "output_type": "latent", "generator": seeded(1, 2)}
    with faraway.noted() as noted:
        marks: list[int] = []
        hook = pipe.unet.register_forward_pre_hook(lambda *_: marks.append(len(noted)))
        pipe(**(own | arguments))
        hook.remove()
        return noted[marks[0] : marks[-1]]


def ours(noted: list[Any]) -> Counter[tuple[str, str]]:
    """Those of the guard's own code: not where it has diffusers encode a text, or make a step."""
    return Counter((wait.what, wait.line) for wait in noted if wait.ours)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("scheduler", ["euler", "dpm_multistep", "ddim"])
def test_with_nothing_in_doubt_it_waits_once(scheduler: str, arguments: dict[str, Any]) -> None:
    plain = waits(far(StableDiffusionPipeline, scheduler), **arguments)
    pipe = far(GuardedStableDiffusionPipeline, scheduler)
    pipe.enable_guard(Guard(detector=NOBODY))
    watched = waits(pipe, **arguments)
    assert ours(watched) == {("read", "detection.py:decide"): 1}
    assert len(watched) == len(plain) + 1


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("look_at_all", [False, True])
def test_a_question_costs_one_wait_for_its_answer_and_so_does_a_look(
    look_at_all: bool, arguments: dict[str, Any]
) -> None:
    pipe = far(GuardedStableDiffusionPipeline)
    pipe.enable_guard(Guard(detector=EVERYBODY, look_at_all=look_at_all))
    looks = len(LATER) if look_at_all else 0
    expected = {("read", "detection.py:decide"): 1 + len(Guard().questions), ("read", "session.py:_read"): looks}
    assert ours(waits(pipe, **arguments)) == {place: count for place, count in expected.items() if count}


@pytest.mark.parametrize(
    ("plan", "on_failure", "scheduler"),
    [
        *((name, "blank", "ddim") for name in PLANS),
        *(("default", "blank", name) for name in ("euler", "dpm_multistep", "pndm", "lcm", "heun")),
        ("default", "keep", "ddim"),
        ("lower_guidance", "keep", "euler_ancestral"),
    ],
)
def test_flagged_images_wait_for_decisions_only(plan: str, on_failure: Any, scheduler: str) -> None:
    pipe = far(GuardedStableDiffusionPipeline, scheduler)
    pipe.enable_guard(Guard(detector=FLAG_ALL, plan=PLANS[plan], policy=Policy(budget=200, on_failure=on_failure)))
    found = ours(waits(pipe))
    assert {what for what, _ in found} == {"read"}
    assert {line for _, line in found} <= DECISIONS
    assert found["read", "escalation.py:_compare"] + found["read", "prompt.py:_judge"] > 0  # of a mitigation


@dataclass(frozen=True)
class FlagsFirst:
    """Flags the first few of three images; what is resumed passes, at once and at every look."""

    flagged: int
    threshold: float = 0.5

    def score(self, observations: Sequence[Observation], later: Sequence[Observation] = ()) -> torch.Tensor:
        rows = torch.arange(len(observations[0].lanes), device=observations[0].values["detail"].device)
        return (rows < self.flagged if len(rows) == 3 else rows < 0).float()

    def in_doubt(self, observations: Sequence[Observation]) -> torch.Tensor:
        return torch.zeros_like(observations[0].values["detail"]).bool()


def test_a_look_at_rescued_images_is_waited_for_once_however_many_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[Any] = []
    judge = Escalation.judge
    monkeypatch.setattr(Escalation, "judge", lambda self, rescue: (judged.append(rescue), judge(self, rescue))[1])
    pipe, found = far(GuardedStableDiffusionPipeline), []
    for flagged in (1, 2):
        judged.clear()
        pipe.enable_guard(
            Guard(detector=FlagsFirst(flagged), plan=(NewSeed(seeds=1),), policy=Policy(max_resemblance=1))
        )
        found.append(ours(waits(pipe, prompt=["a dog", "x", "a red cat"], generator=seeded(1, 2, 3))))
        assert len(judged) == flagged * len(Guard().later_steps(STEPS))
    assert found[0] == found[1]
    assert found[0]["read", "session.py:_read"] == len(LATER)
    assert {line for _, line in found[0]} <= DECISIONS


@pytest.mark.parametrize("scheduler", ["euler", "dpm_multistep", "ddim"])
def test_a_plain_trajectory_is_walked_without_waiting(scheduler: str) -> None:
    pipe = far(StableDiffusionPipeline, scheduler)
    with faraway.noted() as noted:
        begun = [len(noted) for _ in walk(pipe, ["a dog", "x"], [1, 2], steps=STEPS)]
    assert len(begun) == STEPS
    assert not ours(noted[begun[0] :])


@pytest.mark.parametrize(("detector", "reads"), [(NOBODY, 1), (EVERYBODY, 1 + len(Guard().questions))])
def test_quick_depth_waits_for_decisions_only(detector: PrematureDetail, reads: int) -> None:
    pipe = far(GuardedStableDiffusionPipeline)
    model = ModelSettings(model="tiny/random", steps=8)
    screener = QuickScreener.make(pipe, model, batch_size=2, guard=Guard(detector=detector))
    prompts = ["a dog", "x", "a red cat", "blue"]
    screener.measure(prompts, [0] * 4)
    with faraway.noted() as noted:
        screener.measure(prompts, [0, 1, 2, 3])  # seeds that were seen, and others
    assert ours(noted) == {("read", "detection.py:decide"): reads, ("read", "observation.py:read_values"): 1}


def test_a_copy_that_blocks_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def index_of(rows: Sequence[int], device: torch.device) -> torch.Tensor:
        return torch.tensor(list(rows), device=device)

    pipe = far(GuardedStableDiffusionPipeline)
    pipe.enable_guard(Guard(detector=EVERYBODY))
    before = len(waits(pipe))
    monkeypatch.setattr("sd_guard.observation.index_of", index_of)
    noted = waits(pipe)
    assert Counter(wait.line for wait in noted)["test_synchronisation.py:index_of"] == len(noted) - before > 0
