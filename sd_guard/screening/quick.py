"""Quick depth: a score from one early noise level, without sampling, autoencoder or image.

A seed's *control* depends on no prompt: its first latent, the latent at the observed level on the way that the empty
prompt takes (guidance adds nothing to it there), what the UNet says of it without a prompt, the probes with their LID,
and the other seeds' latents, on that way likewise. It is computed once a seed. A prompt then costs one lane, and where
the detector is in doubt one more a probe and another seed.

The level is reached from the first latent by a single deterministic step: at these noise levels that loses nothing
against a fine schedule. `benchmarks/quick.py` measures this, and what else was tried.

Scores are the detector's, on a scale of their own: all prompts of a seed share its control, whose detail then tells no
prompt from another, but seeds apart. So `added_detail` is relative to what the controls of a few fixed seeds have on
average, and doubt begins at a value of its own. It refuses a calibration of full depth; a
`Calibrator` makes one from `QuickScreener.measure`, best at the seeds to be screened.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sd_guard.calibration import Calibration
from sd_guard.detection import PrematureDetail, Verdict, decide, verdict_of
from sd_guard.fingerprint import Fingerprint, take_fingerprint
from sd_guard.guard import Guard, GuardRecord, StatisticValue
from sd_guard.lanes import Conditioning, evaluate_lanes
from sd_guard.noise import early_steps, interpret, read_level
from sd_guard.observation import (
    STATISTICS,
    Observation,
    Question,
    add_probed,
    mean_agreement,
    observe,
    read_values,
)
from sd_guard.pipelines.ahead import take_turns
from sd_guard.pipelines.inputs import prediction_type
from sd_guard.policy import Outcome
from sd_guard.screening.control import Control, Place
from sd_guard.screening.encoding import Encoder, Texts
from sd_guard.screening.jobs import Job
from sd_guard.screening.records import record_row
from sd_guard.screening.screener import Screened
from sd_guard.screening.settings import ModelSettings
from sd_guard.snapshots import copy_scheduler
from sd_guard.statistics.base import StepCall
from sd_guard.statistics.lid import probe_products, trajectory_lid
from sd_guard.statistics.seed_agreement import excess_agreement, other_noise, other_places, step_down
from sd_guard.statistics.sharpness import FAINTEST_CONTROL, detail
from sd_guard.trace import FiniteDifference, draw_row_probes, perturb
from sd_guard.transfers import index_of, send

# Chosen on `tune` rows: the level on the first reference, by AUROC and lanes; that a LID probe adds nothing to what
# another seed says, on six, each prompt at six seeds; that a second seed does, on seven, at four.
QUICK: Final = Guard(
    observe_at=(0.06,),
    look_again_at=(),
    probes=0,
    other_seeds=2,
    detector=PrematureDetail(doubt=-0.5),
)
FLAGGED: Final = "flagged"  # outcome of a row that was flagged and, without an image, neither mitigated nor blocked
KEPT_SEEDS: Final = 8  # whose controls are kept from one batch to the next
GROUND_SEEDS: Final = range(8)  # whose controls tell how much detail this model shows without a prompt
_OUTCOMES: Final[dict[Verdict, Outcome]] = {"pass": "passed", "flag": "kept", "unscored": "unscored"}


@dataclass(frozen=True, slots=True)
class QuickScreener:
    """Scores batches by the first steps alone; `make` makes one.

    A row depends on its prompt, its seed and the configuration only. Every UNet call has `batch_size` lanes, the last
    of a batch being filled up, so that on one machine a row has the same bits whatever is screened beside it; with
    another `batch_size` it may differ by the rounding of the UNet's dtype. `extra_lanes` of a row are all lanes
    evaluated for its prompt; those of its seed's control serve every prompt, and are not counted.

    Attributes:
        pipe: A `GuardedStableDiffusionPipeline`; only its UNet and text encoder are used.
        guard: Where to look, how to decide, probes, other seeds.
        fingerprint: Of the configuration.
        scheduler: A copy of the pipeline's, on the schedule of full depth.
        first: The first step.
        observed: The observed ones, ascending.
        other_places: Where other seeds begin, and where they are looked at.
        noise_shape: C, H, W of a latent.
        batch_size: Lanes of a UNet call, >= 1.
        empty: (1, tokens, width) embedding of the empty prompt.
        encoder: Of the others.
        ground: Observed step to the mean detail of the controls of `GROUND_SEEDS`, a scalar tensor; measured with the
            first batch, so that a model that fails there fails as on any batch.
        cache: Seed to its control, the latest used last.
    """

    pipe: Any
    guard: Guard
    fingerprint: Fingerprint
    scheduler: Any
    first: Place
    observed: Sequence[Place]
    other_places: tuple[Place, Place]
    noise_shape: tuple[int, int, int]
    batch_size: int
    empty: Tensor
    encoder: Encoder
    ground: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    cache: OrderedDict[int, Control] = field(default_factory=OrderedDict[int, Control])

    @classmethod
    def make(
        cls,
        pipe: Any,
        model: ModelSettings,
        *,
        batch_size: int = 64,
        guard: Guard = QUICK,
        calibration: Calibration | None = None,
    ) -> QuickScreener:
        """Prepares the schedule.

        Args:
            pipe: A guarded pipeline.
            model: `steps`, `height` and `width` decide the schedule and the latents; there is no guidance.
            batch_size: Lanes of a UNet call, >= 1.
            guard: Its `observe_at`, `probes`, `other_seeds`, `detector` and `seed` are used.
            calibration: Of quick depth, whose threshold replaces the guard's.

        Raises:
            ValueError: A calibration of another configuration, or of full depth; a model that was distilled for
                guidance, which says nothing without it.
        """
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise ValueError(f"{model.model}: was distilled for guidance, and quick depth has none; use --depth full")
        taken = take_fingerprint(pipe, steps=model.steps, guidance_scale=0.0, height=model.height, width=model.width)
        fingerprint = replace(taken, guidance="none, quick depth")
        if calibration is not None:
            calibration.check(fingerprint)
            guard = calibration.apply(guard)
        guard = replace(guard, look_again_at=())
        scheduler, device = copy_scheduler(pipe.scheduler), pipe._execution_device
        scheduler.set_timesteps(model.steps, device=device)
        timesteps, early = scheduler.timesteps, early_steps(scheduler, scheduler.timesteps.tolist())
        first, *observed = (
            Place(step, timesteps[step], read_level(scheduler, timesteps[step]))
            for step in (0, *guard.steps(len(timesteps), early))
        )
        begin, seen = (
            Place(-1, torch.tensor(timestep, device=device, dtype=timesteps.dtype), level)
            for timestep, level in other_places(scheduler.alphas_cumprod)
        )
        places, encoder = (begin, seen), Encoder(pipe, batch_size, device)
        with torch.no_grad():
            empty = pipe.encode_prompt([""], device, 1, False)[0]
        shape = (pipe.unet.config.in_channels, *_latent_size(pipe, model))
        return cls(pipe, guard, fingerprint, scheduler, first, observed, places, shape, batch_size, empty, encoder)

    @property
    def threshold(self) -> float | None:
        """The detector's."""
        return self.guard.detector.threshold

    def expect(self, jobs: Sequence[Job]) -> None:
        """Begins with the texts of a batch that is likely to come next."""
        self.encoder.expect([job.prompt for job in jobs])

    def screen(self, jobs: Sequence[Job]) -> Screened:
        """Rows without images. Larger batches share more: rows in doubt are probed together."""
        records = self.measure([job.prompt for job in jobs], [job.seed for job in jobs])
        rows = [
            record_row(record, prompt=job.prompt, family=job.family, seed=job.seed, index=job.index)
            for job, record in zip(jobs, records, strict=True)
        ]
        for row in rows:
            if row["flagged"]:
                row["outcome"] = FLAGGED
        return Screened(rows)

    def measure(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[GuardRecord]:
        """Scores N prompts, each at a seed in [0, 2**63); the outcome of a flagged one is `kept`."""
        # Weights that accelerate moved in inference mode could never be differentiated through again.
        moved = take_turns(self.pipe.unet, self.pipe.text_encoder)
        with torch.no_grad() if moved else torch.inference_mode():
            return self._measure(prompts, seeds)

    def _measure(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[GuardRecord]:
        if not self.ground:
            self.ground.update(self._measure_ground())
        seeds_once = {seed: place for place, seed in enumerate(dict.fromkeys(seeds))}
        own = index_of([seeds_once[seed] for seed in seeds], self.empty.device)
        control = self._controls(list(seeds_once)).select(own)
        coming = self.encoder.encode(prompts)
        try:
            outputs = [self._evaluate(control.x[:, k], place, coming) for k, place in enumerate(self.observed)]
            texts = coming.first(len(prompts))
        finally:
            coming.cancel()
        lanes = Conditioning(torch.cat([self.empty.expand_as(texts), texts]))
        calls = [
            StepCall(
                step=place.step,
                timestep=place.timestep,
                level=place.level,
                x=control.x[:, k],
                conditional=outputs[k],
                control=control.output[:, k],
                lanes=lanes,
                spent=1,
            )
            for k, place in enumerate(self.observed)
        ]
        free = [self._observe(call) for call in calls]

        def ask(seen: Observation, rows: Sequence[int], question: Question) -> Observation:
            return self._probe(seen, calls[-1], control, seeds, rows, question)

        seen, scores = decide(self.guard.detector, free, self.guard.questions, ask)
        return self._records(seen, scores, seeds)

    def _controls(self, seeds: Sequence[int]) -> Control:
        """Of these seeds, each once; evaluates those that are not kept."""
        missing = [seed for seed in seeds if seed not in self.cache]
        if missing:
            fresh = self._evaluate_controls(missing)
            self.cache.update((seed, fresh.select(index_of([row], fresh.x.device))) for row, seed in enumerate(missing))
        joined = Control.join([self.cache[seed] for seed in seeds])
        for seed in seeds:
            self.cache.move_to_end(seed)
        while len(self.cache) > KEPT_SEEDS:
            self.cache.popitem(last=False)
        return joined

    def _measure_ground(self) -> dict[int, Tensor]:
        """At each observed step, over the seeds whose control is finite."""
        control, kind = self._controls(list(GROUND_SEEDS)), prediction_type(self.pipe)
        details = {
            place.step: detail(interpret(control.output[:, k], control.x[:, k], place.level, kind).x0_hat)
            for k, place in enumerate(self.observed)
        }
        return {step: each[each.isfinite()].clamp(min=FAINTEST_CONTROL).mean() for step, each in details.items()}

    def _evaluate_controls(self, seeds: Sequence[int]) -> Control:
        texts, inputs = self.empty.expand(len(seeds), -1, -1), self._walk(seeds)
        outputs = [self._evaluate(x, place, texts) for x, place in zip(inputs, self.observed, strict=True)]
        x = inputs[-1]
        lid = self._lid(x, outputs[-1], texts, seeds) if self.guard.probes else x.new_zeros(len(seeds))
        first, seen = self.other_places
        others = [
            self._step_down(other_noise(self._probe_seeds(seeds), x, number), first, [seen])[0]
            for number in range(self.guard.other_seeds)
        ]
        return Control(
            torch.stack(inputs, 1),
            torch.stack(outputs, 1),
            lid,
            torch.stack(others, 1) if others else x.new_zeros(len(x), 0, *self.noise_shape),
        )

    def _walk(self, seeds: Sequence[int]) -> list[Tensor]:
        """The UNet's input without a prompt, (S, C, H, W), at each observed step: one step from the first."""
        start, later = self._first_inputs(seeds), [place for place in self.observed if place.step > 0]
        stepped = self._step_down(start, self.first, later)
        return stepped if len(later) == len(self.observed) else [start, *stepped]

    def _step_down(self, x: Tensor, place: Place, to: Sequence[Place]) -> list[Tensor]:
        """The UNet's inputs without a prompt, (S, C, H, W), at lower places: one step to each."""
        output = self._evaluate(x, place, self.empty.expand(len(x), -1, -1))
        ahead = interpret(output, x, place.level, prediction_type(self.pipe))
        return [step_down(ahead, lower.level).to(x) for lower in to]

    def _probe_seeds(self, seeds: Sequence[int]) -> list[int]:
        """Of probes and other seeds: as `CallInputs.probe_seed_of` mixes them."""
        return [(seed + 0x9E3779B97F4A7C15 * (self.guard.seed + 1)) % 2**64 for seed in seeds]

    def _first_inputs(self, seeds: Sequence[int]) -> Tensor:
        """(S, C, H, W) what the UNet is given at the first step: the latents that full depth starts from."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        device, dtype = self.empty.device, self.empty.dtype
        shape, here = (len(seeds), *self.noise_shape), torch.device("cpu")
        noise = send(randn_tensor(shape, generator=generators, device=here, dtype=dtype), device)
        return self.scheduler.scale_model_input(noise * self.scheduler.init_noise_sigma, self.first.timestep)

    def _observe(self, call: StepCall) -> Observation:
        """The free statistics, with the detail that the prompt adds relative to `ground`."""
        kind = prediction_type(self.pipe)
        seen = observe(call, kind)
        assert call.control is not None
        own = detail(interpret(call.control, call.x, call.level, kind).x0_hat).clamp(min=FAINTEST_CONTROL)
        added = seen.values["added_detail"] + (own / self.ground[call.step]).log() / 2
        return replace(seen, values={**seen.values, "added_detail": added})

    def _probe(
        self,
        seen: Observation,
        call: StepCall,
        control: Control,
        seeds: Sequence[int],
        rows: Sequence[int],
        question: Question,
    ) -> Observation:
        """Adds what costs lanes, of some images: one a probe and one another seed, the control's being known."""
        index = index_of(rows, call.x.device)
        texts = call.lanes.prompt_embeds[len(seeds) + index]
        measured: dict[str, Tensor] = {}
        if question.probes:
            lid = self._lid(call.x[index], call.conditional[index], texts, [seeds[row] for row in rows])
            measured |= {"trajectory_lid_control": control.lid[index], "trajectory_lid": lid}
        if question.seeds:
            others = control.others[index][:, question.seeds.start : question.seeds.stop]
            agreements = self._agreements(call, others, texts, index)
            measured["excess_agreement"] = mean_agreement(seen, rows, agreements, question.seeds)
        return add_probed(seen, measured, rows, question.probes + len(question.seeds))

    def _agreements(self, call: StepCall, others: Tensor, texts: Tensor, index: Tensor) -> Tensor:
        """(K, N) excess agreement with each of K other seeds, whose UNet inputs are (N, K, C, H, W)."""
        kind, seen = prediction_type(self.pipe), self.other_places[1]
        assert call.control is not None
        with_prompt, without = (
            interpret(output[index], call.x[index], call.level, kind).x0_hat
            for output in (call.conditional, call.control)
        )
        shown = [interpret(self._evaluate(x, seen, texts), x, seen.level, kind).x0_hat for x in others.unbind(1)]
        return torch.stack([excess_agreement(with_prompt, without, other, call.level) for other in shown])

    def _lid(self, x: Tensor, output: Tensor, texts: Tensor, seeds: Sequence[int]) -> Tensor:
        """(N,) trajectory LID at the last observed step, mean over the probes, which are those of full depth."""
        place, kind = self.observed[-1], prediction_type(self.pipe)
        own = self._probe_seeds(seeds)
        base = interpret(output, x, place.level, kind).e_hat
        traces: list[Tensor] = []
        for k in range(self.guard.probes):
            v = draw_row_probes(own, self.noise_shape, place.step, x.device, k)
            moved = perturb(x, v, FiniteDifference().step_for(x))
            e_hat = interpret(self._evaluate(moved.point, place, texts), moved.point, place.level, kind).e_hat
            traces.append(probe_products(v, e_hat, base, moved.step).total)
        return trajectory_lid(base[0].numel(), place.level.s, torch.stack(traces).mean(0))

    def _evaluate(self, x: Tensor, place: Place, texts: Tensor | Texts) -> Tensor:
        """(N, C, H, W) raw outputs, in calls of `batch_size` lanes; the last row fills up the last call."""
        parts: list[Tensor] = []
        for start in range(0, len(x), self.batch_size):
            stop = min(start + self.batch_size, len(x))
            ready = texts if isinstance(texts, Tensor) else texts.first(stop)
            rows = torch.arange(start, start + self.batch_size, device=x.device).clamp(max=stop - 1)
            parts.append(evaluate_lanes(self.pipe.unet, x[rows], place.timestep, Conditioning(ready[rows])))
        return torch.cat(parts)[: len(x)]

    def _records(self, seen: Sequence[Observation], scores: Sequence[float], seeds: Sequence[int]) -> list[GuardRecord]:
        table = read_values(seen)
        lanes = [sum(spent) for spent in zip(*(each.lanes for each in seen), strict=True)]
        digest = self.fingerprint.digest
        records: list[GuardRecord] = []
        for row, (score, seed) in enumerate(zip(scores, seeds, strict=True)):
            verdict = verdict_of(score, self.guard.detector.threshold)
            scored = verdict != "unscored"
            records.append(
                GuardRecord(
                    verdict=verdict,
                    outcome=_OUTCOMES[verdict],
                    score=score if scored else math.nan,
                    decided_at_step=seen[-1].step if scored else None,
                    dimension=seen[-1].dimension,
                    statistics=tuple(
                        StatisticValue(each.step, name, *STATISTICS[name], values[row])
                        for each, name, values in table
                        if each.has(name, row)
                    ),
                    attempts=(),
                    extra_lanes=lanes[row],
                    seed=seed,
                    fingerprint=digest,
                    reason=None if scored else "the UNet's output was not finite",
                )
            )
        return records


def _latent_size(pipe: Any, model: ModelSettings) -> tuple[int, int]:
    """Height and width in latent pixels: as asked for, or the model's own."""
    size, factor = pipe.unet.config.sample_size, pipe.vae_scale_factor
    height, width = (size, size) if isinstance(size, int) else size
    return (
        height if model.height is None else model.height // factor,
        width if model.width is None else model.width // factor,
    )
