"""Figures from the committed result files: `python -m benchmarks.figures` rewrites README's table and all the others.

README has one table, a line a checkpoint; `benchmarks/README.md` has the rest, with what was looked at before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import MAKES
from benchmarks.results import FOLDER
from benchmarks.sweep import DEFAULT

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


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def percent(value: float | None) -> str:
    """A share as per cent."""
    return "-" if value is None else f"{100 * value:.1f} %"


def cell(row: dict[str, Any]) -> str:
    """AUROC and TPR at 1 % FPR, and the step."""
    return f"{row['auroc']:.4f} / {row['tpr_at_1_fpr']:.2f} @ {row['step']}"


def looks_until(result: dict[str, Any], asked: list[str], last: float) -> list[list[dict[str, Any]]]:
    """The guard's looks at steps before `last`, of each question."""
    return [[row for row in result["looks"][question] if row["step"] < last] for question in asked]


def detection_table(result: dict[str, Any], count: int | None = None) -> str:
    """The guard first, then each statistic, or the first `count`, the best on verbatim prompts first.

    Each is at its own best step.
    """
    several = f"{result['settings']['seeds']} images"
    asked = [f"{kind} / novel + plain, {n}" for kind in ("verbatim", "template") for n in ("1 image", several)]
    columns = [{row["statistic"]: row for row in result["best_steps"][question]} for question in asked]
    merits: dict[str, float] = {}
    for column in columns:
        for name, row in column.items():
            merits.setdefault(name, row["auroc"])
    rows: list[tuple[Any, ...]] = []
    for by in (0.2, 0.4, 1.0):
        last = by * result["settings"]["steps"]
        looks = [max(own, key=lambda row: row["step"]) for own in looks_until(result, asked, last) if own]
        cells = (f"{looks[0]['lanes']:.3g}", *map(cell, looks)) if looks else ("-",) * (1 + len(asked))
        rows.append((f"**guard**, by {100 * by:.0f} % of the steps", *cells))
    others = sorted((name for name in merits if name != "guard"), key=lambda name: (-merits[name], name))
    for name in others[:count]:
        lanes = next(column[name]["lanes"] for column in columns if name in column)
        cells = [cell(column[name]) if name in column else "-" for column in columns]
        rows.append((name, f"{lanes:.3g}", *cells))
    n = f"n = {result['settings']['seeds']}"
    return table(("statistic", "extra lanes", "verbatim, n = 1", n, "template, n = 1", n), rows)


def flagged(result: dict[str, Any]) -> str:
    """Shares that the guard flags at its default threshold."""
    return ", ".join(f"{family} {percent(share)}" for family, share in result["flagged"].items())


def conformal(result: dict[str, Any]) -> str:
    """Promised rates and counted ones."""
    return "; ".join(
        f"{percent(line['alpha'])} promised, {percent(line['report_rate'])} and "
        f"{percent(line['mean_rate_over_random_halves'])}"
        for line in result["lines"]
    )


def above(result: dict[str, Any]) -> str:
    """Statistics that do better than the guard does by the same step."""
    found = [
        f"{row['statistic']} at step {row['step']} ({row['question'].split(' / ')[0]}, {row['auroc']:.5f} against "
        f"{row['guard']:.5f})"
        for row in result["above_the_guard"]
    ]
    return ", ".join(found) or "none"


def sweep_table(results: dict[str, dict[str, Any]]) -> str:
    """The guard across settings, on each checkpoint: AUROC and shares flagged."""
    rows: list[tuple[Any, ...]] = []
    for lines in zip(*(result["lines"] for result in results.values()), strict=True):
        changed = {key: value for key, value in lines[0]["setting"].items() if value != DEFAULT[key]}
        name = ", ".join(f"{key} {value}".removesuffix("Scheduler") for key, value in changed.items()) or "default"
        cells: list[str] = []
        for line in lines:
            found = [line[f"{kind} / novel + plain"]["auroc"] for kind in ("verbatim", "template")]
            own = line["flagged"]
            cells += [" / ".join(f"{value:.3f}" for value in found)]
            cells += [" / ".join(percent(own[f]) for f in ("verbatim", "template", "novel"))]
        rows.append((name, *cells))
    each = ("AUROC verbatim / template", "flagged verbatim / template / novel")
    return table(("setting", *(f"{name}: {what}" for name in results for what in each)), rows)


def copies(row: dict[str, Any], rule: str) -> str:
    """The share of a family's images before and after the plan, and of the oracle's."""
    before, after, oracle = (row[f"{rule}_{kind}"] for kind in ("before", "after", "oracle"))
    return "-" if before is None else f"{percent(before)} → {percent(after)} ({percent(oracle)})"


