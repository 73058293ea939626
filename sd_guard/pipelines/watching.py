"""What the guard would decide on a plain trajectory: its score, at all looks, and the lanes that it spends on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sd_guard.detection import decide
from sd_guard.guard import Guard
from sd_guard.observation import Observation, Question, lanes_of, look_again, observe, predicted_image, probe
from sd_guard.statistics.base import Denoiser, StepCall


@dataclass(slots=True)
class Watching:
    """One batch's trajectory, as the guard sees it.

    Attributes:
        guard: whose steps, probes and detector are used.
        model: behind the trajectory.
        steps: to observe, of the sampler's; the last decides.
        later_steps: steps that look again.
        seen: so far.
        later: looks so far.
    """

    guard: Guard
    model: Denoiser
    steps: list[int]
    later_steps: list[int]
    seen: list[Observation] = field(default_factory=list)
    later: list[Observation] = field(default_factory=list)

    def watch(self, call: StepCall) -> tuple[list[float], tuple[int, ...]] | None:
        """Looks at a step; at the deciding one and the later ones, (B,) scores and the lanes spent on each image."""
        model, guard = self.model, self.guard
        if call.step in self.later_steps:
            self.later.append(look_again(call, model.prediction_type, predicted_image(self.seen)))
            return guard.detector.score(self.seen, self.later).tolist(), lanes_of(self.seen)
        if call.step not in self.steps:
            return None
        self.seen.append(observe(call, model.prediction_type))
        if call.step < self.steps[-1]:
            return None

        def ask(seen: Observation, rows: Sequence[int], question: Question) -> Observation:
            return probe(seen, call, model, rows, question)

        self.seen, scores = decide(guard.detector, self.seen, guard.questions, ask)
        return scores, lanes_of(self.seen)
