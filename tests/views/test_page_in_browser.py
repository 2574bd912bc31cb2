"""Pages as a person uses them, in headless Chromium. Skipped where there is no Chromium or no playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pictured_stores import pictured_store

import dmin_trace

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [what for what, there in (("chromium", CHROMIUM), ("playwright", find_spec("playwright"))) if not there]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{' and '.join(MISSING)}: not installed")

HOSTILE = [
    "<script>window.hurt = 1</script>",
    "\"'><img src=x onerror='window.hurt = 1'>",
    "</style></script></textarea></title><svg onload='window.hurt = 1'>",
    "<iframe src='https://example.org'></iframe><link rel=stylesheet href='https://example.org/x.css'>",
    "<a href=\"javascript:window.hurt = 1\">click</a><form action='//example.org'><button>go</button></form>",
    "\u202etxet desrever\u2066\u200f\u061c \x1b[31m\x00\x07\x9b\r\n\t\ud800 end".encode("utf-8", "replace").decode(),
    "W" * 200_000,
    "شعر عربي طويل עברית 狐の絵 🦊" * 20,
    "&lt;b&gt;&amp;amp; ]]> <!-- {{ 7 * 7 }} {% raw %} ${window.hurt = 1}",
    "<style>*{display:none}</style><base href='https://example.org/'><meta http-equiv=refresh content='0;url=//x'>",
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with plain.html, an answer; hostile.html, one whose texts are hostile; and audit.html."""
    folder = tmp_path_factory.mktemp("pages")
    captions = [f"picture {n} of kind {n % 16}" for n in range(80)]
    for name, texts, artists in (("plain", captions, ("Ann", "Ben", "Cem")), ("hostile", HOSTILE * 8, HOSTILE[:5])):
        trace = pictured_store(
            folder / f"{name}.zarr",
            texts,
            artists=artists,
            files=None if texts is captions else texts,
            without=[21],
            copies=True,
        )
        queries = trace.query_samples([5, 12, 33])
        if texts is not captions:
            object.__setattr__(queries, "names", tuple(HOSTILE[:3]))
            object.__setattr__(queries, "prompts", tuple(HOSTILE[5:8]))
        lowest, totals = trace.top_k(queries, 6, largest=False), trace.totals(queries, "artist")
        trace.top_k(queries, 20).to_html(folder / f"{name}.html", lowest=lowest, totals=totals)
        dmin_trace.audit_trace(trace).to_html(folder / f"{name}-audit.html")
        totals.to_html(folder / f"{name}-totals.html")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM)
        yield running
        running.close()


class Opened:
    """A page in a context of its own, with what it said to the console and what it asked for."""

    def __init__(self, browser: Browser, file: Path, *, width: int = 1440, **context: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **context)
        self.page: Page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url[:60]))
        self.page.goto(file.as_uri())
        self.file = file

    def __enter__(self) -> Page:
        return self.page

    def __exit__(self, *raised: object) -> None:
        others = [url for url in self.asked if not url.startswith("data:") and url != self.file.as_uri()[:60]]
        hurt = self.page.evaluate("window.hurt")
        self.context.close()
        assert (self.said, others, hurt) == ([], [], None)


def samples(page: Page, section: int = 0, part: int = 0) -> list[int]:
    """The samples that are visible in a list of a query."""
    found = page.locator("section").nth(section).locator(".list").nth(part).locator(".card:visible")
    return [int(one or "") for one in found.evaluate_all("cards => cards.map(card => card.dataset.sample)")]


