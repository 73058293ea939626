"""The benchmark at full size: its lines are complete, and its numbers possible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sd_guard.bench.run import plan_device, run_bench
from sd_guard.bench.settings import BenchSettings
from sd_guard.mitigation import MITIGATIONS

pytestmark = pytest.mark.gpu
UNET_FLOPS = 803e9  # of one lane at 64 x 64, of either architecture


def measure(**options: Any) -> dict[str, dict[str, Any]]:
    settings = BenchSettings(device="cuda", steps=4, repeats=2, warmup=1, **options)
    return {line["case"]: line for line in run_bench(settings, plan_device(settings))}


@pytest.mark.parametrize("arch", ["sd15", "sd21"])
def test_overhead_at_full_size(arch: Any, tmp_path: Path) -> None:
    lines = measure(suite="overhead", arch=arch, dtypes=("float16",), batches=(1,), profile=tmp_path)
    plain, guarded = lines["sdpa, unguarded"], lines["sdpa, guarded, none in doubt"]
    for line in (plain, guarded):
        assert line["failed"] is None
        assert line["flops"] > line["lanes"] * UNET_FLOPS
        assert 0 < line["ceiling_share"] < 1
        assert 0 < line["resident_mib"] < line["peak_mib"]
    assert plain["lanes"] == guarded["lanes"] == 8
    assert guarded["host_waits"] >= plain["host_waits"]
    traces = sorted(tmp_path.iterdir())
    assert len(traces) >= 6
    assert "traceEvents" in json.loads(traces[0].read_text(encoding="utf-8"))


def test_every_mitigation_at_full_size() -> None:
    lines = measure(suite="mitigation", arch="sd15", dtypes=("float16",), batches=(1,))
    assert set(lines) == {"none", *MITIGATIONS}
    assert {name: line["failed"] for name, line in lines.items() if line["failed"]} == {}


def test_peers_at_full_size() -> None:
    lines = measure(suite="peers", arch="sd15")
    assert {name: line["failed"] for name, line in lines.items() if line["failed"]} == {}
    assert lines["guard, quick depth"]["seconds"] < lines["flipd, 50 Gaussian probes, forward mode, float32"]["seconds"]


def test_screening_at_full_size_is_held_to_the_bare_unet() -> None:
    lines = measure(suite="screen", arch="sd15", batches=(8,))
    for name in ("none in doubt", "all in doubt"):
        assert lines[f"quick depth, {name}"]["lanes"] == lines[f"bare UNet, {name}"]["lanes"]
        assert lines[f"quick depth, {name}"]["ratio"] > 0.9


def test_differences_are_as_near_as_the_cpu_says_where_convolutions_are_not_rounded() -> None:
    settings = BenchSettings(suite="trace", device="cuda", steps=50, repeats=1, warmup=0, batches=(4,))
    lines = list(run_bench(settings, plan_device(settings)))
    assert [line["case"] for line in lines if line["failed"]] == []
    exact = [line for line in lines if "error" in line and not line["tf32_convolutions"]]
    error = {(line["case"], line["dtype"]): line["error"] for line in exact}
    for dtype, bound in (("float32", 1e-4), ("float16", 5e-3), ("bfloat16", 2e-2)):
        assert error["finite-difference", dtype] < bound
        assert error["forward-mode", dtype] < bound
