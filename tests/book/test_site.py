"""The built book in a browser, with the network off: every page at the width of a desktop and of a phone."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urldefrag

import pytest
import yaml
from playwright.sync_api import Browser, Error, Page, sync_playwright

BOOK = Path(__file__).parents[2] / "book"
HTML = BOOK / "_build" / "html"
WIDTHS = (1280, 390)
CI = bool(os.environ.get("CI"))

# What one page says about itself, once its formulas are set.
EXAMINE = """async () => {
  if (window.MathJax?.startup?.promise) await window.MathJax.startup.promise;
  const all = selector => [...document.querySelectorAll(selector)];
  const math = all("span.math, div.math");
  return {
    title: document.title,
    ids: all("[id]").map(e => e.id),
    links: all("a[href]").map(a => a.href),
    formulas: math.length,
    raw_math: math.filter(e => !e.querySelector("mjx-container svg")).map(e => e.textContent.slice(0, 60)),
    bad_math: all("[data-mml-node=merror]").map(e => e.closest("mjx-container").textContent.slice(0, 60)),
    no_alt: all("img").filter(e => !e.alt.trim()).map(e => e.src),
    broken_images: all("img").filter(e => e.complete && e.naturalWidth === 0).map(e => e.src),
    overflow: document.scrollingElement.scrollWidth - window.innerWidth,
    stderr: all(".output.stderr").map(e => e.textContent.slice(0, 200)),
    search_fields: all("input[type=search]").filter(e => e.checkVisibility()).length,
    neighbours: ["a.left-prev", "a.right-next"].map(selector => document.querySelector(selector)?.pathname.slice(1)),
  };
}"""

# What a dark page shows: text too close in luminance to its ground (WCAG's contrast), figures on a dark ground.
EXAMINE_DARK = """() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => channels(colour).slice(0, 3).reduce((sum, c, i) => {
    c /= 255;
    return sum + [0.2126, 0.7152, 0.0722][i] * (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  }, 0);
  const opaque = e => (channels(getComputedStyle(e).backgroundColor)[3] ?? 1) > 0.5;
  const ground = e => {
    while (e && !opaque(e)) e = e.parentElement;
    return e ? luminance(getComputedStyle(e).backgroundColor) : 1;
  };
  const contrast = e => {
    const [low, high] = [luminance(getComputedStyle(e).color), ground(e)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const article = [...document.querySelectorAll("article *")];
  const text = article.filter(e => e.checkVisibility() && !e.closest("mjx-container, svg, script, style")
    && [...e.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.textContent.trim()));
  return {
    theme: document.documentElement.dataset.theme,
    ground: ground(document.body),
    unreadable: text.filter(e => contrast(e) < 3).map(e => `${e.tagName}.${e.className} ${e.textContent.slice(0, 40)}`),
    dark_figures: article.filter(e => e.tagName === "IMG" && ground(e) < 0.5).map(e => e.alt),
  };
}"""


@dataclass
class Visit:
    """One page at one width: what it said, and what went wrong on the way."""

    page: str
    width: int
    facts: dict = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    external: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.page} at {self.width} px"

    def watch(self, page: Page, base: str) -> None:
        """Note the errors and failed requests of a browser page, and keep it from leaving this machine."""

        def note_console(message) -> None:
            if message.type == "error":
                self.errors.append(message.text)

        def note_response(response) -> None:
            if not response.ok:
                self.failed.append(f"{response.status} {response.url}")

        def refuse_external(route) -> None:
            if route.request.url.startswith(base):
                route.continue_()
            else:
                self.external.append(route.request.url)
                route.abort()

        page.on("console", note_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("response", note_response)
        page.route(lambda url: not url.startswith(("data:", "blob:")), refuse_external)


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files without a line per request."""

    def log_message(self, *args) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine only; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def pages(folder: Path) -> list[str]:
    """The names of a site's pages."""
    files = sorted(folder.rglob("*.html"))
    names = [file.relative_to(folder).as_posix() for file in files if not is_redirect(file)]
    return [name for name in names if not name.startswith("_static/")]


def visit_all(browser: Browser, folder: Path) -> list[Visit]:
    """Open each page of a site at each width."""
    visits = []
    with served(folder) as base:
        for width in WIDTHS:
            context = browser.new_context(viewport={"width": width, "height": 900})
            for page_name in pages(folder):
                visit = Visit(page_name, width)
                page = context.new_page()
                visit.watch(page, base)
                page.goto(base + page_name, wait_until="load")
                visit.facts = page.evaluate(EXAMINE)
                visit.facts["links"] = [link.removeprefix(base) for link in visit.facts["links"]]
                page.close()
                visits.append(visit)
            context.close()
    return visits


def visit_all_in_the_dark(browser: Browser, folder: Path) -> dict[str, dict]:
    """What each page of a site says about its colours to a reader whose system is dark."""
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    facts = {}
    with served(folder) as base:
        for name in pages(folder):
            page.goto(base + name, wait_until="load")
            facts[name] = page.evaluate(EXAMINE_DARK)
    context.close()
    return facts


def is_redirect(file: Path) -> bool:
    return 'http-equiv="refresh"' in file.read_text(encoding="utf-8").lower()


def dead_links(visits: list[Visit], folder: Path) -> list[str]:
    """The links of a site to its own files and anchors that lead nowhere."""
    ids = {visit.page: set(visit.facts["ids"]) for visit in visits}
    dead = []
    for visit in visits:
        for link in set(visit.facts["links"]):
            if "://" in link or link.startswith(("mailto:", "javascript:", "data:")):
                continue
            path, anchor = (unquote(part) for part in urldefrag(link))
            path = path.split("?")[0] or "index.html"
            if not (folder / path).is_file() or (anchor and path in ids and anchor not in ids[path]):
                dead.append(f"{visit}: {link}")
    return dead


def missing(what: str) -> None:
    """Without its means a check is skipped for a reader and fails where it must run."""
    (pytest.fail if CI else pytest.skip)(what)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        missing("no Chromium on the PATH: install your system's package to test the book in a browser")
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=executable, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            )
        except Error as error:
            missing(f"{executable} does not start: {error}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def book(browser) -> list[Visit]:
    if not (HTML / "index.html").is_file():
        missing("the book is not built: run `make book` first")
    return visit_all(browser, HTML)


def test_pages_load_without_errors(book):
    assert {visit.width for visit in book} == set(WIDTHS)
    assert not {str(visit): visit.errors for visit in book if visit.errors}
    assert not {str(visit): visit.failed for visit in book if visit.failed}


def test_nothing_comes_from_the_network(book):
    assert not {str(visit): visit.external for visit in book if visit.external}


def test_formulas_are_typeset(book):
    assert sum(visit.facts["formulas"] for visit in book) > 0
    assert not {str(visit): visit.facts["raw_math"] for visit in book if visit.facts["raw_math"]}
    assert not {str(visit): visit.facts["bad_math"] for visit in book if visit.facts["bad_math"]}


def test_images_load_and_have_alternative_texts(book):
    assert not {str(visit): visit.facts["no_alt"] for visit in book if visit.facts["no_alt"]}
    assert not {str(visit): visit.facts["broken_images"] for visit in book if visit.facts["broken_images"]}


def test_pages_fit_the_screen(book):
    assert not {str(visit): visit.facts["overflow"] for visit in book if visit.facts["overflow"] > 1}


def test_chapters_ran_without_a_warning(book):
    assert not {str(visit): visit.facts["stderr"] for visit in book if visit.facts["stderr"]}


def test_one_search_field_at_most(book):
    assert not {str(visit): n for visit in book if (n := visit.facts["search_fields"]) > 1}


def test_links_lead_somewhere(book):
    assert not dead_links(book, HTML)


def test_readers_are_led_through_the_book_in_order(book):
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text())
    order = [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]
    order = [f"{name}.html" for name in order]
    neighbours = {visit.page: visit.facts["neighbours"] for visit in book}
    for page, before, after in zip(order, [None, *order], [*order[1:], None], strict=False):
        assert neighbours[page] == [before, after], page


@pytest.mark.usefixtures("book")
def test_the_search_finds_words_without_a_network(browser):
    page = browser.new_page()
    visit = Visit("search.html", 1280)
    with served(HTML) as base:
        visit.watch(page, base)
        for word, found in (("softplus", "ml3.html"), ("OnlineLoss", "api_adalfl_lite.html")):
            page.goto(f"{base}search.html?q={word}")
            page.wait_for_function(
                "/matching|did not match/.test(document.querySelector('#search-results p')?.innerText)"
            )
            links = [link.get_attribute("href") for link in page.query_selector_all("#search-results li a")]
            assert any(link.startswith(found) for link in links), (word, links)
        page.goto(f"{base}search.html?q=xyzzyx")
        page.wait_for_function("/did not match/.test(document.querySelector('#search-results p')?.innerText)")
        assert not page.query_selector_all("#search-results li a")
    page.close()
    assert not visit.external and not visit.errors


@pytest.mark.usefixtures("book")
def test_dark_pages_are_readable(browser):
    found = visit_all_in_the_dark(browser, HTML)
    assert {name: facts["theme"] for name, facts in found.items()} == dict.fromkeys(found, "dark")
    assert not {name: facts["ground"] for name, facts in found.items() if facts["ground"] > 0.1}
    assert not {name: facts["unreadable"] for name, facts in found.items() if facts["unreadable"]}
    assert not {name: facts["dark_figures"] for name, facts in found.items() if facts["dark_figures"]}


def test_faults_are_seen_in_the_dark(browser, tmp_path):
    (tmp_path / "page.html").write_text(
        """<!doctype html><html data-theme="dark"><title>Faults</title>
        <body style="background: #111; color: #eee"><article>
        <p>light on dark</p><p style="color: #333">dark on dark</p><p style="background: #eee">light on light</p>
        <img alt="a figure" src="data:,"><img alt="a light figure" style="background: white" src="data:,">
        </article></body>"""
    )
    (found,) = visit_all_in_the_dark(browser, tmp_path).values()
    assert [text.split(". ")[1] for text in found["unreadable"]] == ["dark on dark", "light on light"]
    assert found["dark_figures"] == ["a figure"] and found["ground"] < 0.1


def test_every_fault_is_seen(browser, tmp_path):
    """The checks above see what they look for: a page with one fault of each kind has them all reported."""
    (tmp_path / "page.html").write_text(
        """<!doctype html><title>Faults</title><body>
        <script>console.error("a message")</script><script>undefined_function()</script>
        <script src="missing.js"></script><script src="https://network.invalid/script.js"></script>
        <span class="math">\\(x\\)</span><mjx-container>y<g data-mml-node="merror"></g></mjx-container>
        <img src="missing.png"><input type="search"><input type="search">
        <div style="width: 2000px">wide</div><a href="gone.html">gone</a><a href="#gone">gone</a><a href="#here">ok</a>
        <p id="here"></p><div class="output stderr">UserWarning</div></body>"""
    )
    desktop, phone = visits = visit_all(browser, tmp_path)
    for visit in visits:
        assert any("a message" in error for error in visit.errors)
        assert any("undefined_function" in error for error in visit.errors)
        assert {url.rpartition("/")[2] for url in visit.failed} >= {"missing.js", "missing.png"}
        assert visit.external == ["https://network.invalid/script.js"]
        assert visit.facts["raw_math"] and visit.facts["bad_math"]
        assert visit.facts["no_alt"] and visit.facts["broken_images"]
        assert visit.facts["stderr"] == ["UserWarning"]
        assert visit.facts["search_fields"] == 2
    assert desktop.facts["overflow"] >= 2000 - 1280 and phone.facts["overflow"] >= 2000 - 390
    assert sorted({link.rpartition(": ")[2] for link in dead_links(visits, tmp_path)}) == [
        "gone.html",
        "page.html#gone",
    ]
