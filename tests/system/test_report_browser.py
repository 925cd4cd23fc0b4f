"""The report page in a real browser: safety, accessibility, and its filters."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from reidreg import EVALUATORS, Embeddings, load_plugins
from reidreg.evaluation.evaluate import Evaluation
from reidreg.report.write import write_report

sync_api = pytest.importorskip("playwright.sync_api")

DATE = datetime(2026, 3, 1, 12, 30, tzinfo=timezone.utc)
# Each would run, load or break something if it were inserted unescaped.
HOSTILE = [
    "<script>window.hit = 1</script>",
    "</script><script>window.hit = 2</script>",
    "\"><img src=x onerror='window.hit = 3'>",
    "' onmouseover=window.hit=4 x='",
    "</style></title><svg onload='window.hit = 5'></svg><!--",
    "{{ 7 * 7 }}{% raw %}&lt;b&gt;",
    "https://example.org/a.jpg",
    "\u202egpj.exe " + "long" * 60,
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """An evaluation with every block of figures, and a hostile string for every name."""
    load_plugins()
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(1)
    people = torch.randn(6, 8, generator=generator)

    def side(count: int, name: str) -> Embeddings:
        pids = torch.arange(count) % 6
        camids = torch.randint(1, 4, (count,), generator=generator)
        features = people[pids] + torch.randn(count, 8, generator=generator)
        paths = []
        for number in range(count):
            # Every fifth path is the raw string, of an image that does not exist.
            words = HOSTILE[number % len(HOSTILE)]
            path = folder / f"{name}{number}{words.replace('/', '')[:100]}.jpg"
            Image.new("RGB", (32, 64), (40 * int(pids[number]), 90, 160)).save(path)
            paths.append(str(path) if number % 5 else f"{folder}/gone/{words}")
        return Embeddings(features, pids, camids, tuple(paths))

    query, gallery = side(30, "q"), side(120, "g")
    gallery.pids[:4] = -1
    evaluator = EVALUATORS.build("retrieval", verification=True, cameras=True, bootstrap=50)
    figures = evaluator.evaluate(query, gallery)
    figures["reranked"] = {key: figures[key] for key in ("mAP", "rank1", "cmc")}
    figures.update({words: {"mAP": 0.5} for words in HOSTILE[:2]})
    figures["cameras"] += [
        {"query_camera": a, "gallery_camera": b, "num_queries": 1, "mAP": 1.0, "rank1": 1.0}
        for a, b in zip(HOSTILE, HOSTILE[::-1], strict=True)
    ]
    about = {"Data set": HOSTILE[4], **{words: words for words in HOSTILE}}
    options = {"name": HOSTILE[0], HOSTILE[1]: HOSTILE[2]}
    return Evaluation(figures, query, gallery, evaluator, options, about)


@pytest.fixture(scope="module")
def page_file(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(evaluation, tmp_path_factory.mktemp("report"), rows=4, k=6, date=DATE)


class Visit:
    """An opened page, with the messages and requests of the browser."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.context = browser.new_context(**{"reduced_motion": "reduce", **options})
        self.page = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("dialog", lambda dialog: self.messages.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *exception: object) -> None:
        self.context.close()


def test_hostile_names_are_text_and_nothing_is_loaded(browser: Any, page_file: Path) -> None:
    visit = Visit(browser, page_file)
    with visit as page:
        page.wait_for_load_state("networkidle")
        assert visit.messages == []
        assert [url for url in visit.requests if not url.startswith("data:")] == [
            page_file.as_uri()
        ]
        assert page.evaluate("window.hit") is None
        # One script, one style, and no element from a hostile name.
        live = "script, style, img, iframe, object, embed, base, link, [onload], [onerror]"
        tags = page.eval_on_selector_all(live, "nodes => nodes.map(n => n.localName).sort()")
        assert tags == ["link", "script", "style"]
        handlers = "n => [...n.attributes].some(a => a.name.startsWith('on'))"
        assert not page.evaluate(f"[...document.querySelectorAll('*')].some({handlers})")
        text = page.inner_text("body")
        assert all(words in text for words in HOSTILE)
        assert HOSTILE[4] in page.title()
        # The policy also blocks a script that is injected later.
        page.evaluate("""() => {
            const script = document.createElement("script");
            script.textContent = "window.hit = 9";
            document.body.append(script);
        }""")
        assert page.evaluate("window.hit") is None


