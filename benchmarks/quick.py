"""Quick depth on the reference checkpoints: `python -m benchmarks.quick`.

On `tune` rows of the first, every prompt at the same few seeds: where to look, how to get there, how many probes and
other seeds, against the guard's own first decision on its full schedule. The candidates are compared by scores pooled
over the seeds, as one threshold sees them, and within each seed, as a run of one seed is ranked. The choice
(`sd_guard.screening.quick.QUICK`) is then measured on `report` rows of the bundled and the other checkpoints, at seeds
that nothing was chosen by. Last, the share of the wall time that is spent inside the UNet, by batch size.

The `report` rows of the first two were seen before, at other seeds, with the control's own detail in the score (AUROC
.993 / .994, pooled), and with none. That the mean of several controls should take its place was found on `tune` rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.results import write_result
from sd_guard.evaluation.metrics import auroc, tpr_at
from sd_guard.guard import Guard, GuardRecord
from sd_guard.noise import early_steps, interpret, read_level
from sd_guard.observation import Observation, observe
from sd_guard.pipelines.inputs import prediction_type
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.reference import PromptTruth, checkpoint_path, load_truth
from sd_guard.screening.calibrating import score_prompts
from sd_guard.screening.quick import QUICK, Place, QuickScreener
from sd_guard.screening.settings import ModelSettings
from sd_guard.settings import guard_to_json
from sd_guard.statistics.base import StepCall

FOLDERS = Path(__file__).parent / "reference"
CHOSEN_ON = FOLDERS / "first"
MODEL = ModelSettings(model=str(CHOSEN_ON))
OTHERS = {
    f"{name}_checkpoint_report": FOLDERS / name
    for name in ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
}
BATCH = 62  # a quarter of the rows of either split
SEEDS = range(8, 13)  # of the candidates
CHOICE_SEEDS = 16  # more, since all prompts of a seed lie higher or lower together
REPORT_SEED = 50_000
LOOKS = (  # candidate: shares of the schedule, probes, other seeds
    ("a: first latent", (0.0,), 0, 2),
    *(("b: latent without a prompt", (share,), 0, 2) for share in (0.02, 0.04, 0.06, 0.1, 0.2)),
    ("b: latent without a prompt", (0.06,), 0, 0),
    ("b: latent without a prompt", (0.06,), 1, 0),
    ("b: latent without a prompt", (0.06,), 0, 1),
    ("b: latent without a prompt", (0.06,), 1, 2),
    ("c: two levels", (0.02, 0.06), 0, 2),
)
Table = list[list[GuardRecord]]  # by seed, then prompt


class OwnControl(QuickScreener):
    """The detail that a prompt adds over that of its control, as full depth has it."""

    def _observe(self, call: StepCall) -> Observation:
        return observe(call, prediction_type(self.pipe))


class FineScreener(QuickScreener):
    """Walks to the level on the full schedule, step by step."""

    def _walk(self, seeds: Sequence[int]) -> list[Tensor]:
        x, timesteps, kind = self._first_inputs(seeds), self.scheduler.timesteps, prediction_type(self.pipe)
        levels = [read_level(self.scheduler, t) for t in timesteps[: self.observed[-1].step + 1]]
        inputs = [x]
        for step, level in enumerate(levels[:-1]):
            texts = self.empty.expand(len(seeds), -1, -1)
            ahead = interpret(self._evaluate(x, Place(step, timesteps[step], level), texts), x, level, kind)
            x = levels[step + 1].a * ahead.x0_hat + levels[step + 1].s * ahead.e_hat
            inputs.append(x)
        return [inputs[place.step] for place in self.observed]


@dataclass(frozen=True)
class Measured:
    """What a way of looking gives on labelled rows."""

    table: Table
    families: np.ndarray

    def line(self, threshold: float) -> dict[str, Any]:
        scores = np.array([[record.score for record in records] for records in self.table])
        found: dict[str, Any] = {}
        for family in ("verbatim", "template"):
            asked = np.isin(self.families, [family, "novel", "plain"])
            positive = self.families[asked] == family
            pooled, every = scores[:, asked].ravel(), np.tile(positive, len(scores))
            one = [(auroc(s, positive), tpr_at(s, positive, 0.01)) for s in scores[:, asked]]
            found[family] = {
                "auroc": round(auroc(pooled, every), 4),
                "tpr_at_1_fpr": round(tpr_at(pooled, every, 0.01), 4),
                "auroc_one_seed": round(float(np.mean([area for area, _ in one])), 4),
                "tpr_at_1_fpr_one_seed": round(float(np.mean([rate for _, rate in one])), 4),
            }
        flags = {f: scores[:, self.families == f] > threshold for f in np.unique(self.families).tolist()}
        lanes = np.array([[record.extra_lanes for record in records] for records in self.table])
        return found | {
            "threshold": round(threshold, 4),
            "flagged": {family: round(float(own.mean()), 4) for family, own in flags.items()},
            "lanes_mean": round(float(lanes.mean()), 3),
            "lanes_values": np.unique(lanes).tolist(),
        }

    def least_threshold(self, rate: float = 0.01) -> float:
        """The least that no more than a share `rate` of the benign images exceeds."""
        benign = np.isin(self.families, ["novel", "plain"])
        return float(
            np.quantile([[r.score for r in np.array(t)[benign]] for t in self.table], 1 - rate, method="higher")
        )


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    threshold = QUICK.detector.threshold
    pipe, rows = load(CHOSEN_ON), rows_of("tune", CHOSEN_ON)
    lines = [look_line(pipe, rows, *look) for look in tqdm(LOOKS)]
    lines.append(look_line(pipe, rows, "b, by the full schedule", (0.06,), 0, 2, FineScreener))
    lines.append(look_line(pipe, rows, "b, over the control's own detail", (0.06,), 0, 2, OwnControl))
    lines += [guided_line(pipe, rows, steps=25), full_line(pipe, rows)]
    chosen = measure(QuickScreener.make(pipe, MODEL, batch_size=BATCH), rows, range(CHOICE_SEEDS))
    reports = {
        name: measure(
            QuickScreener.make(load(folder), MODEL, batch_size=BATCH),
            rows_of("report", folder),
            range(REPORT_SEED, REPORT_SEED + CHOICE_SEEDS),
        ).line(threshold)
        for name, folder in {"report": checkpoint_path(), **OTHERS}.items()
    }
    result = {
        "settings": {"steps": MODEL.steps, "seeds": list(SEEDS), "seeds_of_the_choice": CHOICE_SEEDS},
        "tune": lines,
        "choice": {
            key: json.loads(guard_to_json(QUICK))[key] for key in ("observe_at", "probes", "other_seeds", "detector")
        },
        "least_threshold": round(chosen.least_threshold(), 4),
        "chosen": chosen.line(threshold),
        **reports,
        "time": [timing(pipe, rows, batch) for batch in (8, 16, 32, 64, 124)],
    }
    print(write_result("quick", result))
    for key, value in result.items():
        print(key, value)


def load(folder: Path) -> GuardedStableDiffusionPipeline:
    pipe = GuardedStableDiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rows_of(split: str, folder: Path) -> list[PromptTruth]:
    return [row for row in load_truth(folder) if row["split"] == split]


def measure(screener: QuickScreener, rows: list[PromptTruth], seeds: Sequence[int]) -> Measured:
    prompts = [row["prompt"] for row in rows]
    table = [screener.measure(prompts, [seed] * len(prompts)) for seed in seeds]
    return Measured(table, np.array([row["family"] for row in rows]))


def look_line(
    pipe: Any,
    rows: list[PromptTruth],
    way: str,
    observe_at: tuple[float, ...],
    probes: int,
    other_seeds: int,
    kind: type[QuickScreener] = QuickScreener,
) -> dict[str, Any]:
    guard = replace(QUICK, observe_at=observe_at, probes=probes, other_seeds=other_seeds)
    measured = measure(kind.make(pipe, MODEL, batch_size=BATCH, guard=guard), rows, SEEDS)
    asked = {"observe_at": observe_at, "probes": probes, "other_seeds": other_seeds}
    line = {"way": way, **asked, **measured.line(measured.least_threshold())}
    print(line, flush=True)
    return line


def guided_line(pipe: Any, rows: list[PromptTruth], *, steps: int) -> dict[str, Any]:
    """(d) the first two steps of a coarse schedule, guided; of the first step's two lanes, the control's is shared."""
    guard = replace(Guard(), observe_at=(0.0, 1 / steps))
    way = {"way": "d: two guided steps", "observe_at": f"steps 0 and 1 of {steps}", **asked_in_doubt(guard)}
    return with_sampling(way, sample(pipe, rows, guard, num_inference_steps=steps), lanes=3)


def full_line(pipe: Any, rows: list[PromptTruth]) -> dict[str, Any]:
    """The guard's own way to its first decision."""
    guard = Guard()
    way = {"way": "guard's first decision, full schedule", "observe_at": guard.observe_at, **asked_in_doubt(guard)}
    measured = sample(pipe, rows, guard, num_inference_steps=MODEL.steps)
    timesteps = pipe.scheduler.timesteps.tolist()
    decided = guard.steps(len(timesteps), early_steps(pipe.scheduler, timesteps))[-1]
    return with_sampling(way, measured, lanes=2 * (decided + 1))


