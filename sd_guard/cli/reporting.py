"""Commands that make pages to look at: report, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sd_guard.cli.options import BAD_ARGUMENTS, FAILED, one_line


def report(
    run: Annotated[str, typer.Argument(help="A run folder, or its address.")],
    calibration: Annotated[Path | None, typer.Option(help="The calibration that the run was made with.")] = None,
) -> None:
    """Write report.html anew.

    The run may be unfinished. With the run's calibration, its benign scores are shown too.
    """
    from sd_guard.report.page import write_report

    with one_line(FAILED):
        typer.echo(f"report: {write_report(run, calibration=calibration)}")


def compare(
    run_a: Annotated[str, typer.Argument(help="A run folder, or its address.")],
    run_b: Annotated[str, typer.Argument(help="Another one, of the same prompts.")],
    out: Annotated[Path | None, typer.Option(help="HTML file to write.  [default: compare.html in RUN_B]")] = None,
) -> None:
    """Compare two runs image by image.

    Says what is newly flagged, no longer flagged, and how scores shifted: before and after a fine-tune, for example.
    """
    with one_line(BAD_ARGUMENTS):
        if out is not None and out.suffix.lower() not in {".html", ".htm"}:
            raise ValueError(f"{out}: is no .html; name an HTML file with --out")
        if out is not None and not out.parent.is_dir():
            raise ValueError(f"{out.parent}: no such folder; make it first")
    from sd_guard.report.compare import compare_runs, summary, write_comparison

    with one_line(FAILED):
        comparison = compare_runs(run_a, run_b)
        page = write_comparison(comparison, run_a, run_b, out)  # before the table, which may have no reader
        typer.echo(summary(comparison))
        typer.echo(f"page: {page}")
