"""Pages and notebooks: they show what the answer has, need nothing else, and hostile text stays text."""

from __future__ import annotations

import base64
import hashlib
import tomllib
import unicodedata
from dataclasses import replace
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from answers import ANY_TEXT, KNOWN, RECORD, answer, hit
from hypothesis import given, settings
from pictured_stores import picture, pictured_store

import dmin_trace
from dmin_trace.errors import QueryError, SettingsError
from dmin_trace.query import GroupTotal, TopK, Totals, Trace
from dmin_trace.store import encode_webp
from dmin_trace.views.notebook import answer_html, hit_html, totals_html
from dmin_trace.views.page import answer_page, totals_page
from dmin_trace.views.pictures import curve_of, scale_of

VOID = {"meta", "link", "img", "input"}
UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


class Parsed(HTMLParser):
    """The elements of a page in order, each with its attributes, and the texts outside style and script."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inline: dict[str, str] = {}
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            self.inline[self.open[-1]] = self.inline.get(self.open[-1], "") + data
        else:
            self.texts.append(data)

    @property
    def form(self) -> list[tuple[str, tuple[str, ...]]]:
        """The elements with the names of their attributes."""
        return [(tag, tuple(attributes)) for tag, attributes in self.elements]

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        named = {name.rstrip("_"): value for name, value in wanted.items()}
        return [of for name, of in self.elements if name == tag and named.items() <= of.items()]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def assert_needs_nothing(page: str) -> Parsed:
    """A page, or what a notebook shows, neither runs nor loads anything but its own script and style."""
    parsed = Parsed(page)
    for _, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcset", "action")]
        for name in ("src", "href"):
            if (found := attributes.get(name)) is not None:
                assert found.startswith(("data:image/webp;base64,", "#")) or found == "data:,"
    assert "http:" not in page and "https:" not in page and "url(" not in page and "@import" not in page
    return parsed


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    captions = [f"picture {n} of kind {n % 12}" for n in range(60)]
    return pictured_store(tmp_path_factory.mktemp("made") / "t.zarr", captions, without=[9], copies=True)


@pytest.fixture(scope="module")
def top(trace: Trace) -> TopK:
    return trace.top_k(trace.query_samples([2, 30]), 12)


def write(top: Any, folder: Path, **parts: Any) -> str:
    top.to_html(folder / "page.html", **parts)
    assert [file.name for file in folder.iterdir()] == ["page.html"]
    return (folder / "page.html").read_text(encoding="utf-8")


def test_a_page_needs_nothing_else_and_its_policy_allows_it_alone(top: TopK, tmp_path: Path) -> None:
    parsed = assert_needs_nothing(write(top, tmp_path))
    (policy,) = [of for of in parsed.all("meta") if of.get("http-equiv") == "Content-Security-Policy"]
    parts = dict(part.split(" ", 1) for part in (policy["content"] or "").split("; "))
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        digest = base64.b64encode(hashlib.sha256(parsed.inline[tag].encode()).digest()).decode()
        assert parts.pop(directive) == f"'sha256-{digest}'"
        assert len(parsed.all(tag)) == 1
    assert parts == {
        "default-src": "'none'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # Whatever is before it would not be under it.
    assert [tag for tag, _ in parsed.elements][:4] == ["html", "head", "meta", "meta"]


def test_a_page_shows_the_hits_with_their_pictures(trace: Trace, top: TopK, tmp_path: Path) -> None:
    lowest = trace.top_k(trace.query_samples([2, 30]), 4, largest=False)
    parsed = Parsed(write(top, tmp_path, lowest=lowest))
    cards = parsed.all("li", **{"class": "card"}) + parsed.all("li", **{"class": "card stands"})
    listed = [int(of["data-sample"] or "") for tag, of in parsed.elements if tag == "li" and "data-sample" in of]
    expected = [[hit.sample for hit in hits] for hits in (top.hits[0], lowest.hits[0], top.hits[1], lowest.hits[1])]
    assert listed == sum(expected, []) and len(cards) == len(listed) == 32
    stands = [hit.stands_out for hits in (*top.hits, *lowest.hits) for hit in hits]
    assert len(parsed.all("li", **{"class": "card stands"})) == sum(map(bool, stands)) > 0

    def uri(sample: int) -> str:
        webp = trace.thumbnails.webp(sample)
        assert webp is not None
        return "data:image/webp;base64," + base64.b64encode(webp).decode()

    shown = [of["src"] for of in parsed.all("img")]
    # In the navigation, and then each query above its samples; sample 9 has no picture.
    assert shown[:3] == [uri(2), uri(30), uri(2)] and shown.count(uri(30)) >= 2
    of_query = [uri(hit.sample) for hits in (top.hits[0], lowest.hits[0]) for hit in hits if hit.sample != 9]
    assert shown[3 : 3 + len(of_query)] == of_query and shown[3 + len(of_query)] == uri(30)
    for hit_ in (*top.hits[0], *lowest.hits[1]):
        assert f"picture {hit_.sample} of kind {hit_.sample % 12}" in parsed.text
        assert f"folder/{hit_.sample:04d}.png" in parsed.text and f"z {hit_.z:.1f}" in parsed.text
    assert all(verdict in parsed.text for verdict in top.verdicts)
    for fact in (top.record.trace, top.record.weights, top.record.queries, top.answered_by.description):
        assert fact in parsed.text


def test_a_sample_without_a_picture_has_a_card_of_words(trace: Trace, tmp_path: Path) -> None:
    top = trace.top_k(trace.query_samples([9]), 3)
    assert top.pictures == (None,) and top.hits[0][0].sample == 9
    parsed = Parsed(write(top, tmp_path))
    assert len(parsed.all("img")) == 2
    assert parsed.all("span", **{"class": "words"}) and parsed.text.count("picture 9 of kind 9") >= 3


def test_totals_of_other_queries_are_refused(trace: Trace, top: TopK, tmp_path: Path) -> None:
    other = trace.query_samples([2, 31])
    with pytest.raises(QueryError, match="lowest is not of the queries and the score"):
        top.to_html(tmp_path / "page.html", lowest=trace.top_k(other, 3, largest=False))
    with pytest.raises(QueryError, match="totals is not of the queries and the score"):
        top.to_html(tmp_path / "page.html", totals=trace.totals(other, "artist"))
    with pytest.raises(QueryError, match="lowest has the largest scores"):
        top.to_html(tmp_path / "page.html", lowest=top)
    with pytest.raises(QueryError, match="totals is not of the queries and the score"):
        top.to_html(tmp_path / "page.html", totals=trace.totals(trace.query_samples([2, 30]), "artist", score="dmin"))
    # The same names do not make the same queries.
    queries = trace.query_samples([2, 30])
    changed = replace(queries, gradients=queries.gradients[::-1])
    with pytest.raises(QueryError, match="lowest is not of the queries and the score"):
        top.to_html(tmp_path / "page.html", lowest=trace.top_k(changed, 3, largest=False))
    assert list(tmp_path.iterdir()) == []


def test_a_page_has_the_totals(trace: Trace, top: TopK, tmp_path: Path) -> None:
    totals = trace.totals(trace.query_samples([2, 30]), "artist")
    for page in (write(top, tmp_path, totals=totals), write(totals, tmp_path), totals._repr_html_()):
        parsed = assert_needs_nothing(page)
        assert len(parsed.all("table")) == 2
        for total in totals.groups[0]:
            assert f"{total.group} {total.samples} {total.share:.1%} " in parsed.text
    assert "script" not in Parsed(write(totals, tmp_path)).inline


def test_a_page_of_an_audit_shows_near_copies_side_by_side(trace: Trace, tmp_path: Path) -> None:
    audit = dmin_trace.audit_trace(trace)
    assert [(found.sample, found.of) for found in audit.of_kind("near-copy")] == [(3, 2)]
    for page in (write(audit, tmp_path), audit._repr_html_()):
        parsed = assert_needs_nothing(page)
        for sample in (2, 3):
            webp = base64.b64encode(trace.thumbnails.webp(sample) or b"").decode()
            assert any((of["src"] or "").endswith(webp) for of in parsed.all("img"))
        assert "nearly the same as sample 2" in parsed.text and "1 sample." in parsed.text
    with pytest.raises(SettingsError, match="k is 0"):
        audit.to_html(tmp_path / "none.html", k=0)


def test_a_page_is_written_whole_or_not_at_all(top: TopK, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="cannot be written"):
        top.to_html(tmp_path / "missing" / "page.html")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(QueryError, match="cannot be written"):
        top.to_html(tmp_path / "page.html")
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_a_page_of_8_queries_with_24_hits_has_less_than_3_megabytes(tmp_path: Path) -> None:
    # Noise is what WebP reduces least: each picture takes nearly all of the 6,000 bytes that it may.
    caption = "a long caption of a picture, such as a model writes them, with all that there is in it " * 3
    trace = pictured_store(tmp_path / "t.zarr", [f"{n} {caption}" for n in range(240)], side=128)
    assert len(trace.thumbnails.webp(0) or b"") > 4000
    queries = trace.query_samples(range(8))
    (tmp_path / "out").mkdir()
    lowest, totals = trace.top_k(queries, 8, largest=False), trace.totals(queries, "artist")
    page = write(trace.top_k(queries, 24), tmp_path / "out", lowest=lowest, totals=totals)
    assert len(Parsed(page).all("li", **{"class": "card"})) > 128
    assert len(page.encode()) < 3_000_000


def hostile(text: str) -> list[str]:
    """All that is shown of an answer, with this text wherever a text is shown."""
    hits = [replace(hit(1, None, caption=text, file_name=text), z=9.0, stands_out=True), hit(2, None, **{"x": text})]
    names = {"names": (text, "b"), "prompts": (text, None), "without": (text, None)}
    top = answer([hits, []], tuple(50.0 + 100 * k for k in range(10)), background=KNOWN, score="deflated", **names)
    own = encode_webp(picture(1), 128)
    record = replace(RECORD, script=text, weights_of=text, settings={text: text}, writers={text: text}, trace=text)
    top = replace(top, record=record, pictures=(own, None), deflation=text)
    top = replace(top, answered_by=replace(top.answered_by, description=text))
    total = GroupTotal(
        group=text, samples=3, share=0.5, low=0.1, high=0.9, expected=0.2, mean=1.0, z=1.0, p=0.5, standing_out=1
    )
    others = replace(total, group=None)
    lists = [[total, others]] * 2
    totals = Totals(
        text,
        lists,
        top.names,
        top.prompts,
        top.without,
        9,
        1,
        2,
        top.score,
        top.backgrounds,
        text,
        top.pictures,
        record,
    )
    lowest = replace(top, backgrounds=(replace(KNOWN, largest=False),) * 2)
    pages = [answer_page(top, lowest, totals), totals_page(totals)]
    return [*pages, answer_html(top), hit_html(hits[0]), hit_html(hits[1]), totals_html(totals)]


PLAIN = [Parsed(page).form for page in hostile("plain")]


@given(ANY_TEXT)
@settings(max_examples=40, deadline=None)
def test_any_text_leaves_the_elements_and_attributes_of_a_page_as_they_are(text: str) -> None:
    for page, form in zip(hostile(text or "x"), PLAIN, strict=True):
        parsed = assert_needs_nothing(page)
        assert parsed.form == form
        values = [value or "" for _, of in parsed.elements for value in of.values()]
        for shown in (*parsed.texts, *values):
            assert {unicodedata.category(c) for c in shown} & UNSAFE <= {"Cc"}
            assert {c for c in shown if unicodedata.category(c) == "Cc"} <= {"\n"}
        page.encode("utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "</style></script><svg onload=alert(1)>",
        "\"'><img src=x onerror=alert(1)>",
        "{{ 7 * 7 }}{% raw %}",
        "&lt;b&gt; &amp;",
        "]]><!--",
        "javascript:alert(1)",
    ],
)
def test_markup_is_shown_as_it_is_written(text: str) -> None:
    for page, form in zip(hostile(text), PLAIN, strict=True):
        parsed = Parsed(page)
        assert parsed.form == form
        assert " ".join(text.split()) in parsed.text


def test_a_huge_text_is_cut() -> None:
    for page in hostile("x" * 1_000_000):
        assert len(page) < 150_000


def test_curves_are_on_one_scale_that_holds_zero() -> None:
    scale = scale_of([(0.5, 1.0), (0.25, -0.5)])
    high, low = curve_of((0.5, 1.0), scale), curve_of((0.25, -0.5), scale)
    assert high is not None and low is not None
    assert (high.line, high.zero) == ("M0.0,10.3 100.0,1.0", "19.7")
    assert low.line == "M0.0,15.0 100.0,29.0" and low.area.endswith("V19.7 H0 Z")
    assert curve_of((1.0,), scale) is None and curve_of((1.0, float("nan")), scale) is None
    flat = curve_of((0.0, 0.0), scale_of([(0.0, 0.0)]))
    assert flat is not None and "nan" not in flat.line
    huge = curve_of((1e308, -1e308), scale_of([(1e308, -1e308)]))
    assert huge is not None and "inf" not in huge.line and "nan" not in huge.line


def test_an_answer_of_one_row_has_no_curves(tmp_path: Path) -> None:
    top = answer([[hit(1, (0.5,), caption="one")]], (), groups=((100.0, 900.0),))
    parsed = Parsed(answer_page(top))
    assert not parsed.all("svg") and "influence at" not in parsed.text and "0.5000" in parsed.text


def test_the_package_has_all_templates() -> None:
    root = Path(__file__).parents[2]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = root / "dmin_trace" / "views"
    kept = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix not in (".py", ".pyc")]
    kept = [name for name in kept if not name.endswith("__pycache__") and (folder / name).is_file()]
    assert len(kept) >= 8 and all(any(fnmatch(name, one) for one in data["dmin_trace.views"]) for name in kept)


def test_a_notebook_shows_them_with_pictures_and_without_scripts(trace: Trace, top: TopK) -> None:
    hits = [hit for of_query in top.hits for hit in of_query]
    of_hits = sum(hit.thumbnail is not None for hit in hits)
    for shown, pictures, text in (
        (trace, 8, "60 of 60; complete"),
        (top, 2 + of_hits, top.verdicts[1]),
        (hits[0], 1, "picture 2 of kind 2"),
    ):
        parsed = assert_needs_nothing(shown._repr_html_())
        assert not parsed.all("script") and not parsed.all("button")
        assert len(parsed.all("img")) == pictures and text in parsed.text


def test_a_closed_trace_shows_itself_too(tmp_path: Path) -> None:
    trace = pictured_store(tmp_path / "t.zarr", ["a"] * 4)
    trace.close()
    assert "Trace(closed)" in Parsed(trace._repr_html_()).text
