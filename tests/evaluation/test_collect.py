"""What is measured against trajectories walked one image at a time."""

from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from tiny import EVERYBODY, CountLanes, watching

from sd_guard.evaluation.collect import SCHEMA, collect
from sd_guard.evaluation.settings import image_seed
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.pipelines.trajectory import denoiser_of, walk
from sd_guard.screening.prompts import MAX_SEED, PromptRow

ROWS = [PromptRow("a cat", "novel"), PromptRow("a red dog", "verbatim", 7), PromptRow("blue", "plain")]
SETTINGS = {"steps": 5, "guidance_scale": 4.0, "observe_at": (0.0, 0.4), "progress": False}


def test_values_are_those_of_each_image_by_itself(pipe, norm, probed, alike):
    found = collect(pipe, ROWS, [norm, probed], [alike], seeds=3, batch_size=2, **SETTINGS)
    rows = {(r["index"], r["seed"], r["statistic"], r["step"]): r for r in found.values.to_pylist()}
    assert found.values.schema == SCHEMA
    expected = {}
    for index, row in enumerate(ROWS):
        features = []
        for seed in (start + i * 1_000_000 for start in [index if row.seed is None else row.seed] for i in range(3)):
            model = denoiser_of(pipe, [(seed + 0x9E3779B97F4A7C15) % 2**64])
            for call in walk(pipe, [row.prompt], [seed], steps=5, guidance_scale=4.0):
                if call.step in (0, 2):
                    expected[index, seed, "norm", call.step] = norm.measure(call, model).item()
                if call.step in (1, 3):
                    expected[index, seed, "probed", call.step] = probed.measure(call, model).item()
                if call.step == 0:
                    features.append(alike.feature(call, model))
        expected[index, None, "alike", 0] = alike.compare(torch.cat(features))
    assert rows.keys() == expected.keys()
    for key, value in expected.items():
        assert rows[key]["value"] == pytest.approx(value, rel=1e-4, abs=1e-4), key
        assert (rows[key]["prompt"], rows[key]["family"]) == (ROWS[key[0]].prompt, ROWS[key[0]].family)
        assert rows[key]["milliseconds"] > 0
    assert [(each.name, each.higher_is_memorized) for each in found.statistics] == [
        ("norm", False),
        ("probed", True),
        ("alike", False),
    ]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_lanes_are_those_that_the_unet_was_given(pipe, norm, probed, batch_size):
    images, walked = len(ROWS) * 2, 4  # `probed` is last taken at step 3 of 0 to 4
    with CountLanes(pipe.unet) as counted:
        found = collect(pipe, ROWS, [norm, probed], seeds=2, batch_size=batch_size, **SETTINGS)
    taken = Counter(found.values["statistic"].to_pylist())
    declared = sum(found.values["lanes"].to_pylist())
    assert taken == {"norm": 2 * images, "probed": 2 * images}
    assert counted.rows == 2 * images * walked + declared


def test_share_one_is_the_last_step_of_the_scheduler(pipe, norm):
    found = collect(pipe, ROWS[:1], [replace(norm, at=(1.0,))], **SETTINGS)
    assert found.values["step"].to_pylist() == [4]


def test_what_was_done_is_left_out_and_the_rest_goes_to_the_sink(pipe, norm, alike):
    whole = collect(pipe, ROWS, [norm], [alike], seeds=2, batch_size=2, **SETTINGS)
    given: list[pa.Table] = []
    rest = collect(pipe, ROWS, [norm], [alike], seeds=2, batch_size=2, done={1}, sink=given.append, **SETTINGS)
    assert [set(table["index"].to_pylist()) for table in given] == [{0}, {2}]
    assert pa.concat_tables(given) == rest.values
    columns = [name for name in SCHEMA.names if name != "milliseconds"]
    kept = whole.values.filter(pc.not_equal(whole.values["index"], 1))
    assert rest.values.select(columns) == kept.select(columns)
    assert len(collect(pipe, ROWS, [norm], done={0, 1, 2}, **SETTINGS).values) == 0


def test_seeds_of_a_prompt_give_different_images():
    seeds = [image_seed(row, index, j) for index, row in enumerate(ROWS) for j in range(8)]
    drawn = {tuple(torch.randn(4, generator=torch.Generator().manual_seed(seed)).tolist()) for seed in seeds}
    assert len(drawn) == len(seeds) == 24
    assert seeds[:2] == [0, 1_000_000]
    with pytest.raises(ValueError, match="too large"):
        image_seed(PromptRow("a", None, MAX_SEED), 0, 1)


def test_refuses_a_statistic_that_is_not_per_image(pipe, norm):
    class OneForAll:
        name, higher_is_memorized, lanes, at = "whole", True, 0.0, None

        def measure(self, call, model):
            return norm.measure(call, model).mean()[None]

    with pytest.raises(ValueError, match=r"whole gave \(1,\) for 3 images"):
        collect(pipe, ROWS, [OneForAll()], **SETTINGS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(observe_at=()), "observe_at"),
        (dict(observe_at=(0.1, 1.1)), "observe_at"),
        (dict(seeds=0), "seeds=0"),
        (dict(statistics=[]), "none"),
        (dict(seed_statistics=True), "seeds=1"),
        (dict(twice=True), "norm, norm"),
    ],
)
def test_refuses_what_it_cannot_measure(pipe, norm, alike, changes, named):
    arguments = {"statistics": [norm], **SETTINGS, **changes}
    if arguments.pop("twice", False):
        arguments["statistics"] = [norm, norm]
    if arguments.pop("seed_statistics", False):
        arguments["seed_statistics"] = [alike]
    with pytest.raises(ValueError, match=named):
        collect(pipe, ROWS, **arguments)


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_the_guard_scores_as_in_a_guarded_call_and_counts_its_lanes(pipe, guidance_scale):
    """Its row is the record of a guarded call of the same seeds, with the lanes that the UNet was given."""
    guard = watching(doubt=EVERYBODY, probes=2)
    with CountLanes(pipe.unet) as counted:
        found = collect(pipe, ROWS, [], guard=guard, **SETTINGS | {"guidance_scale": guidance_scale}).values.to_pylist()
    decided, controls = guard.steps(5)[-1], 0 if guidance_scale > 1 else len(guard.steps(5))
    assert [(row["statistic"], row["step"]) for row in found] == [("guard", decided)] * len(ROWS)
    assert [row["lanes"] for row in found] == [4.0 + controls] * len(ROWS)
    assert counted.rows == len(ROWS) * (2 * (decided + 1) + 4)
    guarded = GuardedStableDiffusionPipeline.from_pipe(pipe)
    guarded.enable_guard(guard)
    guarded.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(row["seed"]) for row in found]
    output = guarded(
        [row.prompt for row in ROWS], generator=generators, num_inference_steps=5, guidance_scale=guidance_scale
    )
    for row, record in zip(found, output.records, strict=True):
        assert row["value"] == pytest.approx(record.score, rel=1e-4, abs=1e-5)
