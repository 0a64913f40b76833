"""The built site in a real browser: `make docs-test`. Skipped where there is no site, no playwright or no Chromium."""
import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest

HTML = Path(__file__).resolve().parents[1] / "_docs" / "html"
WIDTHS = {"phone": 390, "desktop": 1280}
if not (HTML / "index.html").is_file(): pytest.skip("no site in _docs/html: make docs", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make docs-test")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def base():
    "The site on a free local port."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=HTML))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    "Chromium: the one named by CHROMIUM, that of the system, or playwright's own."
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with playwright.sync_playwright() as p:
        try: b = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as e: pytest.skip(f"no Chromium to be started ({str(e).splitlines()[0]}): make docs-test installs one")
        yield b
        b.close()


def pages(): return sorted(p.relative_to(HTML).as_posix() for p in HTML.rglob("*.html"))


class Visit:
    "What one page did while it was open."
    def __init__(self, browser, base, page, width):
        self.errors, self.outside, self.base = [], [], base
        with browser.new_context(viewport={"width": width, "height": 900}) as context:
            tab = context.new_page()
            tab.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
            tab.on("pageerror", lambda e: self.errors.append(str(e)))
            tab.on("request", lambda r: self.outside.append(r.url) if not r.url.startswith((base, "data:", "blob:")) else None)
            tab.on("response", lambda r: self.errors.append(f"{r.status} {r.url}") if r.status >= 400 else None)
            tab.goto(f"{base}/{page}", wait_until="load")
            self.links = tab.eval_on_selector_all("a[href]", "all => all.map(a => a.href)")
            self.ids = set(tab.eval_on_selector_all("[id], a[name]", "all => all.map(e => e.id || e.name)"))
            self.wide = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            self.text = tab.inner_text("body")


@pytest.fixture(scope="module")
def visited(browser, base):
    "Every page at every width; the pages of exported source at one."
    return {(p, w): Visit(browser, base, p, WIDTHS[w]) for p in pages() for w in (("desktop",) if p.startswith("source/") else WIDTHS)}


def test_no_page_has_a_console_error_or_asks_another_server(visited):
    assert len(visited) > 60
    assert {k: v.errors for k, v in visited.items() if v.errors} == {}
    assert {k: v.outside for k, v in visited.items() if v.outside} == {}


def test_no_page_scrolls_sideways_on_a_phone(visited):
    assert {p: v.wide for (p, w), v in visited.items() if w == "phone" and v.wide > 1} == {}


def test_every_link_of_the_site_leads_somewhere(visited):
    "Files exist, and so do the places inside them."
    ids, broken = {p: v.ids for (p, _), v in visited.items()}, {}
    for (page, width), v in visited.items():
        if width != "desktop": continue
        for link in {x for x in v.links if x.startswith(v.base)}:
            path, _, place = link.removeprefix(v.base).lstrip("/").partition("#")
            path = path.partition("?")[0] or "index.html"
            if not (HTML / path).is_file() or (place and path in ids and place not in ids[path]): broken.setdefault(page, []).append(link)
    assert broken == {}


def test_links_to_source_have_lines(visited):
    links = [x for v in visited.values() for x in v.links if "/source/" in x]
    assert len(links) > 200 and not [x for x in links if "None" in x]
    assert len([x for x in links if "#L-" in x]) > 200


def test_tables_of_parameters_invent_no_default(visited):
    "`known` has three parameters, all of them needed."
    text = visited["core.html", "desktop"].text
    part = text[text.index("def known("):][:800]
    assert "What is looked up" in part and "None" not in part


@pytest.mark.parametrize("width", WIDTHS)
def test_search_finds_the_splitter(browser, base, width):
    with browser.new_context(viewport={"width": WIDTHS[width], "height": 900}) as context:
        tab = context.new_page()
        tab.goto(f"{base}/search.html?q=CombinatorialPurgedCV")
        tab.wait_for_selector("#search-results li a", timeout=20_000)
        found = tab.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
        assert any("validation/splits.html" in x for x in found)
