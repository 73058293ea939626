"""What needs a GPU, part by part within a limit of time: `python -m benchmarks.gpu --out FOLDER [--only PARTS]`.

The parts run in the order of what they are worth, each in a process of its own; one that meets the limit is ended, and
keeps the results that it has. `FOLDER/gpu.jsonl` has a line a result, `FOLDER/PART.txt` what a part printed. `--smoke`
goes through all of it on the CPU. Needs nothing but what `sd_guard` imports, and of the tree neither the folders of
`benchmarks/reference/` nor `benchmarks/results/`, where a copy has to be small.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FULL = ("--arch", "sd15", "--dtype", "bfloat16", "--repeats", "3", "--warmup", "1")
SMOKE = ("--device", "cpu", "--dtype", "float32", "--steps", "4", "--repeats", "1", "--warmup", "0", "--batch", "1")
BENCH: dict[str, tuple[str, ...]] = {  # part: what `sd-guard bench` is asked for; traces are taken of few steps
    "overhead": ("--suite", "overhead", *FULL, "--compile"),
    "screen": ("--suite", "screen", *FULL, "--compile", "--batch", "64"),
    "waits": ("--suite", "overhead", *FULL, "--batch", "4", "--steps", "20", "--repeats", "1", "--profile"),
    "peers": ("--suite", "peers", *FULL),
    "trace": ("--suite", "trace", "--arch", "sd15", "--repeats", "1", "--warmup", "1"),
    "mitigation": ("--suite", "mitigation", *FULL, "--batch", "1"),
}
TESTS = "tests"
PARTS = (*BENCH, TESTS)


def command(part: str, out: Path, smoke: bool) -> list[str]:
    """What runs a part."""
    if part == TESTS:
        return [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "tests/gpu",
            "tests/pipelines/test_stable_diffusion.py",
        ]
    options = list(BENCH[part])
    if smoke:
        options = [*options[:2], *SMOKE, *options[-1:]] if options[-1] == "--profile" else [*options[:2], *SMOKE]
    if options[-1] == "--profile":
        traces = out / "traces"
        traces.mkdir(exist_ok=True)
        options.append(str(traces))
    return [sys.executable, "-m", "sd_guard.cli", "bench", *options, "--out", str(out / "gpu.jsonl")]


def run_part(part: str, out: Path, seconds: float, smoke: bool) -> str:
    """How it ended: `done`, `ended after N s` or `failed`."""
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (out / f"{part}.txt").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command(part, out, smoke),
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(search), "PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"ended after {seconds:.0f} s"
    return "done" if done.returncode == 0 else f"failed, {done.returncode}: {out / part}.txt"


def name_revision(file: Path, revision: str) -> None:
    """Writes the revision into the lines of a copy of the tree that is no repository itself."""
    if not file.is_file():
        return
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if line["provenance"]["git"] == "unknown":
            line["provenance"]["git"] = revision
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas; all of them if left out")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--revision", default="unknown", help="of the tree, where it was copied without its repository")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, little of each")
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--only names {unknown[0]!r}; use some of {','.join(PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * args.minutes
    for part in parts:
        started = time.monotonic()
        left = until - started
        how = run_part(part, args.out, left, args.smoke) if left > 1 else "no time left"
        print(f"{part}: {how} ({time.monotonic() - started:.0f} s)", flush=True)
    name_revision(args.out / "gpu.jsonl", args.revision)


if __name__ == "__main__":
    main()
