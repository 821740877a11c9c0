"""The report in a chromium: `pytest -m browser`, with the `browser` extra and a chromium on the PATH."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlkd.report.page import comparison, report
from rlkd.report.reading import read_arms, read_side_by_side
from runs import arms, held_out, lines, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report of two arms with an alarm, one of a bare folder, and a comparison."""
    folder = arms(tmp_path_factory.mktemp("job"), shift=1.0)
    lines(folder / "seed-1" / "ppo" / "alarms.jsonl", [{"step": 3, "alarm": "kl_high", "message": "KL 2 above 1"}])
    bare = tmp_path_factory.mktemp("bare")
    write_run(bare, "PPOTrainer", held_out(100, [1.0] * 5, [2.0] * 5))
    for name in ("run.json", "metrics.jsonl"):
        (bare / name).unlink()
    out = tmp_path_factory.mktemp("pages")
    (out / "report.html").write_text(report(read_arms(folder), "job"), encoding="utf-8")
    (out / "bare.html").write_text(report(read_arms(bare), "bare"), encoding="utf-8")
    (out / "compare.html").write_text(comparison(read_side_by_side([folder])), encoding="utf-8")
    return out


@pytest.fixture
def opened(browser):
    """Opens a page; at the end there was no error and no request but for the file."""
    troubles: list[str] = []
    contexts = []

    def open_page(path: Path, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: troubles.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("request", lambda request: request.url == path.as_uri() or troubles.append(f"request {request.url}"))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


@pytest.mark.parametrize("name", ["report", "bare", "compare"])
@pytest.mark.parametrize(("scheme", "width"), [("light", 1240), ("dark", 390)])
def test_axe_finds_nothing(opened, pages, name, scheme, width):
    axe = pytest.importorskip("axe_core_python")
    page = opened(
        pages / f"{name}.html", color_scheme=scheme, viewport={"width": width, "height": 800}, bypass_csp=True
    )
    page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")["violations"]
    assert [(v["id"], [node["html"][:150] for node in v["nodes"]][:3]) for v in found] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_curves_are_drawn_in_the_colours_of_the_scheme(opened, pages, scheme):
    page = opened(pages / "report.html", color_scheme=scheme)
    strokes = page.evaluate("[...document.querySelectorAll('figure svg path')].map(e => getComputedStyle(e).stroke)")
    swatches = page.evaluate("[...document.querySelectorAll('.swatch')].map(e => getComputedStyle(e).backgroundColor)")
    assert len(swatches) == 2
    assert set(swatches) <= set(strokes)
    assert not [stroke for stroke in strokes if stroke.startswith("rgb(0, ") and stroke.endswith(", 11)")]


def test_it_reads_the_same_without_scripts(opened, pages):
    page = opened(pages / "report.html", java_script_enabled=False)
    assert page.locator(".answer-word").inner_text() == "Yes"
    assert page.locator("figure svg").count() > 5
    page.locator("summary", has_text="Numbers of Regret").click()
    assert page.get_by_role("table", name="Regret, numbers").is_visible()


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize("width", [390, 700, 1240])
def test_every_cell_is_on_the_page(opened, pages, name, width):
    """No row and no column is behind a scroll bar of its own or beyond the edge."""
    page = opened(pages / f"{name}.html", viewport={"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    beyond = """[...document.querySelectorAll('td, tbody th')].filter(e => {
        const box = e.getBoundingClientRect();
        return box.width && (box.left < 0 || box.right > innerWidth + 1);
    }).length"""
    assert page.evaluate(beyond) == 0
    scrolling = "[...document.querySelectorAll('.report *')].filter(e => e.scrollHeight > e.clientHeight + 2 && "
    scrolling += "['auto', 'scroll'].includes(getComputedStyle(e).overflowY)).length"
    assert page.evaluate(scrolling) == 0
