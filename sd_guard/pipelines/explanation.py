"""Why the guard decided as it did: which words, and which places of the image, a verdict rests on."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from sd_guard.attribution import METHODS, Method, WordAttribution, pinned_map, read_text
from sd_guard.detection import Verdict, is_settled, verdict_of
from sd_guard.noise import early_steps
from sd_guard.pipelines.trajectory import denoiser_of, walk
from sd_guard.pipelines.watching import Watching
from sd_guard.statistics.base import StepCall

_PROBES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What the guard saw, and what that rests on.

    Attributes:
        verdict: before any mitigation.
        score: of the detector.
        threshold: above which it flags.
        step: the one that decided, an index into the schedule.
        count: steps of the schedule.
        words: shares of the words.
        shown: the step of the middle later look, where the image and the places are read.
        image: (3, h, w) the image that is predicted there, in [0, 1].
        left_open: (H, W) share of the directions of a place left open, with the prompt.
        left_open_without: (H, W) without it.
    """

    verdict: Verdict
    score: float
    threshold: float
    step: int
    count: int
    words: WordAttribution
    shown: int
    image: Tensor
    left_open: Tensor
    left_open_without: Tensor


def look(
    pipe: Any, prompt: str, *, steps: int = 50, guidance_scale: float = 7.5, seed: int = 0, method: Method = "ablation"
) -> Explanation:
    """Samples up to the guard's last look, and attributes what it saw.

    Words are those of the observed steps; places are read at the middle one of the later looks, since the local LID
    falls to 0 everywhere where the noise is high.

    Args:
        pipe: a `GuardedStableDiffusionPipeline` with its guard on.
        prompt: to explain.
        steps: of sampling.
        guidance_scale: at most 1 means none.
        seed: of the image's generator.
        method: how words get their shares.

    Raises:
        ValueError: the UNet's answers are not finite, or a prompt that holds no words for its tokenizer.
    """
    scheduler = deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    count, early = len(scheduler.timesteps), early_steps(scheduler, scheduler.timesteps.tolist())
    guard = pipe.guard
    model = denoiser_of(pipe, [(seed + 0x9E3779B97F4A7C15) % 2**64])  # the probes that the guard would draw
    watching = Watching(guard, model, guard.steps(count, early), guard.later_steps(count, early))
    text = read_text(pipe, prompt)
    # At the last of them the noise is less than the step of a difference quotient.
    places = (*watching.later_steps, watching.steps[-1])[len(watching.later_steps) // 2]
    calls: list[StepCall] = []
    score, threshold, step, verdict, settled = 0.0, guard.detector.threshold, 0, None, False
    for call in walk(pipe, [prompt], [seed], steps=steps, guidance_scale=guidance_scale):
        if call.step in (*watching.steps, places):
            calls.append(call)
        decided = watching.watch(call)
        if decided is not None and verdict != "flag" and not settled:
            score, step = decided[0][0], call.step
            verdict = verdict_of(score, threshold)
            settled = is_settled(guard.detector, score) and not guard.look_at_all
        if call.step == guard.last_step(count, early):
            break
    last = calls[-1]
    assert verdict is not None
    assert model.decode is not None
    return Explanation(
        verdict=verdict,
        score=score,
        threshold=threshold,
        step=step,
        count=count,
        words=METHODS[method](calls[: len(watching.steps)], model, text),
        shown=last.step,
        image=model.decode(model.read(last, "conditional").x0_hat)[0].cpu(),
        left_open=pinned_map(last, model, probes=_PROBES)[0].cpu(),
        left_open_without=pinned_map(last, model, probes=_PROBES, lane="control")[0].cpu(),
    )
