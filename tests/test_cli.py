"""The command line: bad input is one line and an exit code, before a model is loaded; help is quick."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import the_error

from sd_guard.cli import main
from sd_guard.reference import checkpoint_path

OK = "prompt\na cat\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "ok.csv").write_text(OK)
    (tmp_path / "columns.csv").write_text("text\nx\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    (tmp_path / "taken.png").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    (tmp_path / "bare").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


SCREEN = ["screen", "ok.csv", "--out", "new", "--model", "model"]
BAD = [
    (["screen"], "Missing argument"),
    (["scren"], "No such command"),
    (["screen", "none.csv", "--out", "new", "--model", "model"], "no such file"),
    (["screen", "empty.txt", "--out", "new", "--model", "model"], "has no prompts"),
    (["screen", "columns.csv", "--out", "new", "--model", "model"], "found 'text'"),
    (["screen", "ok.csv", "--out", "used", "--model", "model"], "is not empty; add --resume"),
    (["screen", "ok.csv", "--out", "ok.csv", "--model", "model"], "is a file"),
    (["screen", "ok.csv", "--out", "new", "--model", "./none"], "neither a checkpoint folder nor a hub name"),
    (["screen", "ok.csv", "--out", "new", "--model", "bare"], "has no model_index.json"),
    (
        ["screen", "ok.csv", "--out", "ok.csv/run", "--model", "model"],
        "ok.csv/run: cannot be written (Not a directory)",
    ),
    (["screen", "ok.csv", "--out", "", "--model", "model"], "--out is empty; name a folder"),
    ([*SCREEN, "--steps", "0"], "--steps is 0"),
    ([*SCREEN, "--steps", "many"], "Invalid value for '--steps'"),
    ([*SCREEN, "--depth", "deep"], "Invalid value for '--depth': 'deep' is not one of 'quick', 'full', 'auto'"),
    ([*SCREEN, "--batch-size", "0"], "--batch-size is 0"),
    ([*SCREEN, "--seeds", "0"], "--seeds is 0"),
    ([*SCREEN, "--seed", "-1"], "--seed is -1"),
    ([*SCREEN, "--budget", "-1"], "--budget is -1"),
    ([*SCREEN, "--guidance-scale", "nan"], "--guidance-scale is nan"),
    ([*SCREEN, "--height", "63"], "--height is 63"),
    ([*SCREEN, "--dtype", "int8"], "Invalid value for '--dtype'"),
    ([*SCREEN, "--on-failure", "raise"], "Invalid value for '--on-failure'"),
    ([*SCREEN, "--device", "tpu"], "--device is 'tpu'"),
    ([*SCREEN, "--calibration", "none.json"], "none.json: no such file"),
    ([*SCREEN, "--calibration", "ok.csv"], "calibration 'ok.csv' is not a calibration file"),
    ([*SCREEN, "--depth", "deep"], "Invalid value for '--depth'"),
    ([*SCREEN, "--depth", "quick", "--keep-before"], "--keep-before: --depth quick makes no images"),
    ([*SCREEN, "--max-unscored", "2"], "--max-unscored is 2.0; use a share from 0 to 1"),
    ([*SCREEN, "--workers", "2"], "--workers 2: is for --engine ray"),
    ([*SCREEN, "--ray-address", "auto"], "--ray-address auto: is for --engine ray"),
    ([*SCREEN, "--engine", "ray", "--workers", "0"], "--workers is 0"),
    ([*SCREEN, "--metrics-file", "none/x.prom"], "there is no folder none; make it first"),
    (["screen", "-", "--out", "new", "--model", "model"], "standard input: its format is not known"),
    (["screen", "*.json", "--out", "new", "--model", "model"], "*.json: matches no file"),
    (["screen", "taken.png", "--out", "new", "--model", "model"], "unknown extension '.png'"),
    (["screen", "ok.csv", "--out", "nowhere://new", "--model", "model"], "nowhere://new: cannot be used as a folder"),
    (["generate", " ", "--out", "x.png", "--model", "model"], "the prompt is empty"),
    (["generate", "a", "--out", "x.jpg", "--model", "model"], "is no .png"),
    (["generate", "a", "--out", "taken.png", "--model", "model"], "exists already"),
    (["generate", "a", "--out", "none/x.png", "--model", "model"], "no such folder"),
    (["lid", "taken.png", "--prompt", " ", "--model", "model"], "--prompt is empty"),
    (["lid", "taken.png", "--prompt", "a", "--model", "model"], "is no image that can be read"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_arguments_are_one_line_and_exit_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 2
    assert message in the_error(capsys)
    assert sorted(folder.rglob("*")) == before


def test_report_of_no_run_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "used"]) == 1
    assert "used: has no run.json, so it is no run of `sd-guard screen`" in the_error(capsys)


def test_a_model_that_cannot_be_loaded_is_one_line_and_leaves_the_folder_free(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert main(SCREEN) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: model: cannot be loaded")
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "command", [["screen", "ok.csv", "--out", "new"], ["generate", "a", "--out", "x.png", "--steps", "2"]]
)
def test_a_model_that_cannot_be_guarded_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    shutil.copytree(checkpoint_path(), folder / "edm")
    index = folder / "edm" / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "EDMEulerScheduler"))
    (folder / "edm" / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EDMEulerScheduler"}')
    assert main([*command, "--model", "edm"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: edm: cannot be guarded (TypeError: EDMEulerScheduler")
    assert err.count("\n") == 1


def test_a_calibration_that_does_not_fit_is_told_before_anything_is_screened(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one prompt, too; the folder stays free."""
    (folder / "one.txt").write_text("a ball\n")
    calibration = str(checkpoint_path() / "calibration.json")
    for command in (["screen", "one.txt", "--out", "new"], ["generate", "a", "--out", "x.png"]):
        assert main([*command, "--calibration", calibration, "--steps", "7"]) == 1
        assert "the calibration was made for another configuration" in (error := the_error(capsys)), error
        assert not (folder / "x.png").exists() and not (folder / "new" / "run.json").exists()


def test_an_image_that_cannot_be_scored_is_kept_and_is_no_pass(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One latent pixel has no detail."""
    arguments = ["generate", "a", "--out", "x.png", "--steps", "2", "--height", "8", "--width", "8"]
    assert main(arguments) == 1
    assert "unscored: score none" in (out := capsys.readouterr().out) and "not finite" in out
    assert (folder / "x.png").exists()


def test_help_lists_every_command_and_loads_neither_torch_nor_pyarrow() -> None:
    code = (
        "import sys; from sd_guard.cli import main; main(['--help']); main(['screen', '--help']);"
        "sys.exit(bool({'torch', 'diffusers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("screen", "generate", "report", "--keep-before", "--resume"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["screen", "empty.txt", "--out", "new"],
        ["generate", "a cat", "--out", "new.png", "--steps", "0"],
        ["evaluate", "empty.txt", "--out", "new"],
        ["calibrate", "empty.txt", "--out", "new.json"],
        ["lid", "none.png", "--prompt", "a cat"],
        ["explain", "a cat", "--out", "new.png", "--steps", "0"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_refusal_is_one_line_in_a_process_of_its_own(folder: Path, arguments: list[str]) -> None:
    """Where the libraries are imported for it, and would log."""
    done = subprocess.run(
        [sys.executable, "-m", "sd_guard.cli", *arguments], capture_output=True, text=True, check=False, cwd=folder
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
