"""Makes the bundled calibration from benign `tune` rows: `python -m benchmarks.reference.calibrate`."""

from __future__ import annotations

from benchmarks.detection import screen
from sd_guard.calibration import Calibrator
from sd_guard.fingerprint import take_fingerprint
from sd_guard.guard import Guard
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.reference import calibration_path, checkpoint_path, load_truth

FALSE_POSITIVE_RATE = 0.01


def main() -> None:
    """Novel and plain prompts are the benign ones; 50 DDIM steps, guidance 7.5, float32."""
    pipe = GuardedStableDiffusionPipeline.from_pretrained(
        checkpoint_path(), local_files_only=True, use_safetensors=True
    )
    fingerprint = take_fingerprint(pipe, steps=50, guidance_scale=7.5)
    calibrator = Calibrator(Guard(), fingerprint, FALSE_POSITIVE_RATE)
    benign = [row for row in load_truth() if row["split"] == "tune" and row["family"] in ("novel", "plain")]
    calibrator.update(screen(pipe, benign, Guard()))
    calibrator.finish().save(calibration_path())
    print(calibration_path(), calibrator.finish().thresholds)


if __name__ == "__main__":
    main()
