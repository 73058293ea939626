"""The command that explains: which words, and which places of the image, a verdict rests on."""

from __future__ import annotations

import io
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

import typer

from sd_guard.cli.options import (
    BAD_ARGUMENTS,
    FAILED,
    Device,
    Guidance,
    Model,
    Precision,
    Steps,
    bundled_model,
    check_folder_of,
    one_line,
)
from sd_guard.screening.settings import ModelSettings, check_seed

if TYPE_CHECKING:
    from sd_guard.attribution import WordAttribution
    from sd_guard.pipelines.explanation import Explanation

MethodName: TypeAlias = Literal["ablation", "gradient_norm", "integrated_gradients"]

_RED: Final = "#c1272d"
_TINTS: Final = (None, 224, 217, 210, 203, 196)  # of 256 terminal colours, white to red
_BARS: Final = 32  # words in the figure
_WIDTH: Final = 24  # characters of a word in the figure


def explain(
    prompt: Annotated[str, typer.Argument(help="To explain.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")],
    model: Model = None,
    seed: Annotated[int, typer.Option(help="Of the image's generator.")] = 0,
    method: Annotated[MethodName, typer.Option(help="How words get their shares.")] = "ablation",
    steps: Steps = 50,
    guidance_scale: Guidance = 7.5,
    device: Device = None,
    dtype: Precision = "float32",
) -> None:
    """Show which words, and which places, a verdict rests on.

    Samples up to the guard's last look.
    """
    from sd_guard.screening.loading import first_line, load_pipeline, silence

    silence()  # before the libraries are imported, which log as they are
    with one_line(BAD_ARGUMENTS):
        _check(prompt, out)
        check_seed(seed)
        settings = ModelSettings(
            model=model or bundled_model(), steps=steps, guidance_scale=guidance_scale, device=device, dtype=dtype
        )
    with one_line(FAILED):
        from sd_guard.pipelines.explanation import look

        pipe = load_pipeline(settings)
        try:
            found = look(pipe, prompt, steps=steps, guidance_scale=guidance_scale, seed=seed, method=method)
        except Exception as error:  # out of memory, or whatever the model raises
            raise ValueError(f"the prompt could not be explained ({first_line(error)})") from error
        draw(found, out)
    typer.echo(_headline(found))
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    typer.echo(tinted(found.words) if coloured else column(found.words))
    typer.echo(f"figure: {out}")


def _check(prompt: str, out: Path) -> None:
    if not prompt.strip():
        raise ValueError("the prompt is empty; write what the image should show")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt holds bytes that are no UTF-8; write it anew") from None
    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: is no .png; name a PNG file with --out")
    if out.exists():
        raise ValueError(f"{out}: exists already; name another file with --out")
    check_folder_of(out)
    missing = [name for name in ("captum", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not installed; pip install 'sd-guard[explain]'")


def _headline(found: Explanation) -> str:
    score = f"score {found.score:.3g}, threshold {found.threshold:.3g}"
    return f"{found.verdict}: {score}, at step {found.step} of {found.count}"


def printable(text: str) -> str:
    """The text with all that could steer a terminal written as an escape: control, format and private characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def tinted(words: WordAttribution) -> str:
    """The prompt, each word on a ground as red as its share of the largest, and the first three in figures."""
    top = max(words.scores) or 1.0
    shown: list[str] = []
    for word, score in zip(words.words, words.scores, strict=True):
        tint = _TINTS[round(max(score, 0.0) / top * (len(_TINTS) - 1))]
        shown.append(printable(word) if tint is None else typer.style(f" {printable(word)} ", fg=16, bg=tint))
    ranked = sorted(zip(words.scores, words.words, strict=True), key=lambda pair: -pair[0])[:3]
    first = ", ".join(f"{printable(word)} {score:.0%}" for score, word in ranked if score > 0)
    return f"{' '.join(shown)}\n{first or 'no word raises the detail that the prompt adds'}"


def column(words: WordAttribution) -> str:
    """A line a word: its share, and the word."""
    pairs = zip(words.words, words.scores, strict=True)
    return "\n".join(f"{score:>7.1%}  {printable(word)}" for word, score in pairs)


def draw(found: Explanation, path: Path) -> None:
    """Writes a PNG: the words as bars, the predicted image, and over it where it is pinned.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib; pip install 'sd-guard[explain]'") from error
    from sd_guard.screening.records import write_atomic

    height = max(4.6, 0.26 * min(len(found.words.words), _BARS) + 1.4)
    figure = Figure(figsize=(13.5, height), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    bars, image, places = figure.subplots(1, 3)
    figure.suptitle(_headline(found), fontsize=12)
    _draw_words(bars, found.words)
    _draw_image(image, found)
    _draw_places(figure, places, found)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(path, buffer.getvalue())


def _draw_words(axis: Any, words: WordAttribution) -> None:
    """The words of the largest scores, in the order of the prompt; no text of theirs is read as a formula."""
    ranked = sorted(range(len(words.words)), key=lambda k: -abs(words.scores[k]))
    kept = sorted(ranked[:_BARS])
    labels = [_short(printable(words.words[k])) for k in kept]
    shares = [100 * words.scores[k] for k in kept]
    axis.barh(range(len(kept)), shares, color=[_RED if share > 0 else "#8c8c8c" for share in shares])
    axis.set_yticks(range(len(kept)), labels, fontsize=9, parse_math=False)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(kept) - 0.4, -0.6)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("share of the detail that the prompt adds, %")
    left_out = len(ranked) - len(kept)
    axis.set_title(f"words, by {words.method.replace('_', ' ')}" + (f" ({left_out} more)" if left_out else ""))
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _draw_image(axis: Any, found: Explanation) -> None:
    axis.imshow(found.image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_title(f"image predicted at step {found.shown}")
    axis.set_axis_off()
    axis.set_anchor("N")


def _draw_places(figure: Any, axis: Any, found: Explanation) -> None:
    """Red over the image in grey where it is pinned. The scale ends at the most that is open with or without prompt."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    height, width = found.image.shape[1:]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    top = float(max(found.left_open.max(), found.left_open_without.max(), 1e-3))
    axis.imshow(found.image.mean(0).numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
    shown = axis.imshow(
        100 * found.left_open.numpy(),
        cmap=LinearSegmentedColormap.from_list("pinned", [to_rgba(_RED, 0.6), to_rgba(_RED, 0.0)]),
        vmin=0,
        vmax=100 * top,
        interpolation="bilinear",
        extent=extent,
    )
    axis.set_title("where it is pinned (red)")
    axis.set_axis_off()
    axis.set_anchor("N")
    below = axis.inset_axes((0.1, -0.08, 0.8, 0.04))
    figure.colorbar(shown, cax=below, orientation="horizontal", label="directions left open, %")


def _short(word: str) -> str:
    return word if len(word) <= _WIDTH else word[: _WIDTH - 1] + "…"