def test_filters_and_order_select_and_sort_rows(browser: Any, page_file: Path) -> None:
    with Visit(browser, page_file) as page:
        assert page.eval_on_selector_all(".row", "rows => rows.length") == 12
        by_ap = sorted(shown(page, "precision"), key=float)
        assert shown(page, "group") == ["best"] * 4 + ["worst"] * 4 + ["random"] * 4
        page.select_option("[name=order]", "down")
        assert shown(page, "precision") == by_ap[::-1]
        page.select_option("[name=order]", "up")
        assert shown(page, "precision") == by_ap
        page.select_option("[name=group]", "worst")
        assert shown(page, "group") == ["worst"] * 4 and shown(page, "precision") == by_ap[:4]
        assert page.inner_text("#count") == "4 of 12 queries"
        page.click("button[type=reset]")
        until(page, "document.querySelector('#count').textContent.startsWith('12 ')")
        for name in ("camera", "person"):
            values = page.eval_on_selector_all(f"[name={name}] option", "o => o.map(x => x.value)")
            counts = []
            for value in values[1:]:
                page.select_option(f"[name={name}]", value)
                assert set(shown(page, name)) == {value}
                counts.append(len(shown(page, name)))
            assert sum(counts) == 12 and len(counts) > 1
            page.select_option(f"[name={name}]", "")
        outs = page.locator(".left-out >> visible=true")
        assert outs.count() > 0
        page.uncheck("[name=out]")
        assert outs.count() == 0


def shown(page: Any, key: str) -> list[str]:
    """A data attribute of each visible row, from top to bottom."""
    visible = "rows => rows.filter(r => r.checkVisibility())"
    return list(page.eval_on_selector_all(".row", f"{visible}.map(r => r.dataset.{key})"))


def test_verdicts_differ_in_frame_sign_and_text(browser: Any, page_file: Path) -> None:
    with Visit(browser, page_file) as page:
        frames, signs = set(), set()
        for verdict in ("match", "miss", "left-out", "query"):
            tile = page.locator(f".tile.{verdict}").first
            frames.add(tile.locator(".frame").evaluate("n => getComputedStyle(n).borderTopStyle"))
            assert verdict.replace("-", " ") in tile.locator(".verdict").inner_text()
            if verdict != "query":
                signs.add(tile.locator(".sign use").get_attribute("href"))
        assert len(frames) == 4 and len(signs) == 3
        named = "nodes => nodes.every(n => n.getAttribute('aria-label'))"
        assert page.eval_on_selector_all("[role=img]", named)
        gone = page.locator("[href='#gone']")
        assert gone.count() > 0
        assert "cannot be read" in gone.first.locator("..").get_attribute("aria-label")


def test_every_control_is_reachable_by_keyboard(browser: Any, page_file: Path) -> None:
    with Visit(browser, page_file) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "content"
        reached, outlined = [], True
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate("(n => n.name || n.type || n.className)(document.activeElement)")
            )
            outlined &= page.evaluate(
                "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
            )
            if reached.count("strip") == 12:
                break
        assert reached.count("strip") == 12 and outlined
        filters = ["group", "camera", "person", "order", "out", "reset"]
        assert [name for name in reached if name in filters] == filters
        # The arrow keys scroll a row of images.
        strip = page.locator(".strip").first
        page.set_viewport_size({"width": 390, "height": 800})
        strip.focus()
        page.keyboard.press("ArrowRight")
        until(page, "document.querySelector('.strip').scrollLeft > 0")


def until(page: Any, condition: str) -> None:
    """Wait for a condition; Playwright's own wait evaluates strings, which the policy forbids."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    pytest.fail(f"still false: {condition}")


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_never_scrolls_sideways(browser: Any, page_file: Path, width: int) -> None:
    with Visit(browser, page_file, viewport={"width": width, "height": 844}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # No text is too small to read.
        sizes = page.evaluate(TEXT_SIZES)
        assert min(sizes) >= (10 if width > 320 else 9), sizes


# Font sizes on the screen, with the scaling of the charts applied.
TEXT_SIZES = """() => [...document.querySelectorAll("body *")]
  .filter(n => n.checkVisibility() && !n.closest("defs, .unseen, title")
    && [...n.childNodes].some(c => c.nodeType === 3 && c.data.trim()))
  .map(n => {
    const scale = n.ownerSVGElement ? n.getScreenCTM().a || n.getScreenCTM().b : 1;
    return parseFloat(getComputedStyle(n).fontSize) * Math.abs(scale);
  })"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(browser: Any, page_file: Path, scheme: str) -> None:
    with Visit(browser, page_file, color_scheme=scheme) as page:
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (luminance(background) > 0.5) == (scheme == "light")
        found = page.evaluate(COLOURS)
        assert len(found) > 15  # kinds of text
        too_low = {
            key: round(contrast(text, *behind), 2)
            for key, (text, behind) in found.items()
            if contrast(text, *behind) < 4.5
        }
        assert too_low == {}


