"""From a flag to an image that passed, or to none: proposals, resumed trajectories, verification."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sd_guard.detection import decide
from sd_guard.guard import Guard
from sd_guard.lanes import evaluate_lanes
from sd_guard.mitigation import Change, Subject
from sd_guard.noise import interpret, read_level
from sd_guard.observation import Observation, predicted_image, probe
from sd_guard.pipelines.inputs import CallInputs, prediction_type
from sd_guard.pipelines.replay import Resumed, Start, Walk, Watch, resume
from sd_guard.policy import Attempt, Case
from sd_guard.snapshots import copy_scheduler
from sd_guard.statistics.sharpness import resemblance

_SEARCH_BATCH = 16  # lanes a call of a search at least may hold, however small the batch is


@dataclass(frozen=True, slots=True)
class Rescue:
    """An image whose resumed trajectory passed.

    Attributes:
        row: of the batch.
        change: that did it.
        resumed: the trajectory, of `index`-th image.
        index: within `resumed`.
    """

    row: int
    change: Change
    resumed: Resumed
    index: int


@dataclass(slots=True)
class Escalation:
    """The flagged images of one call, resolved together: a resumed sub-batch a round.

    Attributes:
        pipe: the pipeline.
        guard: settings.
        inputs: of the call.
        start: of all B images.
        watch: of all B images.
        walk: of all B images, so far.
        empty_embeds: (tokens, width).
        cases: of all B images.
        memory: (B, C, H, W) predicted images of the flagged trajectory: what must not come back.
        proposals: what is left of each flagged image's plan.
    """

    pipe: Any
    guard: Guard
    inputs: CallInputs
    start: Start
    watch: Watch
    walk: Walk
    empty_embeds: Tensor
    cases: Sequence[Case]
    memory: Tensor
    proposals: dict[int, Iterator[Change]] = field(default_factory=dict)

    @property
    def cost(self) -> int:
        """Lanes an image of one attempt, probes apart."""
        return self.walk.cost(0, len(self.walk.scales)) + self._controls

    @property
    def _controls(self) -> int:
        return 0 if self.inputs.control_is_empty and self.inputs.guided else len(self.watch.steps)

    def run(self) -> list[Rescue]:
        """Tries the plan on every open case until it passes or nothing is left to try or to spend."""
        rescued: list[Rescue] = []
        deciding = len(self.walk.scales) == self.watch.steps[-1] + 1
        while rows := [row for row, case in enumerate(self.cases) if case.open]:
            changes = {row: change for row in rows if (change := self._next(row)) is not None}
            # Long after the deciding step, an attempt that fails there is not worth the rest of its way.
            rounds = [changes] if deciding else [{row: change} for row, change in changes.items()]
            for part in rounds:
                rescued += self._attempt(part) if part else []
        return rescued

    def _next(self, row: int) -> Change | None:
        """The next change that the image can still afford; closes its case where there is none."""
        case, policy = self.cases[row], self.guard.policy
        proposals = self.proposals.setdefault(row, self._propose(row))
        change = next(proposals, None) if case.may_attempt(policy, self.cost) else None
        if change is None or not case.may_attempt(policy, self.cost):
            case.close()
            return None
        return change

    def _attempt(self, changes: dict[int, Change]) -> list[Rescue]:
        """Samples these images again, each with its change, as far as they stand the looks."""
        rows, policy, detector = list(changes), self.guard.policy, self.guard.detector
        resumed = resume(
            self.pipe, self.inputs, self.start, self.watch, rows, self.walk, list(changes.values()), self.empty_embeds
        )
        self._go_on(rows, resumed, self.watch.steps[-1] + 1, self._controls)
        resumed.observations, scores = decide(detector, resumed.observations, partial(self._probe, rows, resumed))
        seen = self._compare(rows, resumed, scores)
        if resumed.step < len(self.walk.scales) and all(policy.accepts(*look) for look in seen):
            self._go_on(rows, resumed, len(self.walk.scales), 0)
            seen = self._compare(rows, resumed, detector.score(resumed.observations, resumed.later).tolist())
        rescued: list[Rescue] = []
        for index, (row, change, look) in enumerate(zip(rows, changes.values(), seen, strict=True)):
            passed = policy.accepts(*look)
            score, near = look[0], look[2]
            attempt = Attempt(change.mitigation, change.strength, 0, score, near, passed, change.prompt)
            self.cases[row].close(attempt)
            if passed:
                rescued.append(Rescue(row, change, resumed, index))
        return rescued

    def _go_on(self, rows: list[int], resumed: Resumed, until: int, controls: int) -> None:
        """Makes the steps before `until`, and bills them."""
        for row in rows:
            self.cases[row].lanes += self.walk.cost(resumed.step, until) + controls
        resumed.go_on(until)

    def _compare(self, rows: list[int], resumed: Resumed, scores: list[float]) -> list[tuple[float, float, float]]:
        """What the policy accepts by: score, threshold, and resemblance to the flagged picture, of each image."""
        looks = [resumed.later] if resumed.later else resumed.observations
        alike = resemblance(predicted_image(looks), self.memory[rows]).tolist()
        return [(score, self.guard.detector.threshold, near) for score, near in zip(scores, alike, strict=True)]

    def _probe(self, rows: list[int], resumed: Resumed, doubtful: Sequence[int]) -> Observation:
        """Probes those of the resumed images in doubt that can still afford it."""
        assert resumed.last is not None
        watch, seen = resumed.watch, resumed.observations[-1]
        cases = {index: self.cases[rows[index]] for index in doubtful}
        able = [index for index, case in cases.items() if case.lanes + 2 * watch.probes <= case.budget]
        if not able or not watch.probes:
            return seen
        for index in able:
            cases[index].lanes += 2 * watch.probes
        kind = prediction_type(self.pipe)
        return probe(seen, resumed.last, self.pipe.unet, kind, able, probes=watch.probes, seeds=watch.seeds)

    def _propose(self, row: int) -> Iterator[Change]:
        case, lane = self.cases[row], self.walk.count - len(self.cases) + row
        search = _FirstStep(self, row, lane)
        subject = Subject(
            prompt=self.inputs.prompts[row] if self.inputs.prompts is not None else None,
            prompt_embeds=self.walk.lanes.prompt_embeds[lane],
            empty_embeds=self.empty_embeds,
            seed=self.watch.seeds[row] % 2**63,
            encode=self.inputs.encode,
            predict=search.predict,
            lanes_left=lambda: case.budget - case.lanes - self.cost,
        )
        for mitigation in self.guard.plan:
            yield from mitigation.propose(subject)


@dataclass(slots=True)
class _FirstStep:
    """Predicted images of prompts at the first step of the image's own trajectory: one lane a prompt."""

    escalation: Escalation
    row: int
    lane: int

    @torch.no_grad()
    def predict(self, embeds: Tensor) -> Tensor:
        """(N, tokens, width) to (N, C, H, W) predicted clean latents; spends N lanes."""
        this = self.escalation
        scheduler, latents = copy_scheduler(this.start.scheduler), this.start.latents
        timestep = scheduler.timesteps[0]
        x = scheduler.scale_model_input(latents[self.row : self.row + 1], timestep)
        level = read_level(scheduler, timestep)
        predictions: list[Tensor] = []
        for part in embeds.split(max(_SEARCH_BATCH, 2 * latents.shape[0])):
            one = torch.full((len(part),), self.lane, device=latents.device)
            lanes = this.walk.lanes.select(one).with_prompt(part.to(this.walk.lanes.prompt_embeds))
            points = x.expand(len(part), -1, -1, -1)
            output = evaluate_lanes(this.pipe.unet, points, timestep, lanes)
            predictions.append(interpret(output, points, level, prediction_type(this.pipe)).x0_hat)
        this.cases[self.row].lanes += len(embeds)
        return torch.cat(predictions)
