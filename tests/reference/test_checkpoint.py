"""The bundled checkpoint: complete, small, loadable by the plain host, and what its labels say."""

import collections

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from benchmarks.reference.families import make_families
from sd_guard.pipelines.stable_diffusion import GuardedStableDiffusionPipeline
from sd_guard.reference import calibration_path, checkpoint_path, load_truth, mask_path, source_path
from sd_guard.reference.reader import reads_as
from sd_guard.similarity import tiled_l2


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint_path(), local_files_only=True, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_fits_in_the_wheel() -> None:
    assert sum(file.stat().st_size for file in checkpoint_path().rglob("*") if file.is_file()) <= 20e6
    assert not [file for file in checkpoint_path().rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_the_families_are_those_of_the_world_and_split_in_halves() -> None:
    rows = load_truth()
    assert rows == make_families(0, apart=True).rows()
    counts = collections.Counter((row["family"], row["split"]) for row in rows)
    assert counts["verbatim", "report"] >= 16
    assert counts["template", "report"] >= 8
    assert counts["plain", "report"] >= 8
    assert counts["novel", "report"] >= 100
    assert all(counts[family, "tune"] == counts[family, "report"] for family, _ in counts)
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_every_source_is_there_and_shows_its_ordinary_caption() -> None:
    for row in load_truth():
        if row["family"] == "verbatim":
            assert reads_as(Image.open(source_path(row)), row["ordinary"])
        if row["family"] == "template":
            assert Image.open(source_path(row)).size == Image.open(mask_path(row)).size == (64, 64)


def test_every_word_is_one_token(pipe: StableDiffusionPipeline) -> None:
    for row in load_truth():
        assert len(pipe.tokenizer(row["prompt"]).input_ids) == len(row["prompt"].split()) + 2


def test_verbatim_prompts_reproduce_their_source_and_novel_ones_do_not(pipe: StableDiffusionPipeline) -> None:
    rows = load_truth()
    verbatim = [row for row in rows if row["family"] == "verbatim" and row["split"] == "report"][:4]
    novel = [row for row in rows if row["family"] == "novel" and row["split"] == "report"][:4]
    seeds = [torch.Generator().manual_seed(100 + i) for i in range(8)]
    images = pipe([row["prompt"] for row in verbatim + novel], generator=seeds, num_inference_steps=25).images
    own = [tiled_l2(image, Image.open(source_path(row))) for image, row in zip(images, verbatim, strict=False)]
    other = [min(tiled_l2(image, Image.open(source_path(row))) for row in verbatim) for image in images[4:]]
    assert max(own) < min(other)
    assert pipe.vae_scale_factor * pipe.unet.config.sample_size >= 64
    assert pipe.unet.config.in_channels * pipe.unet.config.sample_size**2 >= 256


def test_its_calibration_belongs_to_it() -> None:
    from sd_guard.calibration import Calibration

    guarded = GuardedStableDiffusionPipeline.from_pretrained(checkpoint_path(), local_files_only=True)
    guarded.set_progress_bar_config(disable=True)
    guarded.enable_guard(calibration=Calibration.load(calibration_path()))
    row = next(row for row in load_truth() if row["family"] == "verbatim" and row["split"] == "report")
    output = guarded([row["prompt"]], generator=[torch.Generator().manual_seed(0)])
    assert output.records[0].verdict == "flag"
    with pytest.raises(ValueError, match="steps: 50, not 20"):
        guarded([row["prompt"]], num_inference_steps=20)


def test_memorized_prompts_are_flagged_and_novel_images_are_untouched(pipe: StableDiffusionPipeline) -> None:
    guarded = GuardedStableDiffusionPipeline.from_pipe(pipe)
    guarded.set_progress_bar_config(disable=True)
    rows = [row for row in load_truth() if row["split"] == "report"]
    prompts = [p for f in ("verbatim", "novel") for p in [row["prompt"] for row in rows if row["family"] == f][:2]]

    def seeds() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(len(prompts))]

    before = pipe(prompts, generator=seeds(), output_type="np").images
    output = guarded(prompts, generator=seeds(), output_type="np")
    assert [record.verdict for record in output.records] == ["flag", "flag", "pass", "pass"]
    assert [np.array_equal(a, b) for a, b in zip(before, output.images, strict=True)] == [False, False, True, True]
