"""The page of rewards in a chromium: `pytest -m browser`, with the `browser` extra and a chromium on the PATH."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rlkd import RewardView
from views import HOSTILE, sample, view

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH"),
]


def shown_view() -> RewardView:
    """Four ordinary inputs, two answers each; and one with all that could go wrong."""
    odd = {"id": "odd", "input": HOSTILE, "prompts": {HOSTILE: HOSTILE}}
    tokens = [HOSTILE, " مرحبا", "\u202eabc", " 👩‍👩‍👧", "\n\nnext"]
    one = sample(tokens, source=HOSTILE, facts={HOSTILE: HOSTILE}, values=[0.5] * 5, advantages=[None] * 5, **odd)
    one = replace(one, top=[[(HOSTILE, -0.5), ("\u2066x", -1.0)]] * 5)
    empty = sample([], source="student", **odd)
    return RewardView([*view(4), one, empty], title=f"Seen {HOSTILE}")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    shown_view().to_html(path)
    return path


@pytest.fixture
def opened(browser, file):
    """Opens the page; at the end there was no error, no dialog and no request but for the file."""
    troubles: list[str] = []
    contexts = []

    def open_page(path: Path = file, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: troubles.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (troubles.append("alert"), dialog.dismiss()))
        page.on("request", lambda request: request.url == path.as_uri() or troubles.append(f"request {request.url}"))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def visible_ids(page):
    return [e.inner_text() for e in page.locator("#cases article:not([hidden]) h2").all()]


def counted(page, text):
    """Waits until the filters are through."""
    playwright.expect(page.locator("output")).to_have_text(text)


def test_hostile_text_is_text(opened):
    page = opened()
    assert page.locator("img").count() == 0
    assert page.locator("h1").inner_text() == f"Seen {HOSTILE}"
    odd = page.locator("article").last
    assert HOSTILE in odd.inner_text()
    assert "[U+202E]abc" in odd.inner_text()
    odd.locator(".t b").first.hover()
    page.wait_for_selector("#detail:not([hidden])")
    detail = page.locator("#detail").inner_text()
    assert HOSTILE in detail
    assert "[U+2066]x" in detail
    assert page.locator("img").count() == 0


def test_a_token_tells_its_numbers(opened):
    page = opened()
    page.locator("article").first.locator(".t b").nth(2).hover()
    page.wait_for_selector("#detail:not([hidden])")
    shown = {row.locator("th").inner_text(): row.locator("td").inner_text() for row in page.locator("#detail tr").all()}
    first = view(4).worst_first()[0][1].samples[0]
    assert float(shown["teacher log-prob"]) == pytest.approx(first.logprobs[2], abs=1e-3)
    assert float(shown["reward"]) == pytest.approx(first.rewards[2], abs=1e-3)
    page.mouse.move(1, 1)
    page.wait_for_selector("#detail", state="hidden")


def test_the_keyboard_reaches_everything(opened):
    page = opened()
    for _ in range(2):
        page.keyboard.press("j")
    second = view(4).worst_first()[1][1]
    assert page.evaluate("document.activeElement.querySelector('h2').textContent") == second.id
    page.keyboard.press("k")
    page.keyboard.press("Tab")  # the prompts
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches('.t')")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End"):
        page.keyboard.press(key)
    page.wait_for_selector("#detail:not([hidden])")
    assert page.evaluate("[...document.activeElement.children].findIndex(e => e.className.includes('on'))") == 5
    assert page.locator("#detail p").inner_text().startswith("Token 6:")
    page.keyboard.press("Escape")
    assert page.locator("#detail").is_hidden()
    page.keyboard.press("?")
    assert page.locator("dialog").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("row 3")
    counted(page, "1 of 5 inputs")
    assert visible_ids(page) == ["row 3"]


def test_filters_and_order(opened):
    page = opened()
    page.select_option("[name=order]", "regret")
    counted(page, "5 of 5 inputs")
    regrets = [float(r or "-inf") for r in page.locator("article").evaluate_all("a => a.map(e => e.dataset.regret)")]
    assert regrets == sorted(regrets, reverse=True)
    page.fill("[name=from]", "1")
    counted(page, "4 of 5 inputs")
    assert "odd" not in visible_ids(page)  # its student's answer is empty
    page.get_by_role("checkbox", name="teacher greedy").uncheck()
    playwright.expect(page.locator(".answer:visible")).to_have_count(4)


def test_without_scripts_everything_is_there(opened):
    page = opened(java_script_enabled=False)
    text = page.locator("body").inner_text()
    for s in view(4):
        assert "".join(s.tokens) in text
        assert f"{s.total_reward:.3f}" in text
    assert "Scripts are off" in text
    assert page.locator("form.tools").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing(opened, scheme, width):
    axe = pytest.importorskip("axe_core_python")
    page = opened(color_scheme=scheme, viewport={"width": width, "height": 800}, bypass_csp=True)
    page.locator(".t b").first.click()
    page.wait_for_selector("#detail:not([hidden])")
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    # Articles off the screen are not painted until then.
    page.evaluate("document.querySelectorAll('article').forEach(e => { e.style.contentVisibility = 'visible'; })")
    found = page.evaluate("axe.run()")["violations"]
    assert [(v["id"], [node["html"][:150] for node in v["nodes"]][:3]) for v in found] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_light_and_dark_can_be_switched(opened):
    page = opened(color_scheme="dark")

    def paper():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    dark = paper()
    page.locator("button.theme").click()
    assert paper() == "rgb(255, 255, 255)" != dark
    page.locator("button.theme").click()
    assert paper() == dark


def test_print_shows_all_answers_in_ink(opened):
    page = opened(color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("form.tools").is_hidden()
    assert page.evaluate("getComputedStyle(document.querySelector('article')).contentVisibility") == "visible"


def test_a_page_of_many_tokens_opens(opened, tmp_path):
    long = sample(["word "] * 10_000, id="long")
    RewardView([long, *view(300, 100)]).to_html(tmp_path / "many.html")
    page = opened(tmp_path / "many.html")
    assert page.locator("article").count() == 301
    page.keyboard.press("j")
    page.locator(".t").first.focus()
    page.keyboard.press("End")
    page.wait_for_selector("#detail:not([hidden])")
    assert page.locator("#detail p").inner_text().startswith("Token 10000:")
