"""Makes the bundled calibration from benign `tune` rows: `python -m benchmarks.reference.calibrate`."""

from __future__ import annotations

from sd_guard.calibration import Calibrator
from sd_guard.fingerprint import take_fingerprint
from sd_guard.guard import Guard
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.reference import calibration_path, checkpoint_path, load_truth
from sd_guard.screening.calibrating import score_prompts

FALSE_POSITIVE_RATE = 0.01
BATCH = 16


def main() -> None:
    """Novel and plain prompts are the benign ones; 50 DDIM steps, guidance 7.5, float32."""
    pipe = GuardedStableDiffusionPipeline.from_pretrained(
        checkpoint_path(), local_files_only=True, use_safetensors=True
    )
    fingerprint = take_fingerprint(pipe, steps=50, guidance_scale=7.5)
    calibrator = Calibrator(Guard(), fingerprint, FALSE_POSITIVE_RATE)
    benign = [row for row in load_truth() if row["split"] == "tune" and row["family"] in ("novel", "plain")]
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, len(benign), BATCH):
        part = [row["prompt"] for row in benign[start : start + BATCH]]
        calibrator.update(score_prompts(pipe, part, range(start, start + len(part))))
    calibrator.finish().save(calibration_path())
    print(calibration_path(), calibrator.finish().thresholds)


if __name__ == "__main__":
    main()
