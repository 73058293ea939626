"""Resumed trajectories: with nothing changed they arrive where the host's loop was."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from tiny import EVERYBODY, SCHEDULERS, Forget, Identity, seeded, watching

from sd_guard.detection import PrematureDetail
from sd_guard.lanes import Conditioning
from sd_guard.mitigation import Change
from sd_guard.pipelines import escalation
from sd_guard.pipelines.replay import Resumed, Walk, control_lanes, guide, is_delayed

STEPS = 6
PROMPTS = ["x", "a dog on the moon", "blue"]

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "eta": {"eta": 0.7},
    "guidance_rescale": {"guidance_rescale": 0.7},
    "negative_prompt": {"negative_prompt": ["a cat", "", "blurred"]},
    "no_guidance": {"guidance_scale": 1.0},
    "scale_changes": {"callback_on_step_end": lambda pipe, *_: raise_guidance(pipe)},
}


def raise_guidance(pipe: Any) -> dict[str, Any]:
    pipe._guidance_scale += 1.0
    return {}


class Spy:
    """Keeps the resumed trajectories, and the latents that the host's loop had after each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.resumed: list[tuple[list[int], Resumed]] = []
        self.latents: list[torch.Tensor] = []

        def keep(pipe: Any, inputs: Any, start: Any, watch: Any, rows: list[int], *rest: Any) -> Resumed:
            self.resumed.append((rows, resume(pipe, inputs, start, watch, rows, *rest)))
            return self.resumed[-1][1]

        resume = escalation.resume
        monkeypatch.setattr(escalation, "resume", keep)

    def wrap(self, user: Any) -> Any:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.latents.append(tensors["latents"])
            return user(pipe, step, timestep, tensors) if user else {}

        return callback


def run(pipe: Any, spy: Spy, **arguments: Any) -> Any:
    user = arguments.pop("callback_on_step_end", None)
    arguments = {"prompt": PROMPTS, "generator": seeded(1, 2, 3)} | arguments
    torch.manual_seed(7)
    return pipe(**arguments, num_inference_steps=STEPS, output_type="latent", callback_on_step_end=spy.wrap(user))


