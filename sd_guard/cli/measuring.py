"""Commands that measure: evaluate, calibrate, lid, prompts pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from PIL import Image

from sd_guard.cli.options import (
    BAD_ARGUMENTS,
    FAILED,
    BatchSize,
    Device,
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
    interruptible,
    one_line,
)
from sd_guard.screening.settings import ModelSettings, check_seed

CalibratedDepth = Literal["full", "quick"]


def evaluate_statistics(
    prompts: PromptFile,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    model: Model = None,
    statistics: Annotated[str | None, typer.Option(help="Names, with commas.  [default: all but the dearest]")] = None,
    seeds: Seeds = 1,
    batch_size: BatchSize = 16,
    steps: Steps = 50,
    guidance_scale: Guidance = 7.5,
    resume: Resume = False,
    device: Device = None,
    dtype: Precision = "float32",
) -> None:
    """Compare statistics on labelled prompts.

    The file needs a column `family`. Writes a table (CSV, Parquet, Markdown) and a figure.
    """
    from sd_guard.evaluation.run import evaluate, plan_evaluation
    from sd_guard.evaluation.settings import EvaluationSettings
    from sd_guard.screening.loading import silence

    with one_line(BAD_ARGUMENTS):
        names = None if statistics is None else tuple(name.strip() for name in statistics.split(",") if name.strip())
        settings = EvaluationSettings(
            prompts=prompts,
            out=out,
            model=ModelSettings(
                model=model or bundled_model(), steps=steps, guidance_scale=guidance_scale, device=device, dtype=dtype
            ),
            statistics=names,
            seeds=seeds,
            batch_size=batch_size,
            resume=resume,
        )
        plan = plan_evaluation(settings)
    with one_line(FAILED), interruptible(out):
        silence()
        evaluate(plan)
        typer.echo((out / "table.md").read_text(encoding="utf-8"))
        typer.echo(f"table and figure: {out}")


def calibrate_model(
    prompts: PromptFile,
    out: Annotated[Path, typer.Option(help="The calibration file to write.")],
    false_positive_rate: Annotated[float, typer.Option(help="Share of benign images that may be flagged.")] = 0.01,
    memorized: Annotated[Path | None, typer.Option(help="Prompts known to be memorized, if any.")] = None,
    depth: Annotated[CalibratedDepth, typer.Option(help="Of the screening; full serves auto, too.")] = "full",
    model: Model = None,
    seeds: Seeds = 1,
    seed: FirstSeed = 0,
    batch_size: BatchSize = 16,
    steps: Steps = 50,
    guidance_scale: Guidance = 7.5,
    resume: Resume = False,
    device: Device = None,
    dtype: Precision = "float32",
    height: Pixels = None,
    width: Pixels = None,
) -> None:
    """Find the threshold of one configuration from benign prompts.

    Images are sampled up to the guard's last look, and not decoded; with --depth quick, none is sampled.
    """
    from sd_guard.screening.loading import load_pipeline, silence

    silence()  # before the libraries are imported, which log as they are: a refusal is one line
    from sd_guard.screening.calibrating import CalibrationSettings, calibrate, plan_calibration

    with one_line(BAD_ARGUMENTS):
        settings = CalibrationSettings(
            prompts=prompts,
            out=out,
            model=ModelSettings(
                model=model or bundled_model(),
                steps=steps,
                guidance_scale=guidance_scale,
                device=device,
                dtype=dtype,
                height=height,
                width=width,
            ),
            memorized=memorized,
            false_positive_rate=false_positive_rate,
            seeds=seeds,
            seed=seed,
            batch_size=batch_size,
            depth=depth,
        )
        plan = plan_calibration(settings, resume=resume)
    with one_line(FAILED), interruptible(settings.partial):
        calibration = calibrate(plan, load_pipeline)
    threshold = calibration.thresholds[max(calibration.thresholds)]
    typer.echo(
        f"threshold {threshold:.3g} flags at most {false_positive_rate:.3g} of benign images, by {calibration.images} "
        f"of them: {out}"
    )


def lid(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    prompt: Annotated[str, typer.Option(help="Its caption.")],
    model: Model = None,
    seed: Annotated[int, typer.Option(help="Of the probe vectors.")] = 0,
    device: Device = None,
    dtype: Precision = "float32",
) -> None:
    """Estimate the dimension that a model has around an image.

    Also says which case of memorization it is, if any.
    """
    with one_line(BAD_ARGUMENTS):
        check_seed(seed)
        if not prompt.strip():
            raise ValueError("--prompt is empty; give the image's caption")
        pixels = _read_image(image)
        settings = ModelSettings(model=model or bundled_model(), device=device, dtype=dtype)
    with one_line(FAILED):
        from sd_guard.image_lid import lid_of_image
        from sd_guard.screening.loading import first_line, load_pipeline

        pipe = load_pipeline(settings)
        try:
            found = lid_of_image(pipe, pixels, prompt, seed=seed)
        except Exception as error:  # out of memory, or whatever the model raises
            raise ValueError(f"{image}: its LID could not be estimated ({first_line(error)})") from error
    typer.echo(f"{found.case}: {found.reason}")


def _read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; name an image") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: is no image that can be read ({type(error).__name__})") from error


def pull_prompts(
    name: Annotated[str, typer.Argument(help="Of the list; a name that is not known answers with all names.")],
    out: Annotated[Path, typer.Option(help="The folder to write it to.")] = Path("prompts"),
    url: Annotated[str | None, typer.Option(help="Another address of the same file.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Its checksum.")] = None,
) -> None:
    """Fetch a public prompt list, by address and checksum."""
    from sd_guard.prompt_lists import pull

    with one_line(FAILED):
        typer.echo(pull(name, out, url=url, sha256=sha256))
