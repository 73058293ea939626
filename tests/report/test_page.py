"""The report: hostile text stays text, nothing is fetched, what is thinned is said."""

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sd_guard.report import page
from sd_guard.report.charts import score_chart
from sd_guard.report.images import Pictures
from sd_guard.report.page import write_report
from sd_guard.screening.records import Row, unscored_row, write_shard

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '" onload="alert(1)',
    "\u202ereversed \u05e9\u05dc\u05d5\u05dd",
    "nul \x00 bell \x07 escape \x1b[31m",
    "{{ 7 * 7 }}",
    "long " * 2000,
    "http://evil.example/x.png",
]


def row(index: int, **changes: Any) -> Row:
    base = unscored_row(prompt=f"prompt {index}", family="f", seed=0, index=index, reason="")
    known: dict[str, Any] = {"outcome": "passed", "score": index / 1000, "reason": None, "fingerprint": "x"}
    return {**base, **known, **changes}  # type: ignore[typeddict-item,return-value]


def make_run(folder: Path, rows: list[Row]) -> Path:
    write_shard(folder, rows)
    manifest = {
        "prompts": "list.csv",
        "images": len(rows),
        "threshold": 0.5,
        "configuration": {"steps": 50, "guidance_scale": 7.5, "model": "<b>model</b>"},
        "versions": {"torch": "2"},
        "started": "2026-11-24T06:00:00+00:00",
        "finished": None,
    }
    (folder / "run.json").write_text(json.dumps(manifest))
    return folder


def save_image(run: Path, name: str, side: int = 16) -> str:
    (run / "images").mkdir(exist_ok=True)
    Image.new("RGB", (side, side), (200, 30, 30)).save(run / "images" / name)
    return f"images/{name}"


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
    attempt = {
        "mitigation": "<i>m</i>",
        "strength": 1.0,
        "resumed_from_step": 2,
        "score": float("nan"),
        "resemblance": 0.9,
        "passed": False,
        "prompt": "<script>rewritten</script>",
    }
    value = {"step": 1, "name": "<u>detail</u>", "point": "x_t", "lane": "cond", "value": 0.5}
    changes = {"flagged": True, "image": picture, "statistics": [value], "attempts": [attempt]}
    rows = [row(i, prompt=text, family=text[:90], reason=text[:90], **changes) for i, text in enumerate(HOSTILE)]
    rows += [row(len(rows) + i, prompt=text, seed=1, outcome="unscored", score=None) for i, text in enumerate(HOSTILE)]
    rows = [{**each, "outcome": "blocked" if each["flagged"] else each["outcome"]} for each in rows]
    html = write_report(make_run(tmp_path, rows)).read_text(encoding="utf-8")
    return Reader(html), html


def test_hostile_text_is_shown_as_text(hostile: tuple[Reader, str]) -> None:
    reader, html = hostile
    assert not {"script", "iframe", "object", "link", "base", "form", "i", "u", "b"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    shown = "".join(reader.text)
    for text in (*HOSTILE[:4], HOSTILE[5], HOSTILE[6].strip(), HOSTILE[7], "<script>rewritten</script>"):
        assert text in shown
    assert not re.search(r"[\x00\x07\x1b]", html)
    assert reader.attributes.count(("dir", "auto")) >= 2 * len(HOSTILE)


def test_nothing_is_fetched(hostile: tuple[Reader, str]) -> None:
    reader, html = hostile
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("content", policy) in reader.attributes
    assert not re.search(r"url\(|@import", html)
    for name, value in reader.attributes:
        if name in {"src", "href", "xlink:href", "srcset", "action", "poster", "data"}:
            assert value is not None
            assert value.startswith(("data:image/", "#"))
    assert "http" not in html.replace("http-equiv", "").replace("http://evil.example", "")


def test_every_image_has_an_alternative_and_headings_descend(hostile: tuple[Reader, str]) -> None:
    reader, html = hostile
    assert len(re.findall(r"<img [^>]*alt=\"[^\"]+\"", html)) == reader.tags.count("img") > 0
    levels = [int(tag[1]) for tag in reader.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_the_gallery_is_thinned_and_says_so(tmp_path: Path) -> None:
    rows = [
        row(i, flagged=i % 3 == 0, outcome="rescued" if i % 3 == 0 else "passed") for i in range(page.MAX_CARDS + 50)
    ]
    html = write_report(make_run(tmp_path, rows)).read_text(encoding="utf-8")
    assert html.count("<article") == page.MAX_CARDS
    assert f"{page.MAX_CARDS} of {len(rows)} images" in html
    assert "This run is not finished" in html
    assert html.index("prompt 249<") < html.index("prompt 3<") < html.index("prompt 248<")


def test_seeds_of_one_prompt_stand_side_by_side(tmp_path: Path) -> None:
    rows = [row(i, prompt="same", seed=i, image=save_image(tmp_path, f"{i}.png")) for i in range(3)]
    html = write_report(make_run(tmp_path, rows)).read_text(encoding="utf-8")
    assert "The seed wall" in html
    assert "The seed wall" not in write_report(make_run(tmp_path, [rows[0], row(1), row(2)])).read_text()


def test_images_are_downscaled_and_never_read_from_outside(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    save_image(tmp_path / "run", "large.png", 600)
    save_image(tmp_path, "secret.png")
    (run / "images" / "broken.png").write_bytes(b"no image")
    pictures = Pictures(run)
    large = pictures.get("images/large.png")
    assert large is not None
    assert (large.width, large.height, large.is_tiny) == (256, 256, False)
    for outside in ("../images/secret.png", str(tmp_path / "images" / "secret.png"), "images/broken.png", "none.png"):
        assert pictures.get(outside) is None


@given(
    scores=st.lists(st.tuples(st.floats(-1e6, 1e6), st.booleans()), min_size=1, max_size=30),
    threshold=st.none() | st.floats(-1e6, 1e6),
)
def test_charts_stay_inside_and_count_every_score(scores: list[tuple[float, bool]], threshold: float | None) -> None:
    chart = score_chart({"f": [row(0, score=score, flagged=flagged) for score, flagged in scores]}, threshold)
    assert chart is not None
    (histogram,) = chart.histograms
    total = sum(bar.passed + bar.flagged for bar in histogram.bars) * histogram.peak / 100
    assert total == pytest.approx(len(scores))
    for bar in histogram.bars:
        assert -1e-6 <= bar.left <= bar.left + bar.width <= 100 + 1e-6
    assert chart.line is None or -1e-6 <= chart.line <= 100 + 1e-6
    assert score_chart({"f": [row(0, score=None)]}, None) is None