def assert_arrived(spy: Spy, output: Any, rows: list[int], *, exactly: bool) -> None:
    """The resumed rows stand where the host's did, and score what it scored."""
    ((resumed_rows, resumed),) = spy.resumed
    assert resumed_rows == rows
    step = output.records[0].decided_at_step
    there = spy.latents[step][rows]
    if exactly:
        assert torch.equal(resumed.latents, there)
    else:
        torch.testing.assert_close(resumed.latents, there, rtol=1e-3, atol=1e-3)
    for row in rows:
        (attempt,) = output.records[row].attempts
        assert attempt.score == pytest.approx(output.records[row].score, abs=0 if exactly else 1e-3)
        assert not attempt.passed


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_unchanged_trajectories(guarded: Any, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows: the same bits, since the batch has the same shape. Some rows: the same up to rounding."""
    spy = Spy(monkeypatch)
    output = run(guarded(watching(-math.inf, (Identity(),), doubt=EVERYBODY), scheduler), spy)
    assert_arrived(spy, output, [0, 1, 2], exactly=True)
    # Below the two highest scores, so that those two are resumed.
    threshold = sorted(record.score for record in output.records)[0]
    spy.resumed, spy.latents = [], []
    output = run(guarded(watching(threshold, (Identity(),), doubt=EVERYBODY), scheduler), spy)
    assert_arrived(spy, output, [r for r in range(3) if output.records[r].score > threshold], exactly=False)
    assert len(spy.resumed[0][0]) == 2


@pytest.mark.parametrize("call", [call for call in CALLS if call != "plain"])
def test_unchanged_trajectories_of_other_calls(guarded: Any, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    output = run(guarded(watching(-math.inf, (Identity(),), doubt=EVERYBODY), budget=50), spy, **CALLS[call])
    assert_arrived(spy, output, [0, 1, 2], exactly=True)


@pytest.mark.parametrize("call", CALLS)
def test_probes_of_an_unchanged_trajectory(guarded: Any, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same probe vectors at the same latent: where the LID has a part in it, the score is the same to the bit."""
    detector = PrematureDetail(threshold=-math.inf, doubt=-math.inf)
    spy, guard = Spy(monkeypatch), watching(plan=(Identity(),), detector=detector)
    output = run(guarded(guard, budget=50), spy, **CALLS[call])
    assert_arrived(spy, output, [0, 1, 2], exactly=True)
    free = run(guarded(replace(guard, probes=0), budget=50), spy, **CALLS[call])
    for record, without in zip(output.records, free.records, strict=True):
        assert abs(record.score - without.score) > 1e-3
        assert without.attempts[0].score == without.score
        assert record.extra_lanes == without.extra_lanes + 2 * 2


@pytest.mark.parametrize("scheduler", ["ddim", "heun", "euler_ancestral"])
def test_one_generator_for_the_batch(guarded: Any, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed as a whole, the batch draws the noise that it drew before."""
    spy = Spy(monkeypatch)
    pipe = guarded(watching(-math.inf, (Identity(),), doubt=EVERYBODY), scheduler)
    output = run(pipe, spy, generator=torch.Generator().manual_seed(4))
    assert_arrived(spy, output, [0, 1, 2], exactly=True)


@pytest.mark.parametrize("cutoff", [0, 2, 5])
def test_guidance_cut_off(guarded: Any, cutoff: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trajectory is resumed without guidance from where the host went on without it."""
    spy = Spy(monkeypatch)
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=cutoff)
    pipe = guarded(watching(-math.inf, (Identity(),), doubt=EVERYBODY), budget=50)
    output = pipe(
        "a dog", generator=seeded(1), num_inference_steps=STEPS, output_type="latent", callback_on_step_end=callback
    )
    ((rows, resumed),) = spy.resumed
    steps: list[torch.Tensor] = []

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(tensors["latents"])
        return callback(pipe, step, timestep, {"prompt_embeds": tensors["prompt_embeds"]})

    pipe.disable_guard()
    pipe(
        "a dog",
        generator=seeded(1),
        num_inference_steps=STEPS,
        output_type="latent",
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert rows == [0]
    assert torch.equal(resumed.latents, steps[output.records[0].decided_at_step])


@pytest.mark.parametrize("scheduler", ["ddim", "unipc", "kdpm2_ancestral"])
def test_a_change_for_all_steps_is_the_hosts_call_with_it(plain: Any, guarded: Any, scheduler: str) -> None:
    """A rescued image is the one that the host samples when it is given the changed prompt from the start."""
    pipe = guarded(watching(-math.inf, ()), scheduler, on_failure="keep")
    kept = pipe(["a dog"], generator=seeded(1), num_inference_steps=STEPS, output_type="latent")
    pipe.enable_guard(watching(kept.records[0].score - 0.1, (Forget(),)))
    rescued = pipe(["a dog"], generator=seeded(1), num_inference_steps=STEPS, output_type="latent")
    assert rescued.records[0].outcome == "rescued"
    expected = plain(scheduler)([""], generator=seeded(1), num_inference_steps=STEPS, output_type="latent").images
    assert torch.equal(rescued.images, expected)
    assert not torch.equal(kept.images, expected)


def test_guide_is_the_hosts() -> None:
    generator = torch.Generator().manual_seed(0)
    conditional, negative = torch.randn(2, 3, 4, 8, 8, generator=generator)
    noise = negative + 5.0 * (conditional - negative)
    assert torch.equal(guide(conditional, negative, 5.0, 0.0), noise)
    rescaled = rescale_noise_cfg(noise, conditional, guidance_rescale=0.7)
    assert torch.equal(guide(conditional, negative, 5.0, 0.7), rescaled)


def test_control_lanes() -> None:
    prompts, empty = torch.arange(1.0, 3.0).reshape(2, 1, 1), torch.zeros(1, 1)
    added = {"image_embeds": [torch.arange(2.0)[:, None]]}
    unguided = control_lanes(Conditioning(prompts, None, added), 2, empty)
    assert unguided.prompt_embeds.flatten().tolist() == [0, 0, 1, 2]
    assert unguided.added["image_embeds"][0].flatten().tolist() == [0, 1, 0, 1]
    added = {"image_embeds": [torch.arange(4.0)[:, None]]}
    guided = control_lanes(Conditioning(torch.cat([prompts + 7, prompts]), None, added), 2, empty)
    assert guided.prompt_embeds.flatten().tolist() == [0, 0, 1, 2]
    assert guided.added["image_embeds"][0].flatten().tolist() == [0, 1, 2, 3]


def test_cost() -> None:
    walk = Walk(Conditioning(torch.zeros(4, 1, 1)), (5.0, 5.0, None))
    assert (walk.cost(0, 3), walk.cost(1, 3), walk.cost(3, 3)) == (5, 3, 0)


@pytest.mark.parametrize(("share", "delayed"), [(0.0, True), (0.09, True), (0.1, False), (0.2, False)])
def test_delayed_guidance(share: float, delayed: bool) -> None:
    assert is_delayed(Change("delayed_guidance", 0.1, torch.zeros(1, 1), guidance_from=0.1), share) is delayed
    assert not is_delayed(Change("forget", 0.0, torch.zeros(1, 1)), share)


def test_delay_by_rounding() -> None:
    """0.3 of ten steps is step 3 whatever 3 / 10 rounds to."""
    change = Change("delayed_guidance", 0.1 + 0.2, torch.zeros(1, 1), guidance_from=0.1 + 0.2)
    assert 3 / 10 < change.guidance_from
    assert not is_delayed(change, 3 / 10)
