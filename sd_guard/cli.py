"""The command line: one function a user's job. torch and diffusers are imported only once every argument is checked."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn, cast

import typer
from typer.exceptions import TyperException

from sd_guard.screening.settings import Dtype, ModelSettings, OnFailure, RunSettings, check_seed

app = typer.Typer(
    help="Flags, mitigates and verifies memorized generations of latent diffusion models.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

BAD_ARGUMENTS = 2
FAILED = 1
INTERRUPTED = 130

Model = Annotated[str | None, typer.Option(help="Checkpoint folder or hub name.  [default: the bundled model]")]
CalibrationFile = Annotated[Path | None, typer.Option("--calibration", help="Calibration file; none: scale-free.")]
Steps = Annotated[int, typer.Option(help="Sampling steps.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance; at most 1: none.")]
Budget = Annotated[int | None, typer.Option(help="Extra lane evaluations an image, at most.  [default: the guard's]")]
Failure = Annotated[OnFailure, typer.Option(help="What becomes of an image that no mitigation rescues.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N, xpu or mps.  [default: cuda if there is one]")]
Precision = Annotated[Dtype, typer.Option(help="Of the weights.")]
Pixels = Annotated[int | None, typer.Option(help="Pixels.  [default: the model's own]")]


@app.command("screen")
def screen_prompts(
    prompts: Annotated[Path, typer.Argument(help="A .txt, .csv or .jsonl file with a prompt column.")],
    out: Annotated[Path, typer.Option(help="The run folder to write.")],
    model: Model = None,
    calibration: CalibrationFile = None,
    seeds: Annotated[int, typer.Option(help="Images a prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="First seed of prompts without their own.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images a batch.")] = 16,
    steps: Steps = 50,
    guidance_scale: Guidance = 7.5,
    budget: Budget = None,
    on_failure: Failure = "blank",
    keep_before: Annotated[bool, typer.Option(help="Also keep the unguarded image of flagged ones.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was ended.")] = False,
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
    from sd_guard.screening.summary import summary_table

    with _one_line(BAD_ARGUMENTS):
        settings = RunSettings(
            prompts=prompts,
            out=out,
            model=ModelSettings(
                model=model or _bundled_model(),
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
    with _one_line(FAILED):
        try:
            rows = screen(plan, load_pipeline)
        except KeyboardInterrupt:
            typer.echo(f"interrupted: what was done is kept in {out}; add --resume to go on", err=True)
            raise typer.Exit(INTERRUPTED) from None
        typer.echo(summary_table(rows))
        _write_report(out)
    reasons = Counter((row["reason"] or "no reason").split(":")[0] for row in rows if row["outcome"] == "unscored")
    if reasons:
        causes = ", ".join(f"{reason} x {times}" for reason, times in reasons.most_common(3))
        typer.echo(f"warning: {reasons.total()} images are unscored ({causes}); see `reason` in the records", err=True)
    if reasons.total() == len(rows):
        raise typer.Exit(FAILED)


@app.command()
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

    If it is blocked, none is written, and the exit code is 1.
    """
    with _one_line(BAD_ARGUMENTS):
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
            model=model or _bundled_model(),
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
    with _one_line(FAILED):
        from sd_guard.screening.loading import load_pipeline
        from sd_guard.screening.runner import generate_one

        row = generate_one(load_pipeline(settings), prompt, settings, seed=seed, out=out)
    score = "none" if row["score"] is None else f"{row['score']:.3g}"
    line = f"{row['outcome']}: score {score}, {len(row['attempts'])} attempts, {row['extra_lanes']} extra lanes"
    if row["image"] is None:
        _fail(FAILED, f"no image; {line}" + (f" ({row['reason']})" if row["reason"] else ""))
    typer.echo(f"{line}; {out}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html anew.

    The run may be unfinished.
    """
    with _one_line(FAILED):
        _write_report(run)


def _write_report(run: Path) -> None:
    from sd_guard.report.page import write_report

    typer.echo(f"report: {write_report(run)}")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Flags, mitigates and verifies memorized generations of latent diffusion models."""
    if version:
        from sd_guard.screening.settings import package_version

        typer.echo(f"sd-guard {package_version('sd-guard') or 'unknown: not installed'}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(BAD_ARGUMENTS)


def _bundled_model() -> str:
    from sd_guard.reference import checkpoint_path

    return str(checkpoint_path())


@contextmanager
def _one_line(code: int) -> Generator[None, None, None]:
    """Turns an expected error into one line on stderr and an exit code."""
    try:
        yield
    except (ValueError, OSError) as error:
        _fail(code, " ".join(str(error).split()))


def _fail(code: int, text: str) -> NoReturn:
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(code)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    try:
        code = cast("int | None", app(arguments, prog_name="sd-guard", standalone_mode=False))
    except TyperException as error:
        typer.echo(f"error: {' '.join(error.format_message().split())}", err=True)
        return BAD_ARGUMENTS
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("interrupted", err=True)
        return INTERRUPTED
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
