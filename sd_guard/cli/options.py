"""What the commands share: options, and errors in one line."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from sd_guard.screening.settings import Dtype, OnFailure

BAD_ARGUMENTS = 2
FAILED = 1
INTERRUPTED = 130

Model = Annotated[str | None, typer.Option(help="Checkpoint folder or hub name.  [default: the bundled model]")]
CalibrationFile = Annotated[Path | None, typer.Option("--calibration", help="Calibration file; none: scale-free.")]
Steps = Annotated[int, typer.Option(help="Sampling steps.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance; at most 1: none.")]
Budget = Annotated[int | None, typer.Option(help="Extra lane evaluations an image, at most.  [default: the guard's]")]
Failure = Annotated[OnFailure, typer.Option(help="Of an image that no mitigation rescues; keep: its best attempt.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N, xpu or mps.  [default: cuda if there is one]")]
Precision = Annotated[Dtype, typer.Option(help="Of the weights.")]
Pixels = Annotated[int | None, typer.Option(help="Pixels.  [default: the model's own]")]
PromptFile = Annotated[Path, typer.Argument(help="A .txt, .csv or .jsonl file with a prompt column.")]
Seeds = Annotated[int, typer.Option(help="Images a prompt.")]
FirstSeed = Annotated[int, typer.Option(help="First seed of prompts without their own.")]
BatchSize = Annotated[int, typer.Option(help="Images a batch.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was ended.")]


def bundled_model() -> str:
    """Folder of the bundled checkpoint."""
    from sd_guard.reference import checkpoint_path

    return str(checkpoint_path())


def check_folder_of(out: Path) -> None:
    """Raises ValueError unless a file can be written there."""
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent}: no such folder; make it first")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"{out.parent}: cannot be written to; name a file in another folder with --out")


@contextmanager
def one_line(code: int) -> Generator[None, None, None]:
    """Turns an expected error into one line on stderr and an exit code."""
    try:
        yield
    except BrokenPipeError:  # nobody reads what is said: see `main`
        raise
    except (ValueError, OSError) as error:
        fail(code, " ".join(str(error).split()))


@contextmanager
def interruptible(kept: Path | str) -> Generator[None, None, None]:
    """Turns an interrupt into a line that says how to go on, and its exit code."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted: what was done is kept in {kept}; add --resume to go on", err=True)
        raise typer.Exit(INTERRUPTED) from None


def fail(code: int, text: str) -> NoReturn:
    """Ends the command with a line on stderr."""
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(code)
