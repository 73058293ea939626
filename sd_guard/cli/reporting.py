"""Commands that make pages to look at: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sd_guard.cli.options import FAILED, one_line

RunFolder = Annotated[Path, typer.Argument(help="A run folder.")]


def report(run: RunFolder) -> None:
    """Write report.html anew.

    The run may be unfinished.
    """
    with one_line(FAILED):
        write_page(run)


def write_page(run: Path) -> None:
    """Writes a run's report, and says where it is."""
    from sd_guard.report.page import write_report

    typer.echo(f"report: {write_report(run)}")
