"""HTML of reward views: all content as text, complete, with the colours of the legend."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from rlkd import RewardView
from rlkd.inspection.markup import heat_map_html, standalone_page, visible
from rlkd.inspection.scale import EDGES, legend, step
from views import HOSTILE, sample, view

ODD = RewardView([
    sample([HOSTILE, "\u202edrawkcab", " a\nb", "\ud800", "👩‍👩‍👧"], id=HOSTILE, input=HOSTILE, source=HOSTILE,
           prompts={HOSTILE: HOSTILE}, facts={HOSTILE: HOSTILE}),
    sample([], id="empty", input="", source="student"),
    sample(["x"] * 10_000, id="long", source="reference", scored=False),
], title=HOSTILE)  # fmt: skip


class Parsed(HTMLParser):
    """Elements, and the text outside of style and script."""

    def __init__(self, html: str):
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text, self.raw, self._inside = "", "", False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        self._inside = tag in ("style", "script")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.raw += data
        else:
            self.text += data


@pytest.mark.parametrize("render", ["page", "notebook"])
def test_hostile_text_is_text(tmp_path, render):
    if render == "page":
        ODD.to_html(tmp_path / "page.html")
        html = (tmp_path / "page.html").read_text(encoding="utf-8")
    else:
        html = ODD._repr_html_()
    parsed = Parsed(html)
    assert "img" not in parsed.names
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert parsed.text.count(HOSTILE) >= 5  # id, input, source, token, fact, ...
    assert "[U+202E]drawkcab" in parsed.text
    assert "\u202e" not in html
    assert "a⏎\nb[U+D800]👩‍👩‍👧" in parsed.text
    assert "(no tokens)" in parsed.text


def test_the_pages_policy_allows_its_own_style_and_script_only(tmp_path):
    ODD.to_html(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    links = [value for name, value in Parsed(html).attributes if name in ("href", "src", "action", "style")]
    assert links == ["#main"]


def test_all_tokens_and_sums_are_there_without_scripts(tmp_path):
    whole = view(5)
    whole.to_html(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = [re.sub("<[^>]*>", "", text) for text in re.findall(r'(?s)<p class="t"[^>]*>(.*?)</p>', html)]
    expected = [s for _, case in whole.worst_first() for s in case.samples]
    assert [text.replace("&lt;", "<").replace("&gt;", ">") for text in found] == ["".join(s.tokens) for s in expected]
    returns = [float(text) for text in re.findall(r"<dt>return</dt><dd>([^<]*)</dd>", html)]
    assert returns == pytest.approx([s.total_reward for s in expected], abs=5e-4)


def test_numbers_that_are_not_finite_are_shown_and_break_nothing(tmp_path):
    nan, infinite = float("nan"), float("-inf")
    one = replace(
        sample(["a", "b"]), rewards=[nan, -1.0], student_logprobs=[infinite, None], top=[[("x", infinite)]] * 2
    )
    RewardView([one]).to_html(tmp_path / "page.html")
    assert "<dt>return</dt><dd>nan</dd>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "nan" in heat_map_html([one])


def test_the_pages_numbers_are_the_views(tmp_path):
    whole = view(3)
    whole.to_html(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    for entry, s in zip(data["samples"], [s for _, case in whole.worst_first() for s in case.samples], strict=True):
        numbers = json.loads(zlib.decompress(base64.b64decode(entry)))
        for name, column in numbers["columns"].items():
            assert [x / 1000 for x in column] == pytest.approx(getattr(s, name), abs=6e-4)
        for texts, logps, best in zip(numbers["texts"], numbers["logprobs"], s.top, strict=True):
            assert [data["texts"][i] for i in texts] == [text for text, _ in best]
            assert [x / 100 for x in logps] == pytest.approx([p for _, p in best], abs=6e-3)


def test_a_page_of_many_answers_is_small(tmp_path):
    """A quarter of 2,000 answers of 128 tokens takes less than a quarter of 15 MB."""
    draw = random.Random(0)
    answers = [["".join(draw.choices(" etaoinshr", k=5)) for _ in range(128)] for _ in range(500)]
    RewardView([sample(a, id=str(i), seed=i) for i, a in enumerate(answers)]).to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 15e6 / 4


def test_steps_and_legend_agree():
    """A number within the range of a legend entry has that entry's class."""
    for name, text in legend():
        bounds = [float(x) for x in re.findall(r"-?[\d.]+", text)]
        middle = {"z": 0.0}.get(name, sum(bounds) / len(bounds) if len(bounds) == 2 else 1.5 * bounds[0])
        assert step(middle) == name
    assert len(legend()) == 2 * len(EDGES) + 1
    assert [step(x) for x in (-0.1, 0.0999, 0.1, 8.0, None, float("nan"))] == ["n1", "z", "p1", "p6", "u", "u"]
    assert {name for name, _ in legend(above_zero=False)} == {"z", *(f"n{k}" for k in range(1, 7))}


def test_heat_maps_tell_their_numbers_as_titles():
    one = sample(["a", " <b>"], prompts={"p": ""})
    html = heat_map_html([one])
    titles = [value for name, value in Parsed(html).attributes if name == "title"]
    assert len(titles) == 2
    assert f"reward {one.rewards[0]:.3f}" in titles[0]
    assert f"{one.top[1][0][1]:.3f}" in titles[1]
    assert "' <b>'" in titles[1]


def test_a_notebook_shows_the_first_inputs_and_says_how_many_are_left():
    html = view(25)._repr_html_()
    assert html.count("<h3>") == 20
    assert "5 more inputs" in html
    assert "script" not in Parsed(html).names


def test_a_page_of_ones_own_has_the_frame():
    html = standalone_page("A & B", heat_map_html([sample(["a"])]), css=".mine { color: red; }", script="void 0;")
    assert "<title>A &amp; B</title>" in html
    assert ".mine { color: red; }" in html


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("é ü 漢字 مرحبا", "é ü 漢字 مرحبا"),
        ("a\tb\r", "a⇥\tb[U+000D]"),
        ("\x00\x1b[31m", "[U+0000][U+001B][31m"),
        ("\u200b\u2066x\u2069\ufeff", "[U+200B][U+2066]x[U+2069][U+FEFF]"),
        ("\u2028", "[U+2028]"),
    ],
)
def test_invisible_characters_are_shown(text, shown):
    assert visible(text) == shown


def test_the_terminal_shows_tokens_sums_and_no_control_characters():
    out = io.StringIO()
    view(2).show(Console(file=out, width=100))
    ODD.search("empty").show(Console(file=out, width=100))
    RewardView(ODD.samples[:1]).show(Console(file=out, width=100, force_terminal=True))
    text = out.getvalue()
    assert "row 1" in text
    assert f"return {view(2).samples[0].total_reward:.3f}" in text
    assert "(no tokens)" in text
    assert "\u202e" not in text
    assert "[U+202E]" in text