def mitigation_table(result: dict[str, Any]) -> str:
    """What the default plan does to each family."""
    header = (
        "family",
        "images",
        "flagged",
        "changed",
        "copies (oracle)",
        "beyond the caption (oracle)",
        "blocked",
        "on caption, rescued",
        "on caption, oracle",
        "extra lanes, mean (95 %, max)",
    )
    rows = []
    for family in ("verbatim", "template", "plain", "novel"):
        row = result[family]
        blocked = row["outcomes"].get("blocked", 0) / row["images"]
        cells = (
            percent(row["flagged"]),
            percent(row["changed"]),
            copies(row, "copies"),
            copies(row, "beyond_caption"),
            *map(percent, (blocked, row["on_caption_rescued"], row["on_caption_oracle"])),
        )
        lanes = f"{row['extra_lanes_mean']:g} ({row['extra_lanes_p95']:g}, {row['extra_lanes_max']})"
        rows.append((family, row["images"], *cells, lanes))
    return table(header, rows)


def memory(result: dict[str, Any]) -> str:
    """What gradients take beside one more batch."""
    (batch,) = result["batches"]
    shares = {name: line["of_one_more_batch"] for name, line in batch["lines"].items() if name != "none"}
    low, high = (pick(shares, key=shares.__getitem__) for pick in (min, max))
    return (
        "*Memory* of those that take gradients, at Stable Diffusion 1.5's size (random weights, 512 x 512, "
        f"{result['provenance']['dtype']}, a batch of one): an unguarded call allocates {batch['unguarded_mib']:.0f} "
        f"MiB beyond the weights, decoding apart, and one more image {batch['one_more_batch_mib']:.0f} more; of that, "
        f"`{low}` needs {percent(shares[low])} and `{high}` {percent(shares[high])}, the others between "
        f"({result['provenance']['git']})."
    )


def backward(result: dict[str, Any]) -> str:
    """What a backward pass takes, beside what is billed for it."""
    lanes = ", ".join(f"{name} {line['backward_lanes']:.2f}" for name, line in result["lines"].items())
    return (
        f"*Backward passes*, in lanes, CPU time of one thread, blocks recomputed: {lanes} (Stable Diffusion 1.5's size "
        f"at {result['lines']['sd15']['pixels']} pixels); {result['settings']['billed']:g} are billed "
        f"({result['provenance']['git']})."
    )


def mitigations_table(result: dict[str, Any], *tuned: dict[str, Any]) -> str:
    """Each mitigation by itself; the last columns are of `tune` rows, of the bundled and of the first checkpoint."""
    header = (
        *("mitigation", "reproduced", "on caption", "diversity", "distance"),
        *("extra lanes", "extra seconds", "extra peak MiB", "good per 100 lanes, tune", "likewise, first"),
    )
    rows: list[tuple[Any, ...]] = []
    for name, line in result["lines"].items():
        apart = ["-" if line[key] is None else f"{line[key]:.3f}" for key in ("diversity", "distance")]
        spent = f"{line['extra_lanes']:.3g}", f"{line['extra_seconds']:.2f}", f"{line['extra_peak_mib']:.0f}"
        good = [split["lines"][name]["good_per_100_lanes"] for split in tuned]
        shares = percent(line["reproduced"]), percent(line["on_caption"])
        rows.append((name, *shares, *apart, *spent, *("-" if one is None else f"{one:.2f}" for one in good)))
    return table(header, rows)


def plans_table(results: list[dict[str, Any]]) -> str:
    """Whole plans on `tune` rows of several checkpoints together."""
    asked = {"verbatim": ("verbatim",), "template": ("template",), "all": ("verbatim", "template")}
    rows: list[tuple[Any, ...]] = []
    for name in results[0]["plans"]:
        cells: list[str] = []
        for families in asked.values():
            lines = [result["plans"][name][family] for result in results for family in families]
            good, copied, blocked, lanes, images = (
                sum(line[key] * (line["images"] if key != "images" else 1) for line in lines)
                for key in ("good", "copies", "blocked", "lanes_mean", "images")
            )
            cells += [" / ".join(percent(count / images) for count in (good, copied, blocked))]
            cells += [f"{lanes / images:.1f}", f"{100 * good / lanes:.2f}"]
        rows.append((name, *cells))
    each = ("good / copies / blocked", "lanes", "good per 100 lanes")
    return table(("plan", *(f"{name}: {what}" for name in asked for what in each)), rows)


