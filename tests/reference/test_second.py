"""The default, without calibration, on a checkpoint of another make: v-prediction, linear betas, another world."""

from pathlib import Path

import pytest

from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.reference import load_truth
from sd_guard.screening.calibrating import score_prompts

SECOND = Path(__file__).parents[2] / "benchmarks" / "reference" / "second"


@pytest.mark.parametrize(("family", "least", "most"), [("verbatim", 10, 12), ("template", 10, 12), ("novel", 0, 1)])
def test_flags_what_it_memorized_and_nothing_else(family: str, least: int, most: int) -> None:
    pipe = GuardedStableDiffusionPipeline.from_pretrained(SECOND, local_files_only=True, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    rows = [row["prompt"] for row in load_truth(SECOND) if row["family"] == family and row["split"] == "tune"][:12]
    records = score_prompts(pipe, rows, range(len(rows)))
    assert len(records) == 12
    assert least <= sum(record.verdict == "flag" for record in records) <= most
