"""One guarded call, from its first latent to its records.

The host's loop runs unchanged. At its `callback_on_step_end` the session reads the step's UNet call, observes it, and
at the deciding step has flagged images resumed from a snapshot with a change, until one passes. State
lives here and not on the pipeline, so that two threads can share one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sd_guard.compiled import no_new_graphs
from sd_guard.detection import decide, is_settled, verdict_of
from sd_guard.guard import Guard, GuardRecord, StatisticValue
from sd_guard.lanes import Conditioning
from sd_guard.noise import NoiseLevel, early_steps, interpret, read_level
from sd_guard.observation import (
    STATISTICS,
    Observation,
    Question,
    lanes_of,
    look_again,
    observe_all,
    predicted_image,
    probe,
    read_values,
    with_control,
)
from sd_guard.pipelines.escalation import Escalation, Replacement
from sd_guard.pipelines.inputs import CallInputs, prediction_type
from sd_guard.pipelines.replay import Start, Walk, Watch, control_lanes, is_delayed
from sd_guard.pipelines.trajectory import denoiser_of
from sd_guard.policy import Case
from sd_guard.snapshots import copy_scheduler, generator_states, replace_images, select_images, share_noise
from sd_guard.statistics.base import StepCall
from sd_guard.statistics.sharpness import survival
from sd_guard.transfers import index_of


@dataclass(slots=True)
class Session:
    """State of one guarded call over B images."""

    guard: Guard
    inputs: CallInputs
    snapshots: dict[int, Start] = field(default_factory=dict)  # by step
    watch: Watch | None = None
    walk: Walk | None = None  # so far
    timesteps: Sequence[float] = ()
    level: NoiseLevel | None = None  # of the next step, where that is observed
    empty_embeds: Tensor | None = None
    cases: list[Case] = field(default_factory=list)
    calls: list[StepCall] = field(default_factory=list)  # of observed steps, not yet measured
    observations: list[Observation] = field(default_factory=list)
    control: Tensor | None = None  # predicted image of the deciding step without the prompt
    replaced: dict[int, Replacement] = field(default_factory=dict)  # in the host's loop, by row
    finished: list[Replacement] = field(default_factory=list)  # in a loop of their own
    escalation: Escalation | None = None
    sums: Tensor | None = None  # (B,) of the finished latents: not finite where one of their entries is not
    later: list[Observation] = field(default_factory=list)  # looks after the deciding one
    own_until: dict[int, int] = field(default_factory=dict)  # row -> the last step that its own trajectory is judged by
    replaced_at: dict[int, int] = field(default_factory=dict)  # row -> the step at whose end it was changed last

    def begin(self, pipe: Any, latents: Tensor) -> None:
        """Takes the snapshot that trajectories resume from: after the latents were drawn, before the first step."""
        self.timesteps = pipe.scheduler.timesteps.tolist()  # once: each on its own would be waited for
        guard, count, early = self.guard, len(self.timesteps), early_steps(pipe.scheduler, self.timesteps)
        seeds = [self.inputs.probe_seed_of(row) for row in range(latents.shape[0])]
        self.watch = Watch(
            self.timesteps, early.start, guard.steps(count, early), guard.later_steps(count, early), seeds
        )
        if not (self.inputs.guided and self.inputs.control_is_empty):
            self._empty()  # will be needed: where models take turns on the device, the text encoder's is now
        self._keep(pipe, 0, latents)
        self._read_level(pipe, 0)

    @property
    def looks(self) -> bool:
        """Whether a step is to come that anything is looked at."""
        return bool(self.snapshots)

    def before_step(self, pipe: Any, step: int, latents: Tensor) -> None:
        """Takes a snapshot where a step is looked at, of the latents as the caller's callback left them."""
        if self.watch is None or not self.looks or self.cases:
            return
        if step in (self.watch.clear, *self.watch.steps):
            self._keep(pipe, step, latents)

    def _keep(self, pipe: Any, step: int, latents: Tensor) -> None:
        states = generator_states(self.inputs.generator)
        self.snapshots[step] = Start(step, copy_scheduler(pipe.scheduler), latents, states)

    def on_step_end(self, pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        """Observes, and where it decides resolves; returns the tensors that the host's loop shall go on with."""
        count = len(self.timesteps)
        if pipe.do_classifier_free_guidance and not self.inputs.guided:
            raise ValueError("guidance was turned on in the middle of sampling: start with it, or disable_guard()")
        if self.looks and self.watch is not None:
            share_noise(self.snapshots[0].scheduler, pipe.scheduler)
            lanes = self._go_on(pipe, tensors)
            if self.level is not None:
                call = self._read_call(step, timestep, tensors, lanes, self.level)
                with no_new_graphs():
                    tensors = self._look(pipe, call, tensors)
                if step == self.watch.last:
                    self.snapshots, self.walk, self.escalation = {}, None, None  # the snapshots have served
        if step + 1 == count:
            tensors = self._deliver(tensors)
            self._verify(tensors["latents"])
            self.sums = tensors["latents"].sum((1, 2, 3), dtype=torch.float32)
        self._read_level(pipe, step + 1)
        return self._write_texts(tensors, step + 1, count)

    def _look(self, pipe: Any, call: StepCall, tensors: dict[str, Any]) -> dict[str, Any]:
        """Observes a step, and decides where that is its task."""
        assert self.watch is not None
        if call.step in self.watch.later_steps:
            return self._look_again(pipe, call, tensors)
        rows = tensors["latent_model_input"].shape[0]
        call = with_control(call, pipe.unet, rows)
        self.calls.append(call)
        if call.step < self.watch.steps[-1]:
            return tensors
        self._observe(pipe)
        return self._decide(pipe, call, tensors, rows)

    def _observe(self, pipe: Any) -> None:
        """Takes the statistics of all steps so far, which nobody needs before the deciding one."""
        self.observations, self.calls = observe_all(self.calls, prediction_type(pipe)), []

    def _go_on(self, pipe: Any, tensors: dict[str, Any]) -> Conditioning:
        """Remembers how the loop made this step, for a trajectory to be resumed; returns the step's lanes.

        A callback may change the guidance scale in the middle of sampling, or end guidance: then the lanes are fewer.
        """
        lanes = Conditioning(
            tensors["prompt_embeds"],
            tensors["timestep_cond"],
            tensors["added_cond_kwargs"],
            tensors["cross_attention_kwargs"],
        )
        guided = tensors["latent_model_input"].shape[0] > tensors["latents"].shape[0]
        before = self.walk or Walk(lanes, ())
        fewer = not guided and before.count > lanes.prompt_embeds.shape[0]
        scale = pipe.guidance_scale if guided else None
        self.walk = Walk(before.lanes if fewer else lanes, (*before.scales, scale))
        return lanes

    def _decide(self, pipe: Any, call: StepCall, tensors: dict[str, Any], rows: int) -> dict[str, Any]:
        """Scores all images, one host synchronisation where none is in doubt, and resolves the flagged ones.

        `rows` are those of the step's own UNet call.
        """
        assert self.watch is not None
        assert call.control is not None
        detector, policy = self.guard.detector, self.guard.policy
        watch = self.watch
        self.control = interpret(call.control, call.x, call.level, prediction_type(pipe)).x0_hat
        as_much = (2 if self.inputs.guided else 1) * len(pipe.scheduler.timesteps)
        budget = as_much if policy.budget is None else policy.budget

        def ask(seen: Observation, doubtful: Sequence[int], question: Question) -> Observation:
            return probe(seen, call, denoiser_of(pipe, watch.seeds, rows=rows), doubtful, question)

        self.observations, scores = decide(detector, self.observations, self.guard.questions, ask)
        for score, spent in zip(scores, lanes_of(self.observations), strict=True):
            self.cases.append(Case(verdict_of(score, detector.threshold), score, call.step, budget, lanes=spent))
        if not self.guard.look_at_all:
            self.own_until = {row: call.step for row, score in enumerate(scores) if is_settled(detector, score)}
        if len(self.own_until) == len(scores):
            self.watch = replace(watch, later_steps=())  # no look could change a verdict
        return self._resolve(pipe, call.step, tensors)

    def _look_again(self, pipe: Any, call: StepCall, tensors: dict[str, Any]) -> dict[str, Any]:
        """Scores once more: images that may yet be flagged, and flagged ones, among them those that were rescued."""
        assert self.control is not None
        detector = self.guard.detector
        pictures = predicted_image(self.observations).clone()
        for new in self.replaced.values():
            pictures[new.row] = predicted_image(new.resumed.observations)[new.index]
        look = look_again(call, prediction_type(pipe), pictures)
        self.later.append(look)
        for new in self.replaced.values():
            new.later.append(look.select([new.row]))
        rescues = [new for new in self.replaced.values() if self.cases[new.row].rescued]
        scores, judged = self._read(rescues)
        for row, score in enumerate(scores):
            if row not in self.own_until:
                self.cases[row].look_again(verdict_of(score, detector.threshold), score, call.step)
        for rescue, own in zip(rescues, judged, strict=True):
            tensors = self._follow(pipe, call.step, rescue, own, tensors)
        return self._resolve(pipe, call.step, tensors)

    def _read(self, rescues: Sequence[Replacement]) -> tuple[list[float], list[list[float]]]:
        """The scores of all B trajectories, and `Escalation.judge` of each rescued image: one host synchronisation."""
        told = [self.guard.detector.score(self.observations, self.later)]
        if self.escalation is not None:
            told += [self.escalation.judge(rescue) for rescue in rescues]
        values = torch.cat(told).tolist()
        return values[: len(self.cases)], [values[i : i + 3] for i in range(len(self.cases), len(values), 3)]

    def _follow(
        self, pipe: Any, step: int, rescue: Replacement, judged: Sequence[float], tensors: dict[str, Any]
    ) -> dict[str, Any]:
        """Reopens the case of a rescued image that a later look finds suspicious.

        One that passes, but is likely to end in the flagged picture, is sampled once more, from other noise.
        """
        score, near, survives = judged
        assert self.escalation is not None
        assert self.walk is not None
        detector, policy = self.guard.detector, self.guard.policy
        if not policy.accepts(score, detector.threshold, near):
            self.escalation.take_back(rescue, score, near)
        elif policy.may_relapse(survives, step / len(self.timesteps)):
            self.escalation.walk = self.walk
            again = self.escalation.draw_again(rescue)
            if again is not None:
                tensors = self._accept(pipe, step, again, tensors)
        return tensors

    def _resolve(self, pipe: Any, step: int, tensors: dict[str, Any]) -> dict[str, Any]:
        """Has the plan tried on every image that is flagged and not closed."""
        if not any(case.open for case in self.cases):
            return tensors
        assert self.watch is not None
        assert self.walk is not None
        assert self.control is not None
        if self.escalation is None:
            self.escalation = Escalation(
                pipe,
                self.guard,
                self.inputs,
                self.snapshots,
                self.watch,
                self.walk,
                self._empty(),
                self.cases,
                self.observations,
                self.control,
                self.replaced,
            )
        self.escalation.walk = self.walk
        for new in self.escalation.run():
            if new.change.own_loop:
                self.finished.append(new)
                self.replaced.pop(new.row, None)
                self.cases[new.row].relapsed = True  # until its image is in the place of the flagged one
            else:
                tensors = self._accept(pipe, step, new, tensors)
        return tensors

    def _accept(self, pipe: Any, step: int, new: Replacement, tensors: dict[str, Any]) -> dict[str, Any]:
        """Puts an image into the host's loop: its latents, its scheduler state, its text."""
        latents: Tensor = tensors["latents"]
        one = index_of([new.index], latents.device)
        row = index_of([new.row], latents.device)
        own = select_images(new.resumed.scheduler, one, new.resumed.latents)
        replace_images(pipe.scheduler, own, row, latents)
        tensors = {**tensors, "latents": latents.index_copy(0, row, new.resumed.latents[one])}
        self.replaced[new.row] = new
        self.cases[new.row].place()
        self.replaced_at[new.row] = step
        self.own_until.setdefault(new.row, step)
        return tensors

    def _write_texts(self, tensors: dict[str, Any], step: int, count: int) -> dict[str, Any]:
        """Gives replaced images their text for step `step`: the changed one, or none while guidance is delayed."""
        prompt_embeds: Tensor = tensors["prompt_embeds"]
        for new in self.replaced.values():
            if not is_delayed(new.change, (step - 1) / count) and step > self.replaced_at[new.row] + 1:
                continue  # it is in the loop already, and a caller's callback may have changed it since
            text = self._empty() if is_delayed(new.change, step / count) else new.change.prompt_embeds
            lane = index_of([prompt_embeds.shape[0] - len(self.cases) + new.row], prompt_embeds.device)
            prompt_embeds = prompt_embeds.index_copy(0, lane, text.to(prompt_embeds)[None])
        return {**tensors, "prompt_embeds": prompt_embeds}

    def _deliver(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Puts images that were sampled in a loop of their own into the place of the flagged ones."""
        latents: Tensor = tensors["latents"]
        for new in self.finished:
            row = index_of([new.row], latents.device)
            latents = latents.index_copy(0, row, new.resumed.latents)
            self.cases[new.row].place()
        return {**tensors, "latents": latents}

    def _verify(self, latents: Tensor) -> None:
        """Blocks rescued images that ended in the flagged picture after all; `latents` are the clean ones."""
        rows = [new.row for new in (*self.replaced.values(), *self.finished)]
        if not rows:
            return
        assert self.control is not None
        own = index_of(rows, latents.device)
        alike = survival(latents[own], predicted_image(self.observations)[own], self.control[own]).tolist()
        for row, value in zip(rows, alike, strict=True):
            self.cases[row].relapsed = not value <= self.guard.policy.max_resemblance

    def _read_call(
        self, step: int, timestep: Tensor, tensors: dict[str, Any], lanes: Conditioning, level: NoiseLevel
    ) -> StepCall:
        """The step's UNet call, as the host's loop made it."""
        images = tensors["latents"].shape[0]
        guided = tensors["latent_model_input"].shape[0] > images
        own_control = guided and self.inputs.control_is_empty
        return StepCall(
            step=step,
            timestep=timestep,
            level=level,
            # In memory of their own, as what `call_unet` returns: they are kept until the deciding step.
            x=tensors["latent_model_input"][:images].clone(),
            conditional=tensors["noise_pred_text" if guided else "noise_pred"].clone(),
            control=tensors["noise_pred_uncond"].clone() if own_control else None,
            lanes=lanes if own_control else control_lanes(lanes, images, self._empty()),
        )

    def _empty(self) -> Tensor:
        """(tokens, width) embedding of the empty prompt, encoded once and only where needed."""
        if self.empty_embeds is None:
            self.empty_embeds = self.inputs.encode([""])[0]
        return self.empty_embeds

    def _read_level(self, pipe: Any, step: int) -> None:
        """Reads the level that the host will make step `step` at, while the scheduler stands before it."""
        observed = self.watch is not None and step in (*self.watch.steps, *self.watch.later_steps)
        self.level = read_level(pipe.scheduler, self.timesteps[step]) if observed else None

    def records(self, pipe: Any, images: int) -> list[GuardRecord]:
        """One record an image, in the order of the batch."""
        if self.calls:  # sampling ended before the deciding step
            self._observe(pipe)
        values = read_values([*self.observations, *self.later])
        for case, total in zip(self.cases, self.sums.tolist() if self.sums is not None else (), strict=False):
            case.finish(finite=math.isfinite(total))
        spent = lanes_of(self.observations) or (0,) * images
        cases = self.cases or [Case("unscored", math.nan, 0, 0, lanes=lanes) for lanes in spent]
        digest = self.inputs.fingerprint().digest
        return [self._record(row, case, values, digest) for row, case in enumerate(cases)]

    def _record(
        self, row: int, case: Case, values: list[tuple[Observation, str, list[float]]], digest: str
    ) -> GuardRecord:
        reason = None
        if case.verdict == "unscored":
            reason = "the UNet's output was not finite" if self.cases else "sampling ended before the deciding step"
        return GuardRecord(
            verdict=case.verdict,
            outcome=case.outcome(self.guard.policy),
            score=case.score if reason is None else math.nan,
            decided_at_step=case.decided_at if reason is None else None,
            dimension=self.observations[0].dimension if self.observations else 0,
            statistics=tuple(
                StatisticValue(seen.step, name, *STATISTICS[name], own[row])
                for seen, name, own in values
                if seen.has(name, row) and seen.step <= self.own_until.get(row, seen.step)
            ),
            attempts=case.told(self.guard.policy),
            extra_lanes=case.lanes,
            seed=self.inputs.seed_of(row),
            fingerprint=digest,
            reason=reason,
        )
