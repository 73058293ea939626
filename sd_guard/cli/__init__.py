"""The command line: one function a user's job. torch and diffusers are imported only once every argument is checked."""

from __future__ import annotations

import os
import sys
from typing import Annotated, cast

import typer
from typer.exceptions import TyperException

from sd_guard.cli.benching import bench
from sd_guard.cli.explaining import explain
from sd_guard.cli.generating import generate, screen_prompts
from sd_guard.cli.measuring import calibrate_model, evaluate_statistics, lid, pull_prompts
from sd_guard.cli.options import BAD_ARGUMENTS, FAILED, INTERRUPTED
from sd_guard.cli.reporting import compare, report

app = typer.Typer(
    help="Flags, mitigates and verifies memorized generations of latent diffusion models.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
prompts = typer.Typer(help="Public prompt lists.", add_completion=False, rich_markup_mode=None)
app.command("screen")(screen_prompts)
app.command()(generate)
app.command()(report)
app.command()(compare)
app.command("evaluate")(evaluate_statistics)
app.command("calibrate")(calibrate_model)
app.command()(lid)
app.command()(explain)
app.command()(bench)
prompts.command("pull")(pull_prompts)
app.add_typer(prompts, name="prompts")


@prompts.callback()
def public_lists() -> None:
    """Public prompt lists: nothing is fetched unless you name one."""


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


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    try:
        code = cast("int | None", app(arguments, prog_name="sd-guard", standalone_mode=False))
    except TyperException as error:
        message = " ".join(error.format_message().split()).replace("Value error, ", "")  # as typer's choices begin
        typer.echo(f"error: {message}", err=True)
        return BAD_ARGUMENTS
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read what is said has ended; what was to be done is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor is there a reader at exit
        return FAILED
    return code or 0
