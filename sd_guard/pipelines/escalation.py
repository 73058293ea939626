"""From a flag to an image that passed, or to the best that did not: proposals, resumed trajectories, verification."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sd_guard.detection import decide
from sd_guard.guard import Guard
from sd_guard.mitigation import Change, Subject
from sd_guard.mitigation.latents import other_noise
from sd_guard.observation import Observation, Question, predicted_image, probe
from sd_guard.pipelines.inputs import CallInputs
from sd_guard.pipelines.replay import Resumed, Start, Walk, Watch, resume
from sd_guard.pipelines.subject import Origin, token_encoder
from sd_guard.pipelines.trajectory import denoiser_of
from sd_guard.policy import Attempt, Case
from sd_guard.statistics.sharpness import resemblance, survival, what_is_left
from sd_guard.transfers import index_of, send


@dataclass(frozen=True, slots=True)
class Replacement:
    """An image for the place of a flagged one: its resumed trajectory passed, or where none did, came nearest to it.

    Attributes:
        row: of the batch.
        change: that was made.
        resumed: the trajectory, of `index`-th image.
        index: within `resumed`.
        later: its later looks, in `resumed` and in the host's loop.
    """

    row: int
    change: Change
    resumed: Resumed
    index: int
    later: list[Observation]


@dataclass(slots=True)
class Escalation:
    """The flagged images of one call, resolved together: a resumed sub-batch a round.

    Attributes:
        pipe: the pipeline.
        guard: settings.
        inputs: of the call.
        snapshots: of all B images, by step, the first step's among them.
        watch: of all B images.
        walk: of all B images, so far.
        empty_embeds: (tokens, width).
        cases: of all B images.
        observations: of all B images: the flagged trajectory. Its last prediction is what must not come back.
        control: (B, C, H, W) clean latents that the deciding step predicts without the prompt.
        proposals: what is left of each flagged image's plan, mitigation by mitigation.
        drawn_again: images that were sampled once more from other noise.
        seeds: of their mitigations' randomness, once read.
        replaced: what is in the host's loop in the place of flagged images, by row: the session's own.
        failed: each image's attempts that did not pass, where the best is to be kept.
    """

    pipe: Any
    guard: Guard
    inputs: CallInputs
    snapshots: Mapping[int, Start]
    watch: Watch
    walk: Walk
    empty_embeds: Tensor
    cases: Sequence[Case]
    observations: Sequence[Observation]
    control: Tensor
    replaced: Mapping[int, Replacement]
    proposals: dict[int, list[Iterator[Change]]] = field(default_factory=dict)
    drawn_again: set[int] = field(default_factory=set)
    seeds: dict[int, int] = field(default_factory=dict)
    failed: dict[int, list[tuple[Attempt, Replacement]]] = field(default_factory=dict)

    @property
    def cost(self) -> int:
        """Lanes an image of an attempt from the first clear step, probes apart."""
        clear = self.watch.clear
        return self.walk.cost(clear, len(self.walk.scales)) + self._controls(clear)

    def _cost_of(self, change: Change) -> int:
        """The same of this attempt."""
        start = self._start(change).step
        return self.walk.cost(start, self._until(change)) + self._controls(start, change)

    def _until(self, change: Change) -> int:
        """The step before which an attempt's own way ends: where the host's loop stands, or the end of sampling."""
        return self._steps if change.own_loop else len(self.walk.scales)

    @property
    def _steps(self) -> int:
        return len(self.snapshots[0].scheduler.timesteps)

    def _controls(self, start: int, change: Change | None = None) -> int:
        """Lanes an image that looking costs where the sampler evaluates no control."""
        own = self.inputs.control_is_empty and (change is None or change.anchor_embeds is None)
        return sum(not own or self.walk.scale(step) is None for step in self.watch.steps if step >= start)

    def _start(self, change: Change) -> Start:
        """The nearest snapshot that is not later than asked."""
        return self.snapshots[max(step for step in self.snapshots if step <= change.resume_from)]

    def run(self) -> list[Replacement]:
        """Tries the plan on every open case until it passes or nothing is left to try or to spend."""
        found: list[Replacement] = []
        while rows := [row for row, case in enumerate(self.cases) if case.open]:
            changes = {row: change for row in rows if (change := self._next(row)) is not None}
            found += [best for row in rows if row not in changes and (best := self._best(row)) is not None]
            for part in self._rounds(changes):
                found += self._attempt(part)
        return found

    def take_back(self, rescue: Replacement, score: float, resemblance: float) -> None:
        """Reopens the case of an image in the host's loop that no longer passes."""
        case = self.cases[rescue.row]
        case.reopen(score, resemblance)
        self._remember(case.attempts[-1], rescue)

    def _remember(self, attempt: Attempt, failed: Replacement) -> None:
        """Where the best of the attempts that failed is to be kept, how to go on with this one."""
        if self.guard.policy.on_failure == "keep":
            self.failed.setdefault(failed.row, []).append((attempt, failed))

    def _best(self, row: int) -> Replacement | None:
        """Where none passed, the image of the attempt that came nearest to it; None if it is where it shall be."""
        case, policy, threshold = self.cases[row], self.guard.policy, self.guard.detector.threshold

        def order(each: tuple[Attempt, Replacement]) -> tuple[tuple[bool, float], float]:
            attempt = each[0]
            return policy.excess(attempt.score, threshold, attempt.resemblance), attempt.score

        for attempt, failed in sorted(self.failed.pop(row, ()), key=order):
            score, near, until = attempt.score, attempt.resemblance, self._until(failed.change)
            if failed is self.replaced.get(row):
                case.keep(attempt, score, near)
                return None
            resumed = failed.resumed.select(failed.index, self.walk)
            if case.lanes + self.walk.cost(resumed.step, until) > case.budget:
                continue
            self._go_on([row], resumed, until, 0)
            if len(resumed.later) > len(failed.resumed.later):
                score, _, near = self._compare([row], resumed)[0]
            if math.isfinite(score):
                case.keep(attempt, score, near)
                return replace(failed, resumed=resumed, index=0)
        return None

    def draw_again(self, rescue: Replacement) -> Replacement | None:
        """The same change from other noise, up to where the loop stands, if less of the flagged picture is left then.

        What is left once the words are rid of the memory is the place and the colours that the noise had led to: other
        noise keeps the meaning, and a further change of the words would not. Where the words are the same, the memory
        is still in them. An image gets one such attempt.
        """
        row, case, old = rescue.row, self.cases[rescue.row], rescue.change
        if row in self.drawn_again or old.prompt is None or old.latents is not None:
            return None
        name, noise = f"{old.mitigation}+new_seed", other_noise(self._subject(row))
        change = replace(old, mitigation=name, latents=noise, other_noise=True, resume_from=0)
        if not case.affords(self.guard.policy, self._cost_of(change)):
            return None
        self.drawn_again.add(row)
        found = self._attempt({row: change})
        before, again = case.attempts[-2:]
        better = False
        if found:
            as_before, now = torch.cat([self.survival_of(rescue), self.survival_of(found[0])]).tolist()
            better = not as_before <= now
        case.prefer(*((again, before) if better else (before, again)))
        if found:
            self._remember(case.attempts[-2], rescue if better else found[0])
        return found[0] if better else None

    def judge(self, rescue: Replacement) -> Tensor:
        """(3,) of a rescued image at its last look: score, what is left of the flagged picture, and its survival."""
        seen = [seen.select([rescue.index]) for seen in rescue.resumed.observations]
        left = self.left_of([rescue.row], [rescue.change], predicted_image(rescue.later))
        return torch.cat([self.guard.detector.score(seen, rescue.later), left, self.survival_of(rescue)])

    def survival_of(self, rescue: Replacement) -> Tensor:
        """(1,) how much of the flagged picture its last look shows."""
        now, row = predicted_image(rescue.later), slice(rescue.row, rescue.row + 1)
        return survival(now, predicted_image(self.observations)[row], self.control[row])

    def _next(self, row: int) -> Change | None:
        """The next change that the image can still afford; closes its case where there is none.

        A mitigation whose next change is too dear has ended: what comes after it may cost less. So has one that comes
        back to a prompt that was tried, as a wider search does where a narrower one had found all there is.
        """
        case, policy = self.cases[row], self.guard.policy
        left = self.proposals.setdefault(row, self._propose(row))
        while left and case.may_attempt(policy, self.cost):
            change = self._placed(next(left[0], None), case)
            if change is not None and not _was_tried(change, case) and case.may_attempt(policy, self._cost_of(change)):
                return change
            del left[0]
        case.close()
        return None

    def _placed(self, change: Change | None, case: Case) -> Change | None:
        """The change, resumed no earlier than its image's trajectory shows anything.

        Where an attempt left too much of the flagged picture, more of the trajectory has to be other: then from where
        the change asks for, if that can be afforded.
        """
        if change is None or change.latents is not None:
            return change
        policy = self.guard.policy
        clings = any(attempt.resemblance > policy.max_resemblance for attempt in case.attempts)
        if clings and case.may_attempt(policy, self._cost_of(change)):
            return change
        return replace(change, resume_from=max(change.resume_from, self.watch.clear))

    def _rounds(self, changes: dict[int, Change]) -> list[dict[int, Change]]:
        """The changes that are tried together: those in the host's loop that resume from one step."""
        deciding = len(self.walk.scales) == self.watch.steps[-1] + 1
        alone: list[dict[int, Change]] = []
        together: dict[int, dict[int, Change]] = {}
        for row, change in changes.items():
            # Long after the deciding step, an attempt that fails there is not worth the rest of its way.
            if change.own_loop or not deciding:
                alone.append({row: change})
            else:
                together.setdefault(self._start(change).step, {})[row] = change
        return [*together.values(), *alone]

    def _attempt(self, changes: dict[int, Change]) -> list[Replacement]:
        """Samples these images again, each with its change, as far as they stand the looks."""
        rows, policy, detector = list(changes), self.guard.policy, self.guard.detector
        first = next(iter(changes.values()))
        start, until = self._start(first), self._until(first)
        resumed = resume(
            self.pipe,
            self.inputs,
            start,
            self.watch,
            rows,
            self.walk,
            list(changes.values()),
            self.empty_embeds,
            self.observations,
        )
        self._go_on(rows, resumed, self.watch.steps[-1] + 1, self._controls(start.step, first))
        rest = self.walk.cost(resumed.step, until)
        resumed.observations, scores = decide(
            detector, resumed.observations, self.guard.questions, partial(self._probe, rows, resumed, rest)
        )
        resumed.last = None  # has served
        seen = self._compare(rows, resumed, scores)
        looks = [step + 1 for step in self.watch.later_steps if step + 1 < until]
        for stop in (*looks, until):  # what passes a look goes on to the next
            if resumed.step < stop and all(policy.accepts(*look) for look in seen):
                self._go_on(rows, resumed, stop, 0)
                seen = self._compare(rows, resumed)
        rescued: list[Replacement] = []
        for index, (row, change, look) in enumerate(zip(rows, changes.values(), seen, strict=True)):
            passed = policy.accepts(*look)
            score, near = look[0], look[2]
            attempt = Attempt(change.mitigation, change.strength, start.step, score, near, passed, change.prompt)
            self.cases[row].close(attempt)
            found = Replacement(row, change, resumed, index, [look.select([index]) for look in resumed.later])
            if passed:
                rescued.append(found)
            elif math.isfinite(score):
                self._remember(attempt, found)
        return rescued

    def _go_on(self, rows: list[int], resumed: Resumed, until: int, controls: int) -> None:
        """Makes the steps before `until`, and bills them."""
        for row in rows:
            self.cases[row].lanes += self.walk.cost(resumed.step, until) + controls
        resumed.go_on(until)

    def _compare(
        self, rows: list[int], resumed: Resumed, scores: Sequence[float] | None = None
    ) -> list[tuple[float, float, float]]:
        """What the policy accepts by: score, threshold, and what is left of the flagged picture, of each image.

        Scores that were not read yet are read with the rest: one host synchronisation.
        """
        now, detector = predicted_image([*resumed.observations, *resumed.later]), self.guard.detector
        left = self.left_of(rows, resumed.changes, now)
        if scores is None:
            both = torch.stack([detector.score(resumed.observations, resumed.later), left]).tolist()
        else:
            both = scores, left.tolist()
        return [(score, detector.threshold, near) for score, near in zip(*both, strict=True)]

    def left_of(self, rows: Sequence[int], changes: Sequence[Change], now: Tensor) -> Tensor:
        """(F,) what (F, C, H, W) predicted pictures have left of the flagged ones.

        One that came from other noise has not that in common with the flagged one which the control has anyway.
        """
        own = index_of(rows, now.device)
        memory, control = predicted_image(self.observations)[own], self.control[own]
        other = send(torch.tensor([change.other_noise for change in changes]), now.device)
        return resemblance(now, memory).where(other, what_is_left(now, memory, control))

    def _probe(
        self,
        rows: list[int],
        resumed: Resumed,
        rest: int,
        seen: Observation,
        doubtful: Sequence[int],
        question: Question,
    ) -> Observation:
        """Asks about those of the resumed images in doubt that can still afford it, and the `rest` of their way."""
        assert resumed.last is not None
        cases = {index: self.cases[rows[index]] for index in doubtful}
        able = [index for index, case in cases.items() if case.lanes + rest + question.lanes <= case.budget]
        if not able:
            return seen
        for index in able:
            cases[index].lanes += question.lanes
        model = denoiser_of(self.pipe, resumed.watch.seeds, rows=resumed.rows)
        return probe(seen, resumed.last, model, able, question)

    def _seed(self, row: int) -> int:
        """Of a mitigation's randomness. Without a generator of its own, what tells an image is its first latent."""
        if row not in self.seeds:
            seed = self.watch.seeds[row]
            if not isinstance(self.inputs.generator, list):
                seed += zlib.crc32(self.snapshots[0].latents[row].float().cpu().numpy().tobytes())
            self.seeds[row] = seed % 2**63
        return self.seeds[row]

    def _propose(self, row: int) -> list[Iterator[Change]]:
        subject = self._subject(row)
        return [mitigation.propose(subject) for mitigation in self.guard.plan]

    def _subject(self, row: int) -> Subject:
        case, lane = self.cases[row], self.walk.count - len(self.cases) + row
        one = index_of([lane], self.control.device)
        origin = Origin(self.pipe, self.snapshots, self.watch, self.walk.lanes.select(one), row, case)
        encoder, prompt = self.pipe.text_encoder, self.inputs.prompts[row] if self.inputs.prompts is not None else None
        return Subject(
            prompt=prompt,
            prompt_embeds=self.walk.lanes.prompt_embeds[lane],
            empty_embeds=self.empty_embeds,
            seed=self._seed(row),
            encode=self.inputs.encode,
            predict=origin.predict,
            lanes_left=lambda: case.budget - case.lanes - self.cost,
            latents=origin.latents,
            control=self.control[row],
            denoise=origin.denoise,
            bill=origin.bill,
            guidance_scale=self.walk.scale(0),
            steps=self._steps,
            resumable=sorted(self.snapshots),
            level=origin.level,
            renoise=origin.renoise,
            tokenizer=self.pipe.tokenizer,
            token_embeddings=None if encoder is None else encoder.get_input_embeddings().weight,
            encode_tokens=token_encoder(self.pipe, self.inputs.encode, prompt),
        )


def _was_tried(change: Change, case: Case) -> bool:
    """Whether an attempt before had this prompt from the same mitigation."""
    tried = [(attempt.mitigation, attempt.prompt) for attempt in case.attempts]
    return change.prompt is not None and (change.mitigation, change.prompt) in tried
