"""The report in headless Chromium, from `file://`: nothing on the console, no request, filters and keys work."""

import os
import time
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from report.runs import HOSTILE, flagged_row, make_run, row, save_image

from sd_guard.report.compare import compare_runs, write_comparison
from sd_guard.report.page import write_report
from sd_guard.screening.records import SCHEMA

CHROMIUM = os.environ.get("CHROMIUM") or which("chromium") or which("chromium-browser") or which("google-chrome")
MISSING = "no chromium on PATH" if CHROMIUM is None else None if find_spec("playwright") else "no playwright"
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"{MISSING}: the page is not looked at in a browser")
LONG = f"{'x' * 5000} \u202e<script>window.hit = 1</script> {'y' * 4960}"


@pytest.fixture(scope="module")
def browser() -> Generator[Any, None, None]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium has none for root
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield running
        running.close()


class Opened:
    """A page, and what it said and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.page = browser.new_context(viewport={"width": 1280, "height": 900}, **options).new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url.split(",")[0]))
        self.page.goto(path.as_uri())

    def shown(self) -> list[str]:
        """Prompts of the images on show, in order."""
        return self.page.eval_on_selector_all(
            "[data-item]",
            "all => all.filter(e => e.offsetParent).map(e => [...e.querySelectorAll('.prompt')].pop().textContent)",
        )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    picture = save_image(run, "a.png")
    rows = [
        flagged_row(0, prompt="zebra", family="memorized", score=2.0, extra_lanes=10, image=picture),
        flagged_row(1, prompt="Apple", family="memorized", score=1.0, extra_lanes=90, outcome="blocked"),
        row(2, prompt="middle", family="ordinary", score=-0.5, extra_lanes=4, image=picture),
        row(3, prompt="beta", family="ordinary", score=0.25),
        row(4, prompt="not scored", family=None, score=None, outcome="unscored", reason="out of memory"),
    ]
    rows += [
        flagged_row(5 + i, prompt=text, family=text[:40], score=0.9, image=picture) for i, text in enumerate(HOSTILE)
    ]
    rows.append(flagged_row(len(rows), prompt=LONG, family="long", score=0.8, image=picture))
    rows += [row(len(rows) + i, prompt="seeds", seed=i, image=picture) for i in range(3)]
    return Path(write_report(make_run(run, rows)))


def test_the_console_is_silent_and_nothing_is_asked_for(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    opened.page.wait_for_timeout(200)
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [report.as_uri()]
    assert opened.page.evaluate("window.hit") is None
    assert set(opened.page.eval_on_selector_all("img", "all => all.map(e => e.naturalWidth > 0)")) == {True}


def test_the_policy_stops_what_a_prompt_might_smuggle_in(browser: Any, report: Path) -> None:
    """Held against a page with a script of its own: without the policy it would run."""
    smuggled = report.with_name("smuggled.html")
    text = report.read_text(encoding="utf-8").replace("</main>", "<script>window.hit = 1</script></main>")
    smuggled.write_text(text, encoding="utf-8")
    opened = Opened(browser, smuggled)
    assert opened.page.evaluate("window.hit") is None
    assert any("Content Security Policy" in line for line in opened.said)


def test_hostile_prompts_are_read_as_they_are(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    shown = opened.shown()
    assert len(LONG) > 10_000 - 30
    for prompt in (*HOSTILE[:4], HOSTILE[5], HOSTILE[6], HOSTILE[7], LONG):
        assert prompt in shown
    inside = "e => getComputedStyle(e).unicodeBidi"
    assert set(opened.page.eval_on_selector_all(".prompt", f"all => all.map({inside})")) <= {"isolate", "plaintext"}
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_filters_and_orders_work_by_keyboard(browser: Any, report: Path) -> None:
    from playwright.sync_api import expect

    opened = Opened(browser, report)
    keyboard, page = opened.page.keyboard, opened.page
    total = len(opened.shown())
    keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    while page.evaluate("document.activeElement.id") != "text":
        assert page.evaluate("document.activeElement !== document.body"), "text is not reached by Tab"
        keyboard.press("Tab")
    keyboard.type("APPLE")
    expect(page.locator("#count")).to_contain_text("1 of ")
    assert opened.shown() == ["Apple"]
    assert page.get_attribute("#count", "aria-live") == "polite"
    for following in ("outcome", "family", "order", "reset"):
        keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == following
    keyboard.press("Enter")
    assert len(opened.shown()) == total
    keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "order"
    keyboard.type("lowest")
    assert page.evaluate("document.activeElement.value") == "score-rising"
    lines = [prompt for prompt in opened.shown() if prompt in {"middle", "beta", "not scored"}]
    assert lines == ["not scored", "middle", "beta"]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("suspicion", ["zebra", "Apple", "not scored", "beta", "middle"]),
        ("score", ["zebra", "Apple", "beta", "middle", "not scored"]),
        ("lanes", ["Apple", "zebra", "middle", "not scored", "beta"]),
        ("prompt", ["Apple", "zebra", "beta", "middle", "not scored"]),
    ],
)
def test_cards_and_lines_are_sorted(browser: Any, report: Path, order: str, expected: list[str]) -> None:
    opened = Opened(browser, report)
    opened.page.select_option("#order", order)
    assert [prompt for prompt in opened.shown() if prompt in set(expected)] == expected


def test_outcomes_and_families_are_filtered(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    opened.page.select_option("#outcome", "blocked")
    assert opened.shown() == ["Apple"]
    assert "1 of" in opened.page.inner_text("#count")
    opened.page.select_option("#outcome", "")
    opened.page.select_option("#family", label="ordinary")
    assert opened.shown() == ["beta", "middle"]
    assert not opened.page.is_visible("ol.grid")
    opened.page.fill("#text", "<script>alert")
    opened.page.select_option("#family", "")
    assert opened.shown() == [HOSTILE[0]]


def test_what_is_seen_has_a_name_for_screen_readers(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    named = "e.getAttribute('aria-label') || e.alt || e.labels?.length || e.textContent.trim()"
    selector = "img, svg[role=img], input, select, button, [role=region], [role=search]"
    assert opened.page.eval_on_selector_all(selector, "all => all.length") > 10
    assert opened.page.eval_on_selector_all(selector, f"all => all.filter(e => !({named})).length") == 0
    assert opened.page.eval_on_selector_all("#controls label", "all => all.every(e => e.control)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_can_be_read(browser: Any, report: Path, scheme: str, width: int) -> None:
    opened = Opened(browser, report, color_scheme=scheme)
    opened.page.set_viewport_size({"width": width, "height": 800})
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for selector in ("body", ".lede", ".chip", ".meta", ".controls label"):
        assert opened.page.eval_on_selector(selector, CONTRAST) >= 4.5, selector


# WCAG 2: of an element's colour on the page's.
CONTRAST = """e => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const pair = [light(getComputedStyle(e).color), light(getComputedStyle(document.body).backgroundColor)];
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}"""


def test_without_scripts_everything_is_shown(browser: Any, report: Path) -> None:
    opened = Opened(browser, report, java_script_enabled=False)
    assert not opened.page.is_visible("#controls")
    assert opened.page.is_visible(".card >> nth=0") and opened.page.is_visible(".line >> nth=0")


def test_a_comparison_is_as_silent(browser: Any, report: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "b", [row(i, prompt=text) for i, text in enumerate([*HOSTILE, LONG])])
    path = Path(write_comparison(compare_runs(report.parent, other), report.parent, other, tmp_path / "c.html"))
    opened = Opened(browser, path)
    opened.page.set_viewport_size({"width": 390, "height": 800})
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [path.as_uri()]
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.page.eval_on_selector_all(".change", "all => all.length") > len(HOSTILE)


def test_a_hundred_thousand_rows_open_at_once(browser: Any, tmp_path: Path) -> None:
    images, total = 300, 100_000
    make_run(tmp_path, [row(0)], images=total)
    for shard in (tmp_path / "shards").iterdir():
        shard.unlink()
    (tmp_path / "shards").rmdir()
    noise = np.random.default_rng(0)  # hardly to be compressed: the pictures alone would fill the page
    for i in range(images):
        save_image(tmp_path, f"{i}.png")
        Image.fromarray(noise.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    pq.write_table(many_rows(total, images), tmp_path / "records.parquet")
    path = Path(write_report(tmp_path))
    assert 7_000_000 < path.stat().st_size < 15_000_000
    assert "pictures were left out to keep this page small" in path.read_text(encoding="utf-8")
    assert "2\u202f000 of 100\u202f000 images; the others are in the records" in path.read_text(encoding="utf-8")
    for _ in range(3):  # the machine may be busy
        opened = Opened(browser, path)
        opened.page.wait_for_load_state("load")
        loaded = opened.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        if 0 < loaded < 3000:
            break
        time.sleep(1)
    assert 0 < loaded < 3000
    assert opened.said == []
    assert opened.page.inner_text("#count") == "2000 of 2000 images on this page shown"


def many_rows(total: int, images: int) -> pa.Table:
    """A run of which a tenth is flagged, with evidence as of the default guard; some prompts are long."""
    example = flagged_row(0)
    long = ['"' * 10_000 if i % 1000 == 0 else "" for i in range(total)]  # as HTML, five times that
    flagged = [i % 10 == 0 for i in range(total)]
    pictures = [f"images/{i % images}.png" for i in range(total)]
    columns = {
        "prompt": [f"{i * 7919 % 99991:05d} a prompt about a thing {i * 6007 % 99989} {long[i]}" for i in range(total)],
        "family": ["memorized" if flag else "ordinary" for flag in flagged],
        "seed": [0] * total,
        "score": [1 + i / total if flag else -(i % 1000) / 1000 for i, flag in enumerate(flagged)],
        "flagged": flagged,
        "outcome": ["rescued" if flag else "passed" for flag in flagged],
        "decided_at_step": [3] * total,
        "extra_lanes": [30 if flag else 0 for flag in flagged],
        "image": pictures,
        "image_before": pictures,
        "index": list(range(total)),
        "reason": [None] * total,
        "statistics": [example["statistics"]] * total,
        "attempts": [example["attempts"] if flag else [] for flag in flagged],
        "fingerprint": ["x"] * total,
    }
    arrays = {field.name: pa.array(columns.get(field.name, [None] * total), field.type) for field in SCHEMA}
    return pa.table(arrays, schema=SCHEMA)
