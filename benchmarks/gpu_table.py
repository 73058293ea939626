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


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure and what it is held to.

    Attributes:
        name: of its row.
        value: None where a line that it needs is missing or failed.
        bound: that it has to keep.
        at_most: whether that is the most it may be, else the least.
        digits: that are shown.
    """

    name: str
    value: float | None
    bound: float
    at_most: bool
    digits: int = 3

    @property
    def row(self) -> str:
        """Of a Markdown table."""
        if self.value is None:
            return f"| {self.name} | not measured | {self._bound} | |"
        met = self.value <= self.bound if self.at_most else self.value >= self.bound
        return f"| {self.name} | {self.value:.{self.digits}f} | {self._bound} | {'yes' if met else 'no'} |"

    @property
    def _bound(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.bound:g}"


def figures(lines: Sequence[Line]) -> list[Figure]:
    """All of them, from the lines of one machine and one architecture; of lines of the same case the last counts."""
    timed = [line for line in lines if not line["failed"] and line["host_waits"] is None]  # a trace takes time
    known = {(line["suite"], line["case"], line["batch"]): line for line in timed}
    return [*_overhead(known), *_screening(known), *_probe(known), *_memory(known)]


Known = dict[tuple[str, str, int], Line]


def _overhead(known: Known) -> Iterator[Figure]:
    for kernel in ("sdpa", "compiled"):
        for batch in (1, 4, 16):
            name = f"{kernel}, batch {batch}"
            plain, none, once = (_of(known, "overhead", f"{kernel}, {case}", batch) for case in (PLAIN, NONE, ONCE))
            yield Figure(f"{name}: all probed once, over unguarded", _get(once, "ratio"), 1.025, True, 4)
            yield Figure(f"{name}: none in doubt, over unguarded", _get(none, "ratio"), 1.003, True, 4)
            absent = [_of(known, "overhead", f"absent, {case}", batch) for case in (PLAIN, NONE)]
            own = _combine(lambda a, b, whole: (b - a) / whole, *(_get(line, "seconds") for line in (*absent, plain)))
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


def _memory(known: Known) -> Iterator[Figure]:
    plain, once = (_of(known, "overhead", f"sdpa, {case}", MEMORY_BATCH) for case in (PLAIN, ONCE))
    ratio = _combine(lambda a, b: a / b, _get(once, "peak_mib"), _get(plain, "peak_mib"))
    yield Figure(f"sdpa, batch {MEMORY_BATCH}: peak memory, all probed once over unguarded", ratio, 1.05, True)


def _of(known: Known, suite: str, case: str, batch: int) -> Line | None:
    return known.get((suite, case, batch))


def _get(line: Line | None, name: str) -> float | None:
    return None if line is None else line[name]


def _combine(compute: Callable[..., float], *values: float | None) -> float | None:
    return None if any(value is None for value in values) else compute(*values)


def read_lines(path: Path) -> list[Line]:
    """The results of a file, those of `sd-guard bench` only."""
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "case" in line]


def table(lines: Sequence[Line]) -> str:
    """Markdown, with the machine that it was measured on."""
    where = lines[-1]["provenance"] if lines else {"device": "nothing", "versions": {}, "git": "unknown"}
    arch = ", ".join(sorted({f"{line['arch']} in {line['dtype']}" for line in lines}))
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
