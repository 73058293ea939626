"""What needs a GPU, part by part within a limit of time: `python -m benchmarks.gpu --out FOLDER [--only PARTS]`.

The parts run in the order of what they are worth, each in a process of its own and no longer than `PARTS` says; one
that is ended keeps the groups of cases that it has measured. `FOLDER/gpu.jsonl` has a line a result, `FOLDER/log.txt`
what the parts printed; it ends with the figures that are asked for (`benchmarks.gpu_table`). `--smoke` goes through the
benchmarks on the CPU, with little of each. Needs nothing but what `sd_guard` imports, and for the tests pytest and
hypothesis; of the tree neither the folders of `benchmarks/reference/` nor `benchmarks/results/`: remove these from a
copy that has to be small.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu_table import read_lines, table

ROOT = Path(__file__).parents[1]
TESTS, MEMORY = "tests", "memory"
PARTS = {  # s; what compiles needs one to one and a half minutes for each shape of its UNet
    "peers": 150,
    "screen": 240,
    "compiled": 360,
    "eager": 260,
    "error": 120,
    "waits": 90,
    TESTS: 240,
    MEMORY: 90,
    "trace": 240,
    "mitigation": 420,
}
FULL = ("--arch", "sd15", "--dtype", "bfloat16", "--warmup", "1")
OVERHEAD = ("--suite", "overhead", *FULL, "--no-flops", "--guard", "none,once", "--repeats", "40", "--seconds", "30")
SMOKE_KERNELS = {"compiled": "matmul", "eager": "sdpa,absent", "waits": "sdpa"}  # a CPU may have no compiler
SMOKE = ("--device", "cpu", "--batch", "1", "--steps", "4", "--repeats", "1", "--warmup", "0")
OPTIONS = {
    "peers": ("--suite", "peers", *FULL, "--repeats", "10", "--seconds", "30"),
    "screen": ("--suite", "screen", *FULL, "--compile", "--batch", "64", "--repeats", "20", "--seconds", "20"),
    "compiled": (*OVERHEAD, "--compile", "--kernel", "compiled"),
    "eager": (*OVERHEAD, "--kernel", "sdpa,absent"),
    # Random weights have no error that says anything: the bundled model's, on the GPU's own arithmetic.
    "error": ("--suite", "trace", "--arch", "reference", "--dtype", "bfloat16", "--repeats", "1", "--warmup", "1"),
    "waits": (
        *("--suite", "overhead", *FULL, "--no-flops", "--kernel", "sdpa"),
        *("--batch", "4", "--steps", "20", "--repeats", "1"),
    ),
    "trace": ("--suite", "trace", "--arch", "sd15", "--repeats", "1", "--warmup", "1"),
    "mitigation": ("--suite", "mitigation", *FULL, "--no-flops", "--batch", "1", "--repeats", "3"),
}


def command(part: str, out: Path, traces: str, smoke: bool) -> list[str]:
    """What runs a part; the host's waits are read from traces, which are not kept."""
    if part == TESTS:
        return [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "tests/gpu/test_guard.py",
            "tests/pipelines/test_stable_diffusion.py",
        ]
    if part == MEMORY:
        size = ("--arch", "reference", "--device", "cpu") if smoke else ("--dtype", "bfloat16", "--batches", "1", "4")
        return [sys.executable, "-m", "benchmarks.memory", *size, "--append", str(out / "gpu.jsonl")]
    options = list(OPTIONS[part])
    if smoke:
        options = [*OPTIONS[part][:2], *SMOKE]
        options += ["--kernel", SMOKE_KERNELS[part]] if part in SMOKE_KERNELS else []
        options += ["--dtype", "bfloat16"] if part == "error" else []
    if part == "waits":
        options += ["--profile", traces]
    return [sys.executable, "-m", "sd_guard.cli", "bench", *options, "--out", str(out / "gpu.jsonl")]


def run_part(part: str, out: Path, seconds: float, smoke: bool) -> str:
    """How it ended: `done`, `ended after N s`, or `failed` and where to look."""
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": search, "PYTHONUNBUFFERED": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with (out / "log.txt").open("a", encoding="utf-8") as log, tempfile.TemporaryDirectory() as traces:
        print(f"== {part}", file=log, flush=True)
        child = subprocess.Popen(
            command(part, out, traces, smoke),
            cwd=ROOT,
            env=os.environ | own,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # with the compiler's workers, which would slow down the next part
            child.wait()
            return f"ended after {seconds:.0f} s"
    return "done" if code == 0 else f"failed, {code}: {log.name}"


def name_revision(file: Path, revision: str) -> None:
    """Writes the revision into the lines of a copy of the tree that is no repository; drops a line that was cut off."""
    if not file.is_file():
        return
    kept: list[str] = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if line["provenance"]["git"] == "unknown":
            line["provenance"]["git"] = revision
        kept.append(json.dumps(line) + "\n")
    whole = file.with_suffix(".new")
    whole.write_text("".join(kept), encoding="utf-8")
    whole.replace(file)


def main() -> None:
    """Command line; exits with 1 where a part is not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas; all of them if left out")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--revision", default="unknown", help="of the tree, where it was copied without its repository")
    parser.add_argument("--smoke", action="store_true", help="the benchmarks on the CPU, little of each")
    args = parser.parse_args()
    parts = [part.strip() for part in args.only.split(",")]
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--only names {unknown[0]!r}; use some of {','.join(PARTS)}")
    try:
        import sd_guard.cli  # noqa: F401
    except ImportError as error:  # a package that is too old, say: told before the first part
        parser.error(f"sd_guard cannot be imported ({error}): install what its pyproject.toml asks for")
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    until, undone = time.monotonic() + 60 * args.minutes, 0
    for part in parts:
        started = time.monotonic()
        left = min(PARTS[part], until - started)
        how = run_part(part, out, left, args.smoke) if left > 1 else "no time left"
        name_revision(out / "gpu.jsonl", args.revision)
        undone += how != "done"
        print(f"{part}: {how} ({time.monotonic() - started:.0f} s)", flush=True)
    if (out / "gpu.jsonl").is_file():
        print(table(read_lines(out / "gpu.jsonl")))
    sys.exit(1 if undone else 0)


if __name__ == "__main__":
    main()
