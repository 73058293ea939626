"""Commands that make images: screen, generate."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from sd_guard.cli.options import (
    BAD_ARGUMENTS,
    FAILED,
    BatchSize,
    Budget,
    CalibrationFile,
    Device,
    Failure,
    FirstSeed,
    Guidance,
    Model,
    Pixels,
    Precision,
    PromptFile,
    Resume,
    Seeds,
    Steps,
    bundled_model,
    fail,
    interruptible,
    one_line,
)
from sd_guard.cli.reporting import write_page
from sd_guard.screening.settings import ModelSettings, RunSettings, check_seed


def screen_prompts(
    prompts: PromptFile,
    out: Annotated[Path, typer.Option(help="The run folder to write.")],
    model: Model = None,
    calibration: CalibrationFile = None,
    seeds: Seeds = 1,
    seed: FirstSeed = 0,
    batch_size: BatchSize = 16,
    steps: Steps = 50,
    guidance_scale: Guidance = 7.5,
    budget: Budget = None,
    on_failure: Failure = "blank",
    keep_before: Annotated[bool, typer.Option(help="Also keep the unguarded image of flagged ones.")] = False,
    resume: Resume = False,
    device: Device = None,
    dtype: Precision = "float32",
    height: Pixels = None,
    width: Pixels = None,
) -> None:
    """Screen a list of prompts.

    Writes records.parquet, images and report.html, and ends with a table.
    """
    from sd_guard.screening.loading import load_pipeline
    from sd_guard.screening.runner import plan_run, screen
    from sd_guard.screening.summary import drift_warning, summary_table

    with one_line(BAD_ARGUMENTS):
        settings = RunSettings(
            prompts=prompts,
            out=out,
            model=ModelSettings(
                model=model or bundled_model(),
                calibration=calibration,
                steps=steps,
                guidance_scale=guidance_scale,
                budget=budget,
                on_failure=on_failure,
                device=device,
                dtype=dtype,
                height=height,
                width=width,
            ),
            seeds=seeds,
            seed=seed,
            batch_size=batch_size,
            keep_before=keep_before,
        )
        plan = plan_run(settings, resume=resume)
    with one_line(FAILED):
        with interruptible(out):
            rows = screen(plan, load_pipeline)
        typer.echo(summary_table(rows))
        if calibration is not None and (warning := drift_warning(rows, calibration)) is not None:
            typer.echo(f"warning: {warning}", err=True)
        write_page(out, calibration)
    reasons = Counter((row["reason"] or "no reason").split(":")[0] for row in rows if row["outcome"] == "unscored")
    if reasons:
        causes = ", ".join(f"{reason} x {times}" for reason, times in reasons.most_common(3))
        typer.echo(f"warning: {reasons.total()} images are unscored ({causes}); see `reason` in the records", err=True)
    if reasons.total() == len(rows):
        raise typer.Exit(FAILED)


def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")],
    model: Model = None,
    calibration: CalibrationFile = None,
    seed: Annotated[int, typer.Option(help="Of the image's generator.")] = 0,
    steps: Steps = 50,
    guidance_scale: Guidance = 7.5,
    budget: Budget = None,
    on_failure: Failure = "blank",
    device: Device = None,
    dtype: Precision = "float32",
    height: Pixels = None,
    width: Pixels = None,
) -> None:
    """Generate one guarded image.

    If it is blocked, none is written, and the exit code is 1; likewise 1 if it could not be scored, and is kept.
    """
    with one_line(BAD_ARGUMENTS):
        if not prompt.strip():
            raise ValueError("the prompt is empty; write what the image should show")
        if out.suffix.lower() != ".png":
            raise ValueError(f"{out}: is no .png; name a PNG file with --out")
        if out.exists():
            raise ValueError(f"{out}: exists already; name another file with --out")
        if not out.parent.is_dir():
            raise ValueError(f"{out.parent}: no such folder; make it first")
        check_seed(seed)
        settings = ModelSettings(
            model=model or bundled_model(),
            calibration=calibration,
            steps=steps,
            guidance_scale=guidance_scale,
            budget=budget,
            on_failure=on_failure,
            device=device,
            dtype=dtype,
            height=height,
            width=width,
        )
    with one_line(FAILED):
        from sd_guard.screening.loading import load_pipeline
        from sd_guard.screening.runner import generate_one

        row = generate_one(load_pipeline(settings), prompt, settings, seed=seed, out=out)
    score = "none" if row["score"] is None else f"{row['score']:.3g}"
    line = f"{row['outcome']}: score {score}, {len(row['attempts'])} attempts, {row['extra_lanes']} extra lanes"
    if row["reason"]:
        line += f" ({row['reason']})"
    if row["image"] is None:
        fail(FAILED, f"no image; {line}")
    typer.echo(f"{line}; {out}")
    if row["outcome"] == "unscored":  # not a pass, though the image is kept
        raise typer.Exit(FAILED)
