"""Figures from the committed result files: `python -m benchmarks.figures` rewrites README's table and all the others.

README has one table, a line a checkpoint; `benchmarks/README.md` has the rest, with what was looked at before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import MAKES
from benchmarks.results import FOLDER
from benchmarks.tables import (
    above,
    attribution,
    backward,
    best,
    conformal,
    copies,
    detection_table,
    evasion_table,
    flagged,
    fooled,
    host,
    kept_table,
    memory,
    mitigation_table,
    mitigations_table,
    percent,
    plans_table,
    screening,
    sweep_table,
    table,
)

README, ALL = Path(__file__).parents[1] / "README.md", Path(__file__).parent / "README.md"
AGAIN = ("first", "twelfth")  # explanation and evasion are measured on these, too
KEPT = ("first", "fourth")
LATER_PLAN = "few words from 2%, summary, words, noise"
PLANNED = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
BEGIN, END = "<!-- figures: written by benchmarks/figures.py -->", "<!-- end of figures -->"


def load(name: str) -> dict[str, Any]:
    """One result file."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def revision(name: str) -> str:
    """Of the code that wrote a result file."""
    return load(name)["provenance"]["git"]


def headline() -> str:
    """README's one table: the guard as it comes, on every checkpoint."""
    rows: list[tuple[Any, ...]] = []
    for name, make in MAKES.items():
        found, done = load(f"detection{make.ending}"), load(f"mitigation{make.ending}")
        shares = [percent(found["flagged"][family]) for family in ("verbatim", "template", "novel", "plain")]
        own = done["verbatim"]
        blocked = own["outcomes"].get("blocked", 0) / own["images"]
        rows.append(
            (
                f"{name} ({make.kind})",
                best(found, "verbatim"),
                best(found, "template"),
                " / ".join(shares[:2]),
                " / ".join(shares[2:]),
                copies(own, "copies"),
                percent(blocked),
                f"{done['stream_of_5_percent']:.3f}",
            )
        )
    header = (
        "checkpoint (predicts, betas)",
        "verbatim",
        "template",
        "flagged: verbatim / template",
        "novel / plain",
        "copies (oracle)",
        "blocked",
        "lanes",
    )
    return table(header, rows)


def mitigation_tables() -> list[str]:
    """Of each checkpoint."""
    lines, drawings = list[str](), load("drawings")
    for name, make in MAKES.items():
        result, drawn = load(f"mitigation{make.ending}"), drawings[name]["report"]
        written, stream = result["provenance"]["git"], result["stream_of_5_percent"]
        lines += [
            f"{name.capitalize()} checkpoint ({stream:.3f} times; {written}). Drawings: "
            f"{percent(drawn['verbatim']['share'])} (verbatim), {percent(drawn['template']['share'])} (template); "
            f"beyond the caption {percent(drawn['verbatim']['share_beyond_caption'])} and "
            f"{percent(drawn['template']['share_beyond_caption'])}.",
            mitigation_table(result),
        ]
    return lines


def checkpoint(name: str) -> tuple[str, ...]:
    """One that is not bundled: what it is, the guard and other statistics on it, and what is flagged."""
    make = MAKES[name]
    found, done = load(f"detection{make.ending}"), load(f"mitigation{make.ending}")
    beside = f"the {make.statistics} statistics that come next" if make.statistics else "others"
    return (
        f"*The {name}* ({make.kind}). {make.story} {percent(done['verbatim']['copies_before'])} of its verbatim images "
        f"are copies, {percent(done['template']['copies_before'])} of its templates have the fixed part. The guard, "
        f"and {beside} ({found['provenance']['git']}):",
        detection_table(found, make.statistics),
        f"With a higher AUROC than the guard by then, or by its first look: {above(found)}. Flagged: {flagged(found)}; "
        f"of the images that reproduce a verbatim source, {percent(done['verbatim']['flagged_of_copies'])}.",
    )


