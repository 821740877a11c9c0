"""A reward view as one HTML file: readable without scripts; with them, searchable and with each token's numbers."""

from __future__ import annotations

import base64
import json
import math
import zlib
from typing import Any

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from ..evaluation.samples import COLUMNS, Sample
from .markup import asset, environment, legend_html, standalone_page, sums, tokens_html, visible
from .reward_view import SOURCES, Case, RewardView

# data-* attribute of a case -> order offered on the page.
ORDERS = {
    "regret": "largest regret",
    "student": "largest student gap",
    "templates": "largest template gap",
    "length": "longest",
}
# (decimals, alternatives) of a token: full, and reduced so that a page of 2,000 answers stays small.
SMALL, LARGE = (3, 5), (2, 3)
SMALL_TOKENS = 50_000


def page_html(view: RewardView) -> str:
    """The view as a standalone page."""
    numbered = view.worst_first()
    cases = [case for _, case in numbered]
    shown = [sample for case in cases for sample in case.samples]
    place = {id(sample): n for n, sample in enumerate(shown)}
    rank = {source: i for i, source in enumerate(SOURCES)}
    sources = sorted(dict.fromkeys(sample.source for sample in shown), key=lambda s: rank.get(s, len(rank)))
    body = environment().get_template("rewards.html.jinja").render(
        legend=legend_html(above_zero=view.above_zero),
        orders=ORDERS.items(),
        originals=[-number for number, _ in numbered],
        sources=sources,
        cases=cases,
        prompts_of=_prompts,
        tokens=tokens_html,
        sums=sums,
        numbers=lambda sample: {"n": place[id(sample)], "source": sources.index(sample.source)},
        data=_data(shown),
    )  # fmt: skip
    subtitle = (
        f"{len(cases)} inputs, {len(shown)} answers. Token rewards in nats, V = {view.value}; their sum is the return "
        "that training uses."
    )
    return standalone_page(
        view.title, Markup(body), subtitle=subtitle, css=asset("rewards.css"), script=asset("rewards.js")
    )


def _prompts(case: Case) -> dict[str, str]:
    return {name: text for sample in case.samples for name, text in sample.prompts.items()}


def _data(samples: list[Sample]) -> Markup:
    """The numbers of single tokens as JSON for the page's script, one compressed entry per sample."""
    digits, most = SMALL if sum(map(len, samples)) <= SMALL_TOKENS else LARGE
    texts: dict[str, int] = {}
    entries = [_entry(sample, texts, digits, most) for sample in samples]
    data = {"columns": COLUMNS, "digits": digits, "texts": list(texts), "samples": entries}
    return htmlsafe_json_dumps(data, dumps=_compact)


def _entry(sample: Sample, texts: dict[str, int], digits: int, most: int) -> str:
    """Columns in integer multiples of 10^-digits nats; alternatives [T][k] as text indices and hundredths of a nat."""
    known = {name: column for name in COLUMNS if (column := getattr(sample, name)) is not None}
    unit = 10**digits
    entry: dict[str, Any] = {"columns": {name: [_whole(x, unit) for x in column] for name, column in known.items()}}
    if sample.top is not None:
        kept = [best[:most] for best in sample.top]
        entry["texts"] = [[texts.setdefault(visible(text), len(texts)) for text, _ in best] for best in kept]
        entry["logprobs"] = [[_whole(p, 100) for _, p in best] for best in kept]
    return base64.b64encode(zlib.compress(_compact(entry).encode(), 6)).decode()


def _whole(x: float | None, unit: int) -> int | None:
    return None if x is None or not math.isfinite(x) else round(unit * x)


def _compact(value: Any, **_: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
