"""From a flag to an image that passed, or to none: proposals, resumed trajectories, verification."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Escalation:
    """The flagged images of one call, resolved together: a resumed sub-batch a round.

    Attributes:
        pipe: the pipeline.
        guard: settings.
        inputs: of the call.
        start: of all B images.
        watch: of all B images.
        walk: of all B images.
        empty_embeds: (tokens, width).
        cases: of all B images.
        memory: (B, C, H, W) predicted images of the flagged trajectory: what must not come back.
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

    @property
    def cost(self) -> int:
        """Lanes an image of one attempt, probes apart."""
        controls = 0 if self.inputs.control_is_empty and self.inputs.guided else len(self.watch.steps)
        return self.walk.cost(controls)

    def run(self) -> list[Rescue]:
        """Tries the plan on every flagged image until it passes or nothing is left to try or to spend."""
        open_rows = {row: self._propose(row) for row, case in enumerate(self.cases) if case.verdict == "flag"}
        rescued: list[Rescue] = []
        while open_rows:
            changes = {row: change for row in open_rows if (change := self._next(row, open_rows[row])) is not None}
            if changes:
                rescued += self._attempt(changes)
            open_rows = {row: proposals for row, proposals in open_rows.items() if not self.cases[row].closed}
        return rescued

    def _next(self, row: int, proposals: Iterator[Change]) -> Change | None:
        """The next change that the image can still afford; closes its case where there is none."""
        case, policy = self.cases[row], self.guard.policy
        change = next(proposals, None) if case.may_attempt(policy, self.cost) else None
        if change is None or not case.may_attempt(policy, self.cost):
            case.close()
            return None
        return change

    def _attempt(self, changes: dict[int, Change]) -> list[Rescue]:
        rows = list(changes)
        resumed = resume(
            self.pipe,
            self.inputs,
            self.start,
            self.watch,
            rows,
            self.walk,
            list(changes.values()),
            self.empty_embeds,
        )
        threshold, policy = self.guard.detector.threshold, self.guard.policy
        for row in rows:
            self.cases[row].lanes += self.cost
        seen, scores = decide(self.guard.detector, resumed.observations, partial(self._probe, rows, resumed))
        alike: list[float] = resemblance(predicted_image(seen), self.memory[rows]).tolist()
        rescued: list[Rescue] = []
        for index, row in enumerate(rows):
            change, case, score, near = changes[row], self.cases[row], scores[index], alike[index]
            passed = policy.accepts(score, threshold, near)
            case.close(Attempt(change.mitigation, change.strength, 0, score, near, passed, change.prompt))
            if passed:
                rescued.append(Rescue(row, change, resumed, index))
        return rescued

    def _probe(self, rows: list[int], resumed: Resumed, doubtful: Sequence[int]) -> Observation:
        """Probes those of the resumed images in doubt that can still afford it."""
        watch, seen = self.watch.select(rows), resumed.observations[-1]
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
