"""Reward views as HTML: heat maps to embed, and single-file pages that need no network.

Text comes from data and models, so all of it is escaped, and characters that are invisible or change the direction of
text are shown by code point. A page's content security policy allows only its own style and script.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from collections.abc import Iterable
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup, escape

from ..evaluation.samples import COLUMNS, Sample
from .reward_view import RewardView
from .scale import legend, step

NOTEBOOK_CASES = 20
# Joiners are part of emoji and of some scripts.
KEPT = {"\u200c", "\u200d"}
SHOWN = {"\n": "⏎\n", "\t": "⇥\t"}


@cache
def asset(name: str) -> str:
    """The text of a file in rlkd/inspection/assets."""
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


@cache
def environment() -> jinja2.Environment:
    """Templates of rlkd/inspection/assets; everything is escaped, undefined names are errors."""
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"visible": visible, "sortable": lambda number: "" if number is None else f"{number:.3f}"}
    return made


@lru_cache(maxsize=65536)
def visible(text: str) -> str:
    """The text with control, format, private and surrogate characters made visible: line ends as symbols, others by
    code point.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in SHOWN:
        return SHOWN[character]
    if character in KEPT or unicodedata.category(character) not in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp"):
        return character
    return f"[U+{ord(character):04X}]"


def number(value: Any, digits: int = 3) -> str:
    """A number as shown on the pages."""
    if value is None:
        return "not known"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


@lru_cache(maxsize=65536)
def _token(name: str, piece: str) -> str:
    return f"<b>{escape(visible(piece))}</b>" if name == "z" else f"<b class={name}>{escape(visible(piece))}</b>"


def tokens_html(sample: Sample, *, titles: bool = False) -> Markup:
    """The tokens of an answer, coloured by reward; `titles` adds each token's numbers as a tooltip."""
    if not sample.tokens:
        return escape(visible(sample.text)) or Markup("<em>(no tokens)</em>")
    rewards = sample.rewards or [None] * len(sample)
    if not titles:
        pairs = zip(rewards, sample.tokens, strict=True)
        return Markup("".join(_token(step(reward), piece) for reward, piece in pairs))
    return Markup("").join(
        Markup('<b class="{}" title="{}">{}</b>').format(step(reward), _title(sample, t), visible(piece))
        for t, (reward, piece) in enumerate(zip(rewards, sample.tokens, strict=True))
    )


def _title(sample: Sample, t: int) -> str:
    lines = [
        f"{label} {number(column[t])}"
        for label, column in [
            *((label, getattr(sample, name)) for name, label in COLUMNS.items()),
            ("regret", sample.regrets),
        ]
        if column is not None
    ]
    best = sample.top[t] if sample.top else []
    return "\n".join([f"token {t + 1}: {visible(sample.tokens[t])!r}", *lines, *_alternatives(best)])


def _alternatives(best: Iterable[tuple[str, float]]) -> list[str]:
    return [f"  {visible(text)!r} {number(logprob)}" for text, logprob in best]


def sums(sample: Sample) -> list[tuple[str, str]]:
    """(name, number) pairs shown for a whole answer."""
    known: list[tuple[str, Any]] = [
        ("return", sample.total_reward),
        ("regret", sample.regret),
        ("teacher log-prob", sample.logprob),
        ("student gap", sample.student_gap),
        ("tokens", len(sample) if sample.tokens or not sample.text else None),
        ("ended", None if sample.finished is not False else "no, truncated"),
        ("step", sample.step),
        *sample.facts.items(),
    ]
    return [(name, visible(number(value))) for name, value in known if value is not None]


def heat_map_html(samples: Iterable[Sample], *, titles: bool = True) -> Markup:
    """Answers side by side as an HTML fragment, each token coloured by its reward.

    For embedding; it needs the rules of `scale_css` and an ancestor of class `rlkd`.
    """
    return Markup(environment().get_template("answers.html.jinja").module.answers(  # type: ignore[attr-defined]
        samples, tokens=lambda sample: tokens_html(sample, titles=titles), sums=sums, heading="h4"
    ))  # fmt: skip


def legend_html(*, above_zero: bool = True) -> Markup:
    """The legend of the colours as an HTML fragment (see `heat_map_html`)."""
    steps = legend(above_zero=above_zero)
    items = Markup("").join(Markup('<li><i class="{}">{}</i></li>').format(*entry) for entry in steps)
    return Markup('<ul class="legend" aria-label="reward of a token, nats">{}</ul>').format(items)


def scale_css() -> str:
    """Colours and heat-map rules, all under `.rlkd`. The custom properties --n6 .. --n1, --p1 .. --p6, --ink, --soft,
    --line, --paper, --card and --link are for other parts of a page as well, in light and dark.
    """
    return asset("scale.css")


def notebook_html(view: RewardView) -> str:
    """The notebook representation: the first cases, without scripts."""
    cases = view.cases()
    return environment().get_template("notebook.html.jinja").render(
        css=Markup(scale_css()),
        legend=legend_html(above_zero=view.above_zero),
        value=view.value,
        cases=cases[:NOTEBOOK_CASES],
        left=len(cases) - NOTEBOOK_CASES,
        heat_map=heat_map_html,
    )  # fmt: skip


def standalone_page(title: str, body: Markup, *, subtitle: str = "", css: str = "", script: str = "") -> str:
    """A whole page in one file: `body` (already escaped) in rlkd's page layout, with a switch between light and dark.

    The content security policy allows the given style and script by their hashes and nothing else: no network, no
    inline handlers and no `style` attributes. `css` and `script` follow those of the layout; they must not contain
    `</style` or `</script`.
    """
    css = "\n".join(part for part in (scale_css(), asset("page.css"), css) if part)
    script = "\n".join(part for part in (asset("page.js"), script) if part)
    return environment().get_template("page.html.jinja").render(
        title=title,
        subtitle=subtitle,
        body=body,
        css=Markup(css),
        script=Markup(script),
        style_hash=_hash(css),
        script_hash=_hash(script),
    )  # fmt: skip


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