def overflow(page: Page) -> int:
    """Pixels by which the page is wider than the window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@pytest.mark.parametrize("name", ["plain", "plain-audit", "plain-totals", "hostile", "hostile-audit", "hostile-totals"])
def test_a_page_runs_without_a_word_and_fits_any_width(name: str, pages: Path, browser: Browser) -> None:
    for width in (320, 375, 768, 1440):
        with Opened(browser, pages / f"{name}.html", width=width) as page:
            assert overflow(page) == 0
            pictures = page.locator("img")
            assert pictures.count() > 0
            assert pictures.evaluate_all("all => all.every(one => one.complete && one.naturalWidth > 0)")
            page.emulate_media(media="print", color_scheme="dark")
            assert overflow(page) == 0


def test_a_hostile_page_has_the_elements_of_a_plain_one(pages: Path, browser: Browser) -> None:
    names = "[...new Set([...document.querySelectorAll('*')].map(one => one.localName))].sort()"
    found = []
    for name in ("plain", "hostile"):
        with Opened(browser, pages / f"{name}.html") as page:
            found.append(page.evaluate(names))
            assert page.title().startswith("Most influential training samples")
            for button in page.locator(".card button").all()[:3]:
                button.click()
                assert page.locator("#large").evaluate("of => of.open")
                assert overflow(page) == 0
                page.keyboard.press("Escape")
    assert found[0] == found[1]


def test_the_filter_leaves_the_samples_with_its_words(pages: Path, browser: Browser) -> None:
    with Opened(browser, pages / "plain.html") as page:
        whole = samples(page)
        assert len(whole) == 20 and page.locator("#count").inner_text() == "78 samples"
        page.fill("#filter", " 5.png KIND")
        left = samples(page)
        assert left == [n for n in whole if n % 10 == 5] and 0 < len(left) < 20
        assert " of 78 samples" in page.locator("#count").inner_text()
        page.fill("#filter", "no such words")
        assert samples(page) == [] and page.locator(".nothing:visible").count() == 6
        page.locator("#filter").press("Escape")
        assert samples(page) == whole and page.locator(".nothing:visible").count() == 0
        page.check("#only")
        standing = samples(page)
        assert 0 < len(standing) < 20 and standing == whole[: len(standing)]


def test_samples_are_sorted_by_what_is_chosen(pages: Path, browser: Browser) -> None:
    with Opened(browser, pages / "plain.html") as page:
        by_influence = samples(page)
        page.select_option("#sort", label="sample number")
        assert samples(page) == sorted(by_influence)
        page.select_option("#sort", label="caption")
        assert samples(page) == sorted(by_influence, key=str)
        page.select_option("#sort", value="value3")
        values = (
            page.locator(".list")
            .first.locator(".card")
            .evaluate_all("cards => cards.map(card => Number(card.dataset.values.split(' ')[3]))")
        )
        assert values == sorted(values, reverse=True)
        page.select_option("#sort", label="influence")
        assert samples(page) == by_influence


def test_a_sample_is_enlarged_and_the_next_one_follows(pages: Path, browser: Browser) -> None:
    with Opened(browser, pages / "plain.html") as page:
        order = samples(page)
        cards, large = page.locator(".list").first.locator(".card"), page.locator("#large")
        small = cards.nth(1).locator("img").get_attribute("src")
        cards.nth(1).locator("button").click()
        assert large.evaluate("of => of.open") and large.locator(".stage img").get_attribute("src") == small
        assert large.locator("h3").inner_text() == f"Sample {order[1]}"
        text = large.inner_text()
        assert f"picture {order[1]} of kind" in text and f"folder/{order[1]:04d}.png" in text and "artist" in text
        assert large.locator(".steps dt").count() == 5 and large.locator(".curve").count() == 1
        # As large as the dialog has room for, whatever its pixels.
        box = large.locator(".stage img").bounding_box()
        assert box is not None and min(box["width"], box["height"]) > 300
        page.keyboard.press("ArrowRight")
        assert large.locator("h3").inner_text() == f"Sample {order[2]}"
        page.click("#before")
        page.click("#before")
        assert large.locator("h3").inner_text() == f"Sample {order[0]}" and page.locator("#before").is_disabled()
        page.keyboard.press("Escape")
        assert not large.evaluate("of => of.open")
        # Back where the person was.
        assert page.evaluate("document.activeElement.closest('.card').dataset.sample") == str(order[0])
        cards.nth(3).locator("button").click()
        page.click("#close")
        assert not large.evaluate("of => of.open")
        cards.nth(3).locator("button").click()
        page.mouse.click(3, 3)
        assert not large.evaluate("of => of.open")


def test_keys_alone_reach_everything(pages: Path, browser: Browser) -> None:
    with Opened(browser, pages / "plain.html") as page:
        order = samples(page)
        reached = "document.activeElement.closest('.card')?.dataset.sample"
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate(reached):
                break
        assert page.evaluate(reached) == str(order[0])
        page.keyboard.press("ArrowRight")
        assert page.evaluate(reached) == str(order[1])
        page.keyboard.press("ArrowDown")
        below = order.index(int(page.evaluate(reached)))
        assert below > 2
        page.keyboard.press("ArrowUp")
        assert page.evaluate(reached) == str(order[1])
        page.keyboard.press("End")
        assert page.evaluate(reached) == str(order[-1])
        page.keyboard.press("Home")
        page.keyboard.press("Enter")
        assert page.locator("#large").evaluate("of => of.open")
        page.keyboard.press("Escape")
        assert page.evaluate(reached) == str(order[0])


def test_a_page_without_scripts_is_still_read(pages: Path, browser: Browser) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto((pages / "plain.html").as_uri())
        assert page.locator(".card").first.is_visible() and page.locator("table").first.is_visible()
        assert not page.locator(".tools").is_visible() and not page.locator("#large").is_visible()


@pytest.mark.skipif(find_spec("axe_playwright_python") is None, reason="axe-playwright-python: not installed")
@pytest.mark.parametrize("name", ["plain", "plain-audit", "plain-totals", "hostile"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(name: str, scheme: str, pages: Path, browser: Browser) -> None:
    spec = find_spec("axe_playwright_python")
    assert spec is not None and spec.origin is not None
    axe = (Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8")
    for width, enlarged in ((375, False), (1440, True)):
        with Opened(browser, pages / f"{name}.html", width=width, color_scheme=scheme) as page:
            if enlarged and (button := page.locator(".card button").first).count():
                button.click()
            page.evaluate(axe)
            found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
            faults = [
                (one["id"], one["impact"], [node["html"][:200] for node in one["nodes"][:3]])
                for one in found["violations"]
                if one["impact"] in ("serious", "critical")
            ]
            assert faults == []
            assert len(found["passes"]) > 10
