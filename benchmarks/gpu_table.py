"""The figures that GPU results are held to, as a table: `python -m benchmarks.gpu_table FOLDER/gpu.jsonl`.

Each is a ratio within one run of `benchmarks.gpu`, which ends with it; what was not measured has no figure.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Line = dict[str, Any]
PLAIN, NONE, ONCE = "unguarded", "guarded, none in doubt", "guarded, all probed once"
QUICK, BARE = "quick depth, none in doubt", "bare UNet, none in doubt"
MEMORY_BATCH: Final = 4
DIMENSION: Final = 256  # of the bundled model's latents


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure and what it is held to.

    Attributes:
        name: of its row.
        value: None where a line that it needs is missing or failed.
        bound: that it has to keep; None for one that is to be stated.
        at_most: whether that is the most it may be, else the least.
        digits: that are shown.
        quartiles: of the value over turns, where known.
    """

    name: str
    value: float | None
    bound: float | None
    at_most: bool = True
    digits: int = 3
    quartiles: Sequence[float] | None = None

    @property
    def row(self) -> str:
        """Of a Markdown table."""
        if self.value is None:
            return f"| {self.name} | not measured | {self._bound} | |"
        low, high = self.quartiles or (None, None)
        spread = "" if low is None or high is None else f" ({low:.{self.digits}f} to {high:.{self.digits}f})"
        return f"| {self.name} | {self.value:.{self.digits}f}{spread} | {self._bound} | {self._met(self.value)} |"

    def _met(self, value: float) -> str:
        if self.bound is None:
            return ""
        return "yes" if (value <= self.bound if self.at_most else value >= self.bound) else "no"

    @property
    def _bound(self) -> str:
        return "to be stated" if self.bound is None else f"{'at most' if self.at_most else 'at least'} {self.bound:g}"


def figures(lines: Sequence[Line]) -> list[Figure]:
    """All of them, from the lines of one machine and one architecture; of lines of the same case the last counts.

    Of the suite trace those of the bundled model count alone, in the dtype of the others.
    """
    timed = [line for line in lines if not line["failed"] and line["host_waits"] is None]  # a trace takes time
    wanted = [line for line in timed if line["suite"] != "trace" or _says_an_error(line)]
    known = {(line["suite"], line["case"], line["batch"]): line for line in wanted}
    return [*_overhead(known), *_screening(known), *_probe(known), *_memory(known)]


Known = dict[tuple[str, str, int], Line]


def _says_an_error(line: Line) -> bool:
    return (line["arch"], line["dtype"]) == ("reference", "bfloat16")


def _overhead(known: Known) -> Iterator[Figure]:
    for kernel in ("sdpa", "compiled"):
        for batch in (1, 4, 16):
            name = f"{kernel}, batch {batch}"
            plain, none, once = (_of(known, "overhead", f"{kernel}, {case}", batch) for case in (PLAIN, NONE, ONCE))
            for title, line, most in (("all probed once", once, 1.025), ("none in doubt", none, 1.003)):
                quartiles = None if line is None else line["ratio_quartiles"]
                yield Figure(f"{name}: {title}, over unguarded", _get(line, "ratio"), most, True, 4, quartiles)
            more = _get(_of(known, "overhead", f"absent, {NONE}", batch), "seconds_more")
            own = _combine(lambda more, whole: more / whole, more, _get(plain, "seconds"))
            yield Figure(f"{name}: the guard's own time without a UNet, share", own, 0.003, True, 4)


def _screening(known: Known) -> Iterator[Figure]:
    lines = [line for (suite, case, _), line in known.items() if (suite, case) == ("screen", QUICK)]
    best = max(lines, key=lambda line: line["prompts"] / line["seconds"], default=None)
    bare = None if best is None else _of(known, "screen", BARE, best["batch"])
    quick = _get(best, "seconds")
    share = _combine(lambda a, b: a / b, _get(bare, "seconds"), quick)
    yield Figure(f"quick depth, batch {best['batch'] if best else '?'}: of the bare UNet's speed", share, 0.92, False)
    yield Figure("quick depth: of the matrix product's operations", _get(best, "ceiling_share"), 0.5, False)
    a_prompt = None if best is None else best["seconds"] / best["prompts"]
    for name, case, least in (
        ("SAIL as published, float32", "sail, forward mode, 4 images, float32", 10),
        ("SAIL", "sail, forward mode, 4 images", 10),
        ("Wen et al., first step", "wen, first step, 4 images", 4),
    ):
        theirs = _get(_of(known, "peers", case, 1), "seconds")
        ratio = _combine(lambda a, b: a / b, theirs, a_prompt)
        yield Figure(f"quick depth: prompts a second, over {name}", ratio, least, False, 1)


def _probe(known: Known) -> Iterator[Figure]:
    names = ("flipd, 50 Gaussian probes, forward mode, float32", "guard, trajectory LID, 1 probe")
    theirs, own = (_get(_of(known, "peers", name, 1), "seconds") for name in names)
    ratio = _combine(lambda a, b: a / b, theirs, own)
    yield Figure("FLIPD by 50 probes, over one probe of the trajectory LID: time", ratio, 50, False, 1)
    line = next((line for (*case, _), line in known.items() if case == ["trace", "finite-difference"]), None)
    for name, key in (("arithmetic", "error"), ("one random probe's, arithmetic included", "error_1_probes")):
        error = _combine(lambda share: share * DIMENSION, _get(line, key))
        yield Figure(f"one probe on the bundled model: error in dimensions of {DIMENSION}, {name}", error, None)


def _memory(known: Known) -> Iterator[Figure]:
    plain, once = (_of(known, "overhead", f"sdpa, {case}", MEMORY_BATCH) for case in (PLAIN, ONCE))
    for name, key in (("", "peak_mib"), (" without decoding", "latents_peak_mib")):
        ratio = _combine(lambda a, b: a / b, _get(once, key), _get(plain, key))
        title = f"sdpa, batch {MEMORY_BATCH}: peak memory{name}, all probed once over unguarded"
        yield Figure(title, ratio, 1.05)


def _of(known: Known, suite: str, case: str, batch: int) -> Line | None:
    return known.get((suite, case, batch))


def _get(line: Line | None, name: str) -> float | None:
    return None if line is None else line.get(name)


def _combine(compute: Callable[..., float], *values: float | None) -> float | None:
    return None if any(value is None for value in values) else compute(*values)


def read_lines(path: Path) -> list[Line]:
    """The results of a file, those of `sd-guard bench` only."""
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "case" in line]


def table(lines: Sequence[Line]) -> str:
    """Markdown, with the machine that it was measured on."""
    where = lines[-1]["provenance"] if lines else {"device": "nothing", "versions": {}, "git": "unknown"}
    arch = ", ".join(sorted({f"{line['arch']} in {line['dtype']}" for line in lines if line["suite"] != "trace"}))
    head = f"{where['device']}; torch {where['versions'].get('torch')}; {arch}; revision {where['git']}"
    rows = [figure.row for figure in figures(lines)]
    return "\n".join([head, "", "| figure | measured | asked | met |", "|---|---|---|---|", *rows])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    results: Path = parser.parse_args().results
    if not results.is_file():
        parser.error(f"{results}: no such file; name the gpu.jsonl that benchmarks.gpu wrote")
    print(table(read_lines(results)))


if __name__ == "__main__":
    main()
