"""Commands that make images: screen, generate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sd_guard.cli.options import (
    BAD_ARGUMENTS,
    FAILED,
    Budget,
    CalibrationFile,
    Device,
    Failure,
    FirstSeed,
    Guidance,
    Model,
    Pixels,
    Precision,
    Resume,
    Seeds,
    Steps,
    bundled_model,
    check_folder_of,
    fail,
    interruptible,
    one_line,
)
from sd_guard.screening.prompts import Format
from sd_guard.screening.settings import (
    BATCH_SIZES,
    SKIPPED_FILE,
    Depth,
    Engine,
    ModelSettings,
    RunSettings,
    check_engine,
    check_metrics_file,
    check_seed,
)

if TYPE_CHECKING:
    from sd_guard.screening.runner import Plan
    from sd_guard.screening.summary import Summary


def screen_prompts(
    prompts: Annotated[str, typer.Argument(help="A list (.txt, .csv, .jsonl, .parquet; gzipped), a glob, or -.")],
    out: Annotated[str, typer.Option(help="The run folder to write, or an address such as s3://bucket/run.")],
    model: Model = None,
    calibration: CalibrationFile = None,
    depth: Annotated[Depth, typer.Option(help="quick: first steps, no images. auto: full where needed.")] = "full",
    seeds: Seeds = 1,
    seed: FirstSeed = 0,
    batch_size: Annotated[int | None, typer.Option(help="Images a batch.  [default: by depth]")] = None,
    steps: Steps = 50,
    guidance_scale: Guidance = 7.5,
    budget: Budget = None,
    on_failure: Failure = "blank",
    keep_before: Annotated[bool, typer.Option(help="Also keep the unguarded image of flagged ones.")] = False,
    explain: Annotated[bool, typer.Option(help="Also say which words and places flagged ones rest on.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the UNet, for --depth quick.")] = False,
    resume: Resume = False,
    device: Device = None,
    dtype: Precision = "float32",
    height: Pixels = None,
    width: Pixels = None,
    format: Annotated[Format | None, typer.Option(help="Of the list.  [default: by its extension]")] = None,
    skip_bad: Annotated[bool, typer.Option(help="Leave malformed rows out, and list them in skipped.txt.")] = False,
    fold_duplicates: Annotated[
        bool, typer.Option(help="Screen once what differs by case or Unicode form; see duplicates.parquet.")
    ] = False,
    max_unscored: Annotated[float, typer.Option(help="Stop when a larger share cannot be scored.")] = 0.5,
    metrics_file: Annotated[Path | None, typer.Option(help="Progress for Prometheus' textfile collector.")] = None,
    engine: Annotated[Engine, typer.Option(help="local: this process, or those of accelerate launch.")] = "local",
    workers: Annotated[int | None, typer.Option(help="Of ray.  [default: its GPUs, or 2]")] = None,
    ray_address: Annotated[str | None, typer.Option(help="Of a Ray cluster.  [default: one on this machine]")] = None,
) -> None:
    """Screen a list of prompts.

    Writes records.parquet, images and report.html, and ends with a table.
    """
    from sd_guard.screening.loading import check_compiler, load_screener, silence

    silence()  # before the libraries are imported, which log as they are: a refusal is one line
    from sd_guard.screening.processes import join_processes, wait_until
    from sd_guard.screening.runner import join_run, plan_run, screen

    processes = join_processes()
    if processes.rank > 0:
        wait_until(processes, "planned", 1)  # what is wrong with the arguments is said once, by rank 0
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
            format=format,
            depth=depth,
            seeds=seeds,
            seed=seed,
            batch_size=BATCH_SIZES[depth] if batch_size is None else batch_size,
            keep_before=keep_before,
            explain=explain,
            compile=compile,
            fold_duplicates=fold_duplicates,
            skip_bad=skip_bad,
            max_unscored=max_unscored,
        )
        if compile:
            check_compiler(device)
        cluster = check_engine(engine, workers=workers, address=ray_address, processes=processes.size)
        check_metrics_file(metrics_file)
        plan = join_run(settings) if processes.rank > 0 else plan_run(settings, resume=resume)
        processes.add("planned", 1)
    with one_line(FAILED), interruptible(out):
        if cluster is not None:
            from sd_guard.screening.ray import screen_with_ray

            summary = screen_with_ray(plan, cluster, load_screener, metrics_file=metrics_file)
        else:
            summary = screen(plan, load_screener, processes=processes, metrics_file=metrics_file)
        if summary is not None:
            _conclude(plan, summary)


def _conclude(plan: Plan, summary: Summary) -> None:
    """The end of a run: the table, what there is to say, and the report; fails if nothing could be scored."""
    from sd_guard.report.page import write_report
    from sd_guard.screening.summary import drift_warning, scores_of

    calibration = plan.settings.model.calibration
    try:
        page = write_report(plan.store.address, calibration=calibration)  # before the table, which may have no reader
    finally:
        typer.echo(summary.table())
    if plan.store.exists(SKIPPED_FILE):
        skipped = len(plan.store.read(SKIPPED_FILE).splitlines())
        where = f"{plan.store.address}/{SKIPPED_FILE}"
        typer.echo(f"warning: rows of the list that were left out: {skipped}; see {where}", err=True)
    scored = summary.total.screened - summary.total.unscored
    drift = drift_warning(scores_of(plan.store), calibration) if calibration is not None and scored else None
    if drift is not None:
        typer.echo(f"warning: {drift}", err=True)
    typer.echo(f"report: {page}")
    if summary.reasons:
        causes = ", ".join(f"{reason} x {times}" for reason, times in summary.reasons.most_common(3))
        unscored = summary.total.unscored
        typer.echo(f"warning: {unscored} images are unscored ({causes}); see `reason` in the records", err=True)
    if not scored:
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
    from sd_guard.screening.loading import load_pipeline, silence

    silence()  # before the libraries are imported, which log as they are
    with one_line(BAD_ARGUMENTS):
        if not prompt.strip():
            raise ValueError("the prompt is empty; write what the image should show")
        if out.suffix.lower() != ".png":
            raise ValueError(f"{out}: is no .png; name a PNG file with --out")
        if out.exists():
            raise ValueError(f"{out}: exists already; name another file with --out")
        check_folder_of(out)
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
        from sd_guard.screening.screener import generate_one

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