def asked_in_doubt(guard: Guard) -> dict[str, int]:
    return {"probes": guard.probes, "other_seeds": guard.other_seeds}


def with_sampling(way: dict[str, Any], measured: Measured, *, lanes: int) -> dict[str, Any]:
    """Adds the lanes of sampling, which quick depth counts and the guard's records do not."""
    line = measured.line(measured.least_threshold())
    line["lanes_mean"] = round(line["lanes_mean"] + lanes, 3)
    line["lanes_values"] = [value + lanes for value in line["lanes_values"]]
    print(way | line, flush=True)
    return way | line


def sample(pipe: Any, rows: list[PromptTruth], guard: Guard, *, num_inference_steps: int) -> Measured:
    """Records of guarded calls that end at the first decision."""
    pipe.enable_guard(replace(guard, look_again_at=()))
    prompts = [row["prompt"] for row in rows]
    call = {"num_inference_steps": num_inference_steps, "guidance_scale": MODEL.guidance_scale}
    table: Table = []
    for seed in tqdm(SEEDS, desc=f"guided, {num_inference_steps} steps"):
        parts = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
        table.append([record for part in parts for record in score_prompts(pipe, part, [seed] * len(part), **call)])
    return Measured(table, np.array([row["family"] for row in rows]))


def timing(pipe: Any, rows: list[PromptTruth], batch: int) -> dict[str, Any]:
    """Time of one pass over the prompts, all different, at one seed whose control is there; and inside the UNet."""
    inside = 0.0
    forward: Callable[..., Any] = pipe.unet.forward

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(*arguments: Any, **options: Any) -> Any:
        nonlocal inside
        started = now()
        output = forward(*arguments, **options)
        inside += now() - started
        return output

    prompts = [row["prompt"] for row in rows]
    screener = QuickScreener.make(pipe, MODEL, batch_size=batch)
    screener.measure(prompts[:batch], [0] * batch)
    pipe.unet.forward = timed
    try:
        started = now()
        records = screener.measure(prompts, [0] * len(prompts))
        whole = now() - started
    finally:
        pipe.unet.forward = forward
    return {
        "batch": batch,
        "milliseconds_a_prompt": round(1000 * whole / len(prompts), 3),
        "share_inside_unet": round(inside / whole, 4),
        "lanes_mean": round(float(np.mean([record.extra_lanes for record in records])), 3),
    }


if __name__ == "__main__":
    main()