def fooled(line: dict[str, Any]) -> str:
    """What verification makes of images that were moved against the detector's own statistic."""
    return (
        "`optimised` moves the embedding against the statistic that the detector rests on: verification calls "
        f"{line['rescued']} of {line['images']} images rescued, and {line['rescued_are']['copies']} of these are copies"
    )


def kept_table(results: dict[str, dict[str, Any]]) -> str:
    """What `keep` hands out where nothing was rescued, on each checkpoint."""
    rows = [
        (
            name,
            plan,
            line["images"],
            f"{line['kept']} ({line['relapsed']})",
            *(f"{line[kind]['copies']} / {line[kind]['good']}" for kind in ("without_the_guard", "handed_out")),
        )
        for name, result in results.items()
        for plan, line in result["plans"].items()
    ]
    each = ("without the guard: copies / good", "handed out: copies / good")
    return table(("checkpoint", "plan", "images", "not rescued (of these relapsed)", *each), rows)


def screening(result: dict[str, Any], quick: dict[str, Any]) -> str:
    """Of the pipeline alone, of its workers, of what a kill costs, and of quick depth."""
    scale, kills = result["scale"], result["kills"]
    most = max(scale["runs"], key=lambda run: run["prompts"])
    sharing = ", ".join(f"{line['speedup']:.2f} with {engine}" for engine, line in result["workers"].items())
    best = min(quick["time"], key=lambda line: line["milliseconds_a_prompt"])
    found = "; ".join(
        f"{name}: {quick[key]['verbatim']['auroc']:.4f} (verbatim) and {quick[key]['template']['auroc']:.4f} (template)"
        for name, key in (
            ("bundled", "report"),
            *((name, f"{name}_checkpoint_report") for name in MAKES),
        )
        if key in quick
    )
    return (
        f"{most['prompts']:,} prompts without a model take {most['seconds']:.1f} s, {scale['overhead']:.0f} "
        f"microseconds each; the largest peak of memory is {scale['memory_ratio']:.3f} times that of 10,000 prompts, "
        f"and time grows with the power {scale['exponent']:.2f} of their number. Two workers on two cores are to one: "
        f"{sharing}. "
        f"{kills['resumed']} of {kills['runs']} runs, killed {kills['kills']} times in all, had the records of one "
        f"that was not, with at most {kills['repeated_most']} batch a kill screened again. Quick depth, AUROC against "
        f"novel and plain prompts: {found}; {quick['report']['lanes_mean']:.2f} lanes a prompt, and at the "
        f"best batch ({best['batch']}) {percent(best['share_inside_unet'])} of the time inside the UNet, "
        "prompts being encoded on another thread."
    )


def attribution(result: dict[str, Any]) -> str:
    """How often the rare word is named first, and how well the map tells pinned places."""
    words, places = (dict(result[key]) for key in ("rare word first", "pinned places"))
    prompts, templates = words.pop("prompts"), places.pop("prompts")
    named = ", ".join(f"{name} {percent(value)}" for name, value in words.items())
    found = ", ".join(f"{value['together']:.3f} ({value['pixels']:.3f}) at {step}" for step, value in places.items())
    return f"{named} ({prompts} prompts); AUROC of the map {found} ({templates} prompts)"


def evasion_table(results: dict[str, dict[str, Any]]) -> str:
    """Of the images that still reproduce their source, those that are flagged, on each checkpoint."""
    found = [{"**all**": result["all"], **result["changes"]} for result in results.values()]
    rows = [
        (change, *(shown for lines in found for shown in (lines[change]["copies"], percent(lines[change]["recall"]))))
        for change in found[0]
    ]
    return table(("change", *(f"{name}: {what}" for name in results for what in ("copies", "of these flagged"))), rows)


def best(result: dict[str, Any], family: str) -> str:
    """AUROC of one image by 40 % of the steps, and TPR at 1 % FPR."""
    (looks,) = looks_until(result, [f"{family} / novel + plain, 1 image"], 0.4 * result["settings"]["steps"])
    row = max(looks, key=lambda row: row["step"])
    return f"{row['auroc']:.4f} / {row['tpr_at_1_fpr']:.2f}"


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
            "before this table was made. PLANS "
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
            f"({revision('attribution')}). The map is that of the latent's places, but for those at the window's edge (in "
            "brackets: brought up to all pixels of the image, as it is shown); ablation is what explains by default. "
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
            f"*Time*, guarded over unguarded with nothing flagged, median (quartiles): {speed} "
            f"({revision('overhead')}).",
        )
    )


def write_between(text: str, section: str) -> str:
    """The text with the section that is marked in it replaced."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{section}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(write_between(README.read_text(), headline()))
    ALL.write_text(write_between(ALL.read_text(), figures()))
