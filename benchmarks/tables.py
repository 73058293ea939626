"""What result files look like in Markdown: tables, and sentences with their figures, for `benchmarks.figures`."""

from __future__ import annotations

from typing import Any

from benchmarks.checkpoints import MAKES
from benchmarks.sweep import DEFAULT


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


def host(result: dict[str, Any]) -> str:
    """What a call costs beside its lanes."""
    lines = "; ".join(
        f"{line['guard_milliseconds']:.1f} ms at batch {line['batch']}, beside {line['unguarded_milliseconds']:.1f} of "
        "the host's own"
        for line in result["batches"]
    )
    first = result["batches"][0]
    hidden = first["taken_apart"]["take_fingerprint"]["milliseconds"]
    return (
        "With a UNet of Stable Diffusion 1.5's size that answers at once, and 8 x 8 latents, so that only Python and "
        f"the dispatch of operations are left, the guard takes a call {lines} ({first['guard_operations']} operations; "
        f"{hidden:.1f} ms at batch {first['batch']} are the fingerprint's, taken while a GPU would decode the images)"
    )
