"""The table of what GPU results are held to: right ratios of the right lines, and none where a line is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_table
from benchmarks.gpu_table import figures, read_lines, table

WHERE = {"device": "a GPU", "versions": {"torch": "2.13.0"}, "git": "abc"}


def line(suite: str, case: str, batch: int, seconds: float, **more: Any) -> dict[str, Any]:
    common = {"arch": "sd15", "dtype": "bfloat16", "failed": None, "host_waits": None, "provenance": WHERE}
    return {**common, "suite": suite, "case": case, "batch": batch, "seconds": seconds, **more}


def lines() -> list[dict[str, Any]]:
    found = []
    for kernel, seconds in (("sdpa", 2.0), ("compiled", 1.0)):
        for batch in (1, 4, 16):
            for name, ratio in (("unguarded", 1.0), ("guarded, none in doubt", 1.001)):
                own = {"ratio": ratio, "ratio_quartiles": [ratio, ratio + 0.001]}
                own |= {"peak_mib": 4000.0, "latents_peak_mib": 3000.0}
                found.append(line("overhead", f"{kernel}, {name}", batch, seconds, **own))
            once = {"ratio": 1.03 if (kernel, batch) == ("compiled", 16) else 1.022, "ratio_quartiles": [1.02, 1.04]}
            once |= {"peak_mib": 4100.0, "latents_peak_mib": 3300.0}
            found.append(line("overhead", f"{kernel}, guarded, all probed once", batch, seconds, **once))
    found += [
        line("overhead", f"absent, {name}", batch, 0.1, seconds_more=more)
        for batch in (1, 4, 16)
        for name, more in (("unguarded", 0.0), ("guarded, none in doubt", 0.004))
    ]
    for batch, seconds in ((16, 0.1), (64, 0.2), (256, 1.0)):  # 64: 320 prompts a second
        found.append(line("screen", "bare UNet, none in doubt", batch, 0.19, prompts=batch))
        found.append(line("screen", "quick depth, none in doubt", batch, seconds, prompts=batch, ceiling_share=0.4))
    found += [
        line("peers", "sail, forward mode, 4 images", 1, 0.02),
        line("peers", "sail, forward mode, 4 images, float32", 1, 0.05),
        line("peers", "wen, first step, 4 images", 1, 0.01),
        line("peers", "flipd, 50 Gaussian probes, forward mode, float32", 1, 3.0),
        line("peers", "guard, trajectory LID, 1 probe", 1, 0.02),
    ]
    errors = {"error": 0.001, "error_1_probes": 0.01}
    for arch, dtype, factor in (
        ("reference", "bfloat16", 1.0),
        ("sd15", "bfloat16", 9.0),
        ("reference", "float32", 0.1),
    ):
        own = {name: factor * value for name, value in errors.items()}
        found.append(line("trace", "finite-difference", 4, 0.1, **own) | {"arch": arch, "dtype": dtype})
    return found


def rows(found: list[dict[str, Any]]) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in figure.row.strip("|").split("|")] for figure in figures(found)]
    return {name: rest for name, *rest in cells}


def test_every_figure_of_a_whole_run() -> None:
    shown = rows(lines())
    assert len(shown) == 2 * 3 * 3 + 5 + 3 + 2
    assert shown["sdpa, batch 1: all probed once, over unguarded"] == [
        "1.0220 (1.0200 to 1.0400)",
        "at most 1.025",
        "yes",
    ]
    assert shown["compiled, batch 16: all probed once, over unguarded"] == [
        "1.0300 (1.0200 to 1.0400)",
        "at most 1.025",
        "no",
    ]
    assert shown["sdpa, batch 4: none in doubt, over unguarded"] == [
        "1.0010 (1.0010 to 1.0020)",
        "at most 1.003",
        "yes",
    ]
    assert shown["sdpa, batch 4: the guard's own time without a UNet, share"] == ["0.0020", "at most 0.003", "yes"]
    assert shown["compiled, batch 4: the guard's own time without a UNet, share"] == ["0.0040", "at most 0.003", "no"]
    assert shown["quick depth, batch 64: of the bare UNet's speed"] == ["0.950", "at least 0.92", "yes"]
    assert shown["quick depth: of the matrix product's operations"] == ["0.400", "at least 0.5", "no"]
    assert shown["quick depth: prompts a second, over SAIL as published, float32"] == ["16.0", "at least 10", "yes"]
    assert shown["quick depth: prompts a second, over SAIL"] == ["6.4", "at least 10", "no"]
    assert shown["quick depth: prompts a second, over Wen et al., first step"] == ["3.2", "at least 4", "no"]
    assert shown["FLIPD by 50 probes, over one probe of the trajectory LID: time"] == ["150.0", "at least 50", "yes"]
    memory = shown["sdpa, batch 4: peak memory, all probed once over unguarded"]
    assert memory == ["1.025", "at most 1.05", "yes"]
    alone = shown["sdpa, batch 4: peak memory without decoding, all probed once over unguarded"]
    assert alone == ["1.100", "at most 1.05", "no"]
    arithmetic = shown["one probe on the bundled model: error in dimensions of 256, arithmetic"]
    assert arithmetic == ["0.256", "to be stated", ""]
    probe = shown["one probe on the bundled model: error in dimensions of 256, one random probe's, arithmetic included"]
    assert probe == ["2.560", "to be stated", ""]


@pytest.mark.parametrize("missing", range(len(lines())))
def test_what_was_not_measured_has_no_figure_and_the_others_theirs(missing: int) -> None:
    whole, left = lines(), lines()
    if missing % 2:
        del left[missing]
    else:
        left[missing]["failed"] = "OutOfMemoryError"
    before, after = (sorted(rows(found).values()) for found in (whole, left))
    changed = [row for row in after if row not in before]
    assert all(row[0] == "not measured" or whole[missing]["suite"] == "screen" for row in changed)


def test_lines_of_a_profiled_run_do_not_count() -> None:
    slow = line(
        "overhead", "sdpa, guarded, all probed once", 4, 9.0, ratio=4.0, ratio_quartiles=[4.0, 4.0], peak_mib=1.0
    ) | {"host_waits": 7}
    assert rows([*lines(), slow]) == rows(lines())


def test_the_table_names_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.jsonl"
    memory = {"suite": "memory", "batches": [], "provenance": WHERE}
    file.write_text("\n".join(json.dumps(each) for each in [*lines(), memory]))
    monkeypatch.setattr(sys, "argv", ["gpu_table", str(file)])
    gpu_table.main()
    out = capsys.readouterr().out
    assert out.startswith("a GPU; torch 2.13.0; sd15 in bfloat16; revision abc\n")
    assert out.count("| yes |") > 10
    assert table([]).count("not measured") == len(figures([]))
    assert read_lines(file) == lines()
