"""The report: hostile text stays text, nothing is fetched, what is thinned is said."""

import base64
import hashlib
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report.runs import HOSTILE, attempt, flagged_row, make_run, prompt_of, row, save_image

from sd_guard.calibration import Calibration
from sd_guard.fingerprint import Fingerprint
from sd_guard.report import gallery, images, texts
from sd_guard.report.images import Pictures
from sd_guard.report.page import MAX_TABLE_FAMILIES, render, write_report
from sd_guard.report.rows import rows_of
from sd_guard.screening.settings import read_manifest

SVG_AND_OURS = ("data:image/", "#", "data:,")


class Reader(HTMLParser):
    """Gathers tags, attributes and text as a browser would."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Reader, str]:
    picture = save_image(tmp_path, "a.png")
    tried = attempt(mitigation="<i>m</i>", score=float("nan"), passed=False, prompt="<script>rewritten</script>")
    value = {"step": 1, "name": "<u>detail</u>", "point": "x_t", "lane": "cond", "value": 0.5}
    changes = {"flagged": True, "image": picture, "statistics": [value], "attempts": [tried], "outcome": "blocked"}
    rows = [row(i, prompt=text, family=text[:90], reason=text[:90], **changes) for i, text in enumerate(HOSTILE)]
    rows += [row(len(rows) + i, prompt=text, seed=1, outcome="unscored", score=None) for i, text in enumerate(HOSTILE)]
    html = Path(write_report(make_run(tmp_path, rows))).read_text(encoding="utf-8")
    return Reader(html), html


def test_hostile_text_is_shown_as_text(hostile: tuple[Reader, str]) -> None:
    reader, html = hostile
    assert not {"iframe", "object", "base", "form", "i", "u", "b"} & set(reader.tags)
    assert reader.tags.count("script") == reader.tags.count("style") == 1
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name == "style"]
    shown = "".join(reader.text)
    for text in (*HOSTILE[:4], HOSTILE[5], HOSTILE[6].strip(), HOSTILE[7], "<script>rewritten</script>"):
        assert text in shown
    assert not re.search(r"[\x00\x07\x1b]", html)
    assert reader.attributes.count(("dir", "auto")) >= 2 * len(HOSTILE)


def test_nothing_is_fetched_and_only_our_script_and_style_run(hostile: tuple[Reader, str]) -> None:
    reader, html = hostile
    (policy,) = [value for name, value in reader.attributes if name == "content" and "default-src" in (value or "")]
    assert policy is not None
    for kind in ("script", "style"):
        (text,) = re.findall(f"<{kind}>(.*?)</{kind}>", html, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
    assert not re.search(r"url\(|@import", html)
    for name, value in reader.attributes:
        if name in {"src", "href", "xlink:href", "srcset", "action", "poster", "data"}:
            assert value is not None and value.startswith(SVG_AND_OURS)
    assert "http" not in html.replace("http-equiv", "").replace("http://evil.example", "")


def test_every_image_has_an_alternative_and_headings_descend(hostile: tuple[Reader, str]) -> None:
    reader, html = hostile
    assert len(re.findall(r"<img [^>]*alt=\"[^\"]+\"", html)) == reader.tags.count("img") > 0
    assert len(re.findall(r"<svg [^>]*role=\"img\"[^>]*aria-label=\"[^\"]+\"", html)) == html.count('role="img"') > 0
    levels = [int(tag[1]) for tag in reader.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_what_is_drawn_is_thinned_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "MAX_DRAWN", 60)
    monkeypatch.setattr(gallery, "MAX_CARDS", 20)
    rows = [flagged_row(i) if i % 3 == 0 else row(i) for i in range(90)]
    html = Path(write_report(make_run(tmp_path, rows))).read_text(encoding="utf-8")
    assert html.count('<li class="card"') == 20
    assert html.count('<li class="line"') == 40
    assert "60 of 90 images; the others are in the records" in html
    assert "This run is not finished" in html
    order = [html.index(f">{prompt_of(i)}<") for i in (87, 30, 0, 89, 88)]
    assert order == sorted(order)


def test_families_are_thinned_and_say_so(tmp_path: Path) -> None:
    rows = [row(i, family=f"family {i}") for i in range(MAX_TABLE_FAMILIES + 5)]
    html = Path(write_report(make_run(tmp_path, rows))).read_text(encoding="utf-8")
    assert f"The {MAX_TABLE_FAMILIES} largest of {len(rows)} families" in html
    assert f"{len(rows) - 11} other families" in html


def test_seeds_of_one_prompt_stand_side_by_side(tmp_path: Path) -> None:
    rows = [row(i, prompt="same", seed=i, image=save_image(tmp_path / "a", f"{i}.png")) for i in range(3)]
    assert "The seed wall" in Path(write_report(make_run(tmp_path / "a", rows))).read_text(encoding="utf-8")
    assert "The seed wall" not in Path(write_report(make_run(tmp_path / "b", [rows[0], row(1), row(2)]))).read_text()
    bare = [{**each, "image": None} for each in rows]
    assert "The seed wall" not in Path(write_report(make_run(tmp_path / "c", bare))).read_text()  # type: ignore[arg-type]


def test_a_quick_run_is_a_list(tmp_path: Path) -> None:
    rows = [row(0, flagged=True, outcome="flagged", score=2.0), row(1, outcome="unscored", score=None, reason="why")]
    html = Path(write_report(make_run(tmp_path, [*rows, row(2)]))).read_text(encoding="utf-8")
    assert html.count('<li class="line"') == 3
    assert '<li class="card"' not in html
    assert "1 image was flagged by the first steps alone (quick depth)" in html
    assert ">The list <" in html and " bare" in html and "What mitigation" not in html


def test_words_and_map_are_shown_where_a_run_has_them(tmp_path: Path) -> None:
    words = [
        {"word": "<b>two</b>", "weight": 0.75},
        {"word": "words", "weight": 0.25},
        {"word": "of", "weight": -1.0},
        {"word": "many", "weight": float("nan")},
    ]
    known = flagged_row(0, prompt="<b>two</b> words of many", image=save_image(tmp_path, "a.png"))
    rows: list[dict[str, Any]] = [
        {**known, "words": words, "map": save_image(tmp_path, "map.png", 8)},
        {**flagged_row(1, image="images/a.png"), "words": None, "map": None},
    ]
    run = make_run(tmp_path, [known])
    html = render(run, rows_of(rows), read_manifest(run))
    assert [f'<mark class="tint-{tint}">' in html for tint in range(6)] == [True, False, True, False, False, True]
    assert "Carried by <bdi>&lt;b&gt;two&lt;/b&gt;</bdi> 0.750, <bdi>words</bdi> 0.250" in html
    assert html.count("where it is pinned") == 1


def test_near_duplicates_are_gathered_and_yield_their_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "MAX_CARDS", 2)
    near = [flagged_row(3 - i, prompt=f"a cat on a long red mat in the sun{'!' * i}", seed=i) for i in range(3)]
    other = flagged_row(0, prompt="quite another thing")
    html = Path(write_report(make_run(tmp_path, sorted([*near, other], key=lambda each: each["index"])))).read_text()
    cards = re.findall(r'<li class="card".*?</li>\n', html, flags=re.DOTALL)
    assert len(cards) == 2
    assert "a cat on a long red mat in the sun<" in cards[0] and "2 near-duplicates of this prompt" in cards[0]
    assert "quite another thing" in cards[1]
    assert "3 prompts, 3 images, 3 flagged, score 1.00" in html


def test_long_prompts_are_cut_once_they_fill_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "BUDGET", 15_000)
    rows = [row(i, prompt=f"{i} {'& ' * 1000}end{i}") for i in range(4)]
    html = Path(write_report(make_run(tmp_path, rows))).read_text(encoding="utf-8")
    assert [f"end{i}<" in html for i in range(4)] == [False, False, True, True]
    assert html.count("the first 140 of 2006 characters; all of it is in the records") == 2


def test_pictures_are_left_out_once_they_fill_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "BUDGET", 1)
    rows = [flagged_row(i, image=save_image(tmp_path, f"{i}.png")) for i in range(3)]
    html = Path(write_report(make_run(tmp_path, rows))).read_text(encoding="utf-8")
    assert html.count("<img") == 1
    assert "2 pictures were left out to keep this page small" in html


def test_images_are_downscaled_and_never_read_from_outside(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_image(run, "large.png", 600)
    save_image(tmp_path, "secret.png")
    (run / "images" / "broken.png").write_bytes(b"no image")
    pictures = Pictures(run)
    large = pictures.get("images/large.png")
    assert large is not None
    assert (large.width, large.height, large.is_tiny) == (224, 224, False)
    for outside in ("../images/secret.png", str(tmp_path / "images" / "secret.png"), "images/broken.png", "none.png"):
        assert pictures.get(outside) is None


def test_benign_scores_of_the_runs_own_calibration_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    Calibration(
        fingerprint=Fingerprint("m", "s", 50, "7.5", "float32"),
        false_positive_rate=0.1,
        images=3,
        observe_at=(0.1,),
        look_again_at=(),
        probes=2,
        other_seeds=0,
        thresholds={3: 0.5},
        detector={},
        benign_scores=(-1.0, 0.0, 0.75),
    ).save(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    own = make_run(tmp_path / "own", [row(0)], configuration={"calibration": digest}, threshold=0.5)
    html = Path(write_report(own, calibration=path)).read_text(encoding="utf-8")
    assert "benign, of the calibration" in html and "3 scored, 1 flagged" in html
    other = make_run(tmp_path / "other", [row(0)], configuration={"calibration": None})
    with pytest.raises(ValueError, match="made with no calibration; leave --calibration out"):
        write_report(other, calibration=path)
    assert not (other / "report.html").exists()


def test_an_attempt_that_another_was_preferred_to_has_not_failed(tmp_path: Path) -> None:
    """It may have passed by its score, which stands beside it."""
    tried = [attempt(score=-1.0, passed=False), attempt(mitigation="word_ablation+new_seed", score=-1.5)]
    html = Path(write_report(make_run(tmp_path, [flagged_row(0, attempts=tried), row(1)]))).read_text(encoding="utf-8")
    shown = "".join(Reader(html).text)
    assert "given up" in shown and "failed" not in shown
    assert "word ablation, new seed, strength" in shown and "ablation+new" not in html