def figures() -> str:
    """All tables."""
    truth, detection = load("reference")["report"], load("detection")
    overhead, place = load("overhead"), detection["provenance"]
    machines = sorted({load(file.stem)["provenance"]["machine"] for file in FOLDER.glob("*.json")})
    tunes = "mitigations_tune", "mitigations_tune_first"
    sweeps = {"bundled": "sweep", "first": "sweep_first", "second": "sweep_unseen"}
    speed = "; ".join(
        f"{line['ratio_median']:.3f} ({line['ratio_quartiles'][0]:.3f} to {line['ratio_quartiles'][1]:.3f}) "
        f"at batch {line['batch']}, {line['extra_lanes_an_image']:g} extra lanes an image"
        for line in overhead["batches"]
    )
    return "\n\n".join(
        (
            "All on `report` rows, 50 DDIM steps, guidance 7.5; whatever was chosen was chosen on `tune` rows, of the "
            "first checkpoint and some of it of the second to seventh, too, what word ablation prefers of the second "
            "to eighth, and when other noise is tried of the second to ninth. "
            f"{' or '.join(machines)}, torch {place['versions']['torch']}, {place['dtype']}; "
            "raw numbers with revision and versions in `benchmarks/results/`. In brackets: the revision that wrote "
            "them; the detector is the same since 857a67f.",
            f"*The bundled checkpoint* ({MAKES['bundled'].kind}). {MAKES['bundled'].story} "
            f"{percent(truth['verbatim_reproduced'])} of verbatim prompts reproduce their source, "
            f"{percent(truth['novel_near_a_source'])} of novel images come near one, and "
            f"{percent(truth['reads_as_caption']['novel'])} of novel images read as their caption.",
            "*Detection*, against novel and plain prompts together: AUROC / TPR at 1 % FPR @ step. The guard looks at "
            "its own steps by one fixed rule; every other statistic is shown at its best step, chosen on these very "
            "prompts. n is the number of images a decision.",
            detection_table(detection),
            f"With a higher AUROC at some step than the guard has by then, one image a decision: {above(detection)}. "
            f"Flagged by the guard's default threshold, no calibration: {flagged(detection)}.",
            "*Calibrated* on benign `tune` prompts (split conformal), flagged on benign `report` prompts, and in the "
            f"mean of 200 random halves: {conformal(load('conformal'))} ({revision('conformal')}). On the first: "
            f"{conformal(load('conformal_first'))} ({revision('conformal_first')}).",
            "*Other checkpoints* are in folders of `benchmarks/reference/`, and in no wheel; the same default.",
            *(part for name in MAKES if name != "bundled" for part in checkpoint(name)),
            "*Across settings*, one image a prompt, 60 novel prompts, the default threshold throughout "
            f"({', '.join(revision(name) for name in sweeps.values())}).",
            sweep_table({name: load(file) for name, file in sweeps.items()}),
            "*Mitigation*, the default plan, several images of a memorized prompt and one of any other; the oracle is "
            "the rare phrase removed by hand. But for those of the bundled, the tenth and the twelfth, all these rows "
            "and seeds were seen before, by earlier detectors and plans; what was changed since was chosen on `tune` "
            "rows (an earlier change to the search for words, given up by `tune` rows of the third when all had been "
            "run with it, is in `mitigation*.json` of revision fc34d18; without other noise, of revision d82fa03). "
            "*Drawings*: of pictures that no model made, which the world itself draws of these captions without their "
            "phrase, the share that would be counted as copies: what keeps to the caption cannot be "
            f"expected below it ({revision('drawings')}). *Beyond the caption*: copies that are nearer to their source "
            "than all but one in a hundred of such drawings. In brackets: lanes where one prompt in twenty is "
            "memorized verbatim, over those of plain sampling, and the revision.",
            *mitigation_tables(),
            "*Every mitigation* by itself: its first change, to all verbatim prompts, whatever the guard thinks of "
            "it. Reproduced and on caption are shares of images; diversity is the distance between two seeds, distance "
            "that from the unguarded image; lanes, seconds and memory are beyond an unguarded batch of four. The last "
            "two columns are of `tune` rows; good ones are no copy, and on caption "
            f"({', '.join(revision(name) for name in ('mitigations', *tunes))}; `word_weighting`, added later, "
            f"{load('mitigations')['lines']['word_weighting 0.5']['git']}). A quarter of their weight does to words "
            "about what leaving them out does, at the same cost: now and then it still gives the copy, or a caption "
            "goes.",
            mitigations_table(load("mitigations"), *map(load, tunes)),
            "*Whole plans*, on `tune` rows of the first to ninth together, verified: what comes first, how strong, "
            "where it resumes, what follows. The default's order had been settled on such rows of three of them, "
            "before this table was made. It has the most good images, and the most a lane, by less than one image: to "
            "replace the summary first costs less (and has more a lane of verbatim images alone), but more is blocked "
            "or loses its caption; to keep 2 % of the steps saves 1 % of the lanes for five good images less; and how "
            "strong the last resort's noise is decides nothing here. "
            f"({revision('plans_first')}; the last three lines, made later, "
            f"{load('plans_first')['plans'][LATER_PLAN]['git']})",
            plans_table([load(f"plans_{name}") for name in PLANNED]),
            '*Kept*: `on_failure="keep"` on `report` rows of memorized prompts. Of the images that nothing rescued, '
            "those that are copies, and those that are none and read as their caption says: as they would have been, "
            "and of the attempt that came nearest to passing. Noise in the embedding alone fails often. "
            f"{fooled(load('keep')['plans']['optimised'])} ({revision('keep')}; the others "
            f"{', '.join(revision(f'keep_{name}') for name in KEPT)}).",
            kept_table({"bundled": load("keep")} | {name: load(f"keep_{name}") for name in KEPT}),
            memory(load("memory")),
            backward(load("backward")),
            f"*Explanation*: a rare word is named first by {attribution(load('attribution'))} "
            f"({revision('attribution')}). The map is that of the latent's places, but for those at the window's edge "
            "(in brackets: brought up to all pixels of the image, as it is shown); ablation is the default. "
            + " ".join(
                f"On the {name}: {attribution(load(f'attribution_{name}'))} ({revision(f'attribution_{name}')})."
                for name in AGAIN
            ),
            "*Evasion*: changes to verbatim prompts, and of the images that still reproduce their source the share "
            "that is flagged; in all without what is no change, as the tokenizer knows no case "
            f"({', '.join(revision(name) for name in ('evasion', *(f'evasion_{n}' for n in AGAIN)))}):",
            evasion_table({"bundled": load("evasion")} | {name: load(f"evasion_{name}") for name in AGAIN}),
            f"*Screening*: {screening(load('screening'), load('quick'))} ({revision('screening')}; quick depth "
            f"{revision('quick')}.)",
            f"*Time*, guarded over unguarded with nothing mitigated, median (quartiles): {speed} "
            f"({revision('overhead')}). {host(load('host'))} ({revision('host')}).",
        )
    )


def write_between(text: str, section: str) -> str:
    """The text with the section that is marked in it replaced."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{section}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(write_between(README.read_text(), headline()))
    ALL.write_text(write_between(ALL.read_text(), figures()))