# For each kind of text, its colour and its background colours, the outermost first.
COLOURS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return `rgba(${r}, ${g}, ${b}, ${a / 255})`;
  };
  const found = {};
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim());
    if (!own || !node.checkVisibility() || node.closest("defs, .unseen, title, option")) continue;
    const style = getComputedStyle(node);
    const behind = [];
    for (let at = node; at; at = at.parentElement) {
      behind.unshift(rgba(getComputedStyle(at).backgroundColor));
    }
    const text = rgba(node.ownerSVGElement ? style.fill : style.color);
    found[`${node.localName} ${text} ${behind}`] = [text, behind];
  }
  return found;
}"""


def channels(colour: str) -> list[float]:
    """Red, green, blue and opacity, each 0..1."""
    numbers = [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")]
    return [*(part / 255 for part in numbers[:3]), *(numbers[3:] or [1.0])]


def luminance(colour: str) -> float:
    return relative_luminance(channels(colour)[:3])


def relative_luminance(rgb: list[float]) -> float:
    """Relative luminance as defined by WCAG 2.2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(text: str, *behind: str) -> float:
    """The contrast ratio of text on layers of background colours, the nearest one last."""
    below = [1.0, 1.0, 1.0]
    for layer in behind:
        *rgb, alpha = channels(layer)
        below = [alpha * c + (1 - alpha) * b for c, b in zip(rgb, below, strict=True)]
    *rgb, alpha = channels(text)
    above = [alpha * c + (1 - alpha) * b for c, b in zip(rgb, below, strict=True)]
    high, low = sorted((relative_luminance(above), relative_luminance(below)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_agrees_with_known_values() -> None:
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)
    half = contrast("rgba(0, 0, 0, 0.5)", "rgb(0, 0, 0)", "rgba(255, 255, 255, 1)")
    assert half == pytest.approx(3.95, abs=0.05)


def test_without_scripts_the_page_is_complete(browser: Any, page_file: Path) -> None:
    with Visit(browser, page_file, java_script_enabled=False) as page:
        assert page.locator(".row").count() == 12
        assert page.locator(".row >> visible=true").count() == 12
        assert not page.locator("#filters").is_visible()
        assert page.locator("#cmc svg").first.is_visible()


def test_headings_tables_and_labels_are_accessible(browser: Any, page_file: Path) -> None:
    with Visit(browser, page_file) as page:
        assert page.get_attribute("html", "lang") == "en"
        levels = page.eval_on_selector_all(
            "h1, h2, h3, h4, h5, h6", "nodes => nodes.map(n => +n.localName[1])"
        )
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
        scoped = "nodes => nodes.every(n => n.scope)"
        assert page.eval_on_selector_all("th", scoped)
        ids = page.eval_on_selector_all("[id]", "nodes => nodes.map(n => n.id)")
        assert len(ids) == len(set(ids))
        links = page.eval_on_selector_all("a", "nodes => nodes.map(n => n.hash.slice(1))")
        assert set(links) <= set(ids)
        labels = "nodes => nodes.every(n => n.labels.length)"
        assert page.eval_on_selector_all("select, input", labels)


def test_the_print_is_light_and_shows_every_image(browser: Any, page_file: Path) -> None:
    with Visit(browser, page_file, color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.9
        assert not page.locator("#filters").is_visible() and not page.locator("nav").is_visible()
        cut = "strips => strips.filter(s => s.scrollWidth > s.clientWidth + 1).length"
        page.set_viewport_size({"width": 720, "height": 1000})
        assert page.eval_on_selector_all(".strip", cut) == 0


def test_a_page_of_few_figures_opens_without_messages(
    browser: Any, evaluation: Evaluation, tmp_path: Path
) -> None:
    sides = [dataclasses.replace(side, paths=()) for side in (evaluation.query, evaluation.gallery)]
    bare = Evaluation({"mAP": 0.5}, *sides, evaluation.evaluator)
    visit = Visit(browser, write_report(bare, tmp_path, date=DATE))
    with visit as page:
        assert visit.messages == [] and "50.0%" in page.inner_text("#figures")
