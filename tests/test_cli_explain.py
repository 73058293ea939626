"""`explain`: checked before a model is loaded, the guard's own score, words that steer no terminal, and a figure."""

import dataclasses
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from tiny import seeded

from sd_guard.attribution import METHODS, Method, WordAttribution
from sd_guard.cli import explaining
from sd_guard.cli.explaining import MethodName, column, draw, explain, printable, tinted
from sd_guard.guard import Guard
from sd_guard.pipelines import explanation as explanation_module
from sd_guard.pipelines.explanation import Explanation, look
from sd_guard.reference import checkpoint_path, load_truth
from sd_guard.screening.loading import load_pipeline
from sd_guard.screening.settings import ModelSettings

pytest.importorskip("captum", reason="needs captum: pip install 'sd-guard[explain]'")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'sd-guard[explain]'")

HOSTILE = "a $\\frac{x cat\x1b[2J\x1b]0;t\x07 \u202egnp.exe \x9b31m <b>&amp; é日"
WORDS = WordAttribution(words=tuple("a red cat".split()), scores=(-0.25, 0.25, 0.75), method="ablation")


def run(*arguments: str) -> int:
    """As `sd-guard explain` would; returns its exit code."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(explain)
    return app(list(arguments), standalone_mode=False) or 0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.png").write_text("x")
    return tmp_path


BAD = [
    ([" ", "--out", "x.png"], "the prompt is empty"),
    (["a \udcff", "--out", "x.png"], "no UTF-8"),
    (["a", "--out", "x.jpg"], "is no .png"),
    (["a", "--out", "taken.png"], "exists already"),
    (["a", "--out", "none/x.png"], "no such folder"),
    (["a", "--out", "x.png", "--seed", "-1"], "--seed is -1"),
    (["a", "--out", "x.png", "--steps", "0"], "--steps is 0"),
    (["a", "--out", "x.png", "--guidance-scale", "nan"], "--guidance-scale is nan"),
    (["a", "--out", "x.png", "--device", "tpu"], "--device is 'tpu'"),
    (["a", "--out", "x.png", "--model", "./none"], "neither a checkpoint folder nor a hub name"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_one_line_before_a_model_is_loaded(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("sd_guard.screening.loading.load_pipeline", lambda _: pytest.fail("a model was loaded"))
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert [path.name for path in folder.iterdir()] == ["taken.png"]


def test_a_missing_extra_is_named(folder, capsys, monkeypatch):
    monkeypatch.setattr(explaining, "find_spec", lambda name: None if name == "captum" else name)
    assert run("a", "--out", "x.png") == 2
    assert "captum not installed; pip install 'sd-guard[explain]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib; pip install 'sd-guard\[explain\]'"):
        draw(explanation(), folder / "x.png")


def test_whatever_the_model_raises_is_one_line(folder, capsys, monkeypatch):
    def exhausted(*_, **__):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(explanation_module, "look", exhausted)
    assert run("a", "--out", "x.png") == 1
    assert capsys.readouterr().err == "error: the prompt could not be explained (RuntimeError: out of memory)\n"


def test_methods_are_those_of_the_library():
    assert set(get_args(MethodName)) == set(get_args(Method)) == set(METHODS)


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline(ModelSettings(model=str(checkpoint_path()), device="cpu"))


@pytest.fixture(scope="module")
def memorized():
    return next(row["prompt"] for row in load_truth() if (row["family"], row["split"]) == ("verbatim", "tune"))


@pytest.mark.parametrize("method", METHODS)
def test_score_and_verdict_are_those_of_a_guarded_call(pipe, memorized, method):
    found = look(pipe, memorized, steps=20, seed=2**62 + 5, method=method)
    guarded = pipe(memorized, generator=seeded(2**62 + 5), num_inference_steps=20, output_type="latent")
    (record,) = guarded.records
    assert (found.verdict, found.step, found.count) == (record.verdict, record.decided_at_step, 20)
    assert found.score == pytest.approx(record.score, rel=1e-4)
    assert found.threshold == pipe.guard.detector.threshold
    assert found.words.method == method and found.words.words == tuple(memorized.split())
    assert found.image.shape == (3, 64, 64) and 0 <= found.image.min() < found.image.max() <= 1
    assert found.left_open.shape == found.left_open_without.shape == (8, 8)
    assert not torch.equal(found.left_open, found.left_open_without)


@pytest.mark.parametrize(("threshold", "step"), [(9.0, 1), (0.0, 19)])
def test_what_the_guard_looks_at_once_is_explained_by_that(pipe, threshold, step):
    """An ordinary prompt, out of reach of the first threshold, and within that of the second."""
    novel = next(row["prompt"] for row in load_truth() if (row["family"], row["split"]) == ("novel", "tune"))
    before = pipe.guard
    detector = dataclasses.replace(before.detector, threshold=threshold)
    pipe.enable_guard(dataclasses.replace(before, detector=detector))
    try:
        found = look(pipe, novel, steps=20, seed=1, method="gradient_norm")
        (record,) = pipe(novel, generator=seeded(1), num_inference_steps=20, output_type="latent").records
    finally:
        pipe.enable_guard(before)
    assert (found.verdict, found.step) == (record.verdict, record.decided_at_step) == ("pass", step)
    assert found.score == pytest.approx(record.score, rel=1e-4)


def test_a_memorized_prompt_end_to_end(folder, capsys, memorized):
    assert run(memorized, "--out", "x.png", "--device", "cpu") == 0
    head, *lines, last = capsys.readouterr().out.splitlines()
    guard = Guard()
    assert head.startswith("flag: score ")
    assert head.endswith(f"threshold {guard.detector.threshold:.3g}, at step {guard.steps(50)[-1]} of 50")
    assert last == "figure: x.png"
    shares = [(float(share.rstrip("%")), word) for share, word in map(str.split, lines)]
    assert [word for _, word in shares] == memorized.split()
    assert max(shares)[1] in memorized.split()[-2:]
    assert sum(share for share, _ in shares if share > 0) == pytest.approx(100, abs=1)
    with Image.open("x.png") as figure:
        pixels = np.asarray(figure.convert("RGB"))
    assert pixels.shape[1] > 1500 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000


def test_a_hostile_prompt_end_to_end(folder, capsys):
    assert run(HOSTILE, "--out", "x.png", "--device", "cpu", "--steps", "5", "--method", "gradient_norm") == 0
    out, err = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in out + err)
    assert out.count("\n") == 2 + len(HOSTILE.split())
    assert "cat\\x1b[2J\\x1b]0;t\\x07" in out and "\\u202egnp.exe" in out and "\\x9b31m" in out and "é日" in out
    assert (folder / "x.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("terminal", "no_color", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_tint_only_on_a_terminal_that_wants_colour(folder, capsys, monkeypatch, terminal, no_color, coloured):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sd_guard.screening.loading.load_pipeline", lambda _: None)
    monkeypatch.setattr(explanation_module, "look", lambda *_, **__: explanation())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert run("a red cat", "--out", "x.png") == 0
    out = capsys.readouterr().out
    assert ("\x1b[" in out) == coloured
    assert (tinted(WORDS) if coloured else column(WORDS)) in out


def test_the_redder_the_more():
    text = tinted(WORDS)
    assert text.split("\n")[0].startswith("a \x1b[38;5;16m\x1b[48;5;217m red \x1b[0m")  # untinted, a third, all
    assert "\x1b[48;5;196m cat \x1b[0m" in text
    assert text.split("\n")[1] == "cat 75%, red 25%"
    nothing = dataclasses.replace(WORDS, scores=(-1.0, 0.0, 0.0))
    assert tinted(nothing) == "a red cat\nno word raises the detail that the prompt adds"
    assert column(WORDS) == " -25.0%  a\n  25.0%  red\n  75.0%  cat"


def test_what_steers_a_terminal_is_written_out():
    assert printable("a\x1b[31m\x00\x7f\x9b\u200b\u202e\u2028\ud800") == (
        "a\\x1b[31m\\x00\\x7f\\x9b\\u200b\\u202e\\u2028\\ud800"
    )
    assert printable("naïve 日本 🙂 $x$ \\") == "naïve 日本 🙂 $x$ \\"


def explanation(words: WordAttribution = WORDS) -> Explanation:
    ramp = torch.linspace(0, 1, 64).reshape(8, 8)
    return Explanation(
        verdict="flag",
        score=1.0,
        threshold=0.25,
        step=3,
        shown=20,
        count=50,
        words=words,
        image=ramp.repeat(3, 1, 1),
        left_open=ramp,
        left_open_without=ramp.flip(0),
    )


def test_figures_of_many_long_words_and_of_one(folder):
    many = WordAttribution(words=("$\\frac{" * 20,) * 90, scores=(1 / 90,) * 90, method="integrated_gradients")
    one = WordAttribution(words=("x",), scores=(0.0,), method="gradient_norm")
    sizes = []
    for k, words in enumerate((many, one)):
        draw(explanation(words), folder / f"{k}.png")
        with Image.open(folder / f"{k}.png") as figure:
            sizes.append(figure.size)
    assert sizes[0][0] == sizes[1][0] and 500 < sizes[1][1] < sizes[0][1] < 1500
