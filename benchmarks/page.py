"""How large the page of many answers is, how soon a browser shows it, and how long it takes to write.

python benchmarks/page.py [--quick] [--inputs 2000] [--tokens 128] [--chromium PATH]

Prints one JSON object: page_mb, write_s, first_paint_s and loaded_s (chromium with a fresh profile, nothing else on the
page's side than the file; null without chromium or playwright). --quick is one repetition instead of the median of 5.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from rlkd.evaluation.samples import Sample
from rlkd.inspection.reward_view import RewardView

ALPHABET = "etaoinshrdlcumwfgypbvk"


def made_up(inputs: int, tokens: int, seed: int = 0) -> RewardView:
    """One answer to each input, with every column and five alternatives a token, in numbers without any pattern."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(ALPHABET, k=draw.randint(1, 8))) for _ in range(20_000)]
    # As frequent as words are (Zipf).
    drawn = draw.choices(words, [1 / (k + 1) for k in range(len(words))], k=100_000)
    return RewardView([_answer(i, tokens, drawn, draw) for i in range(inputs)])


def _answer(i: int, tokens: int, words: list[str], draw: random.Random) -> Sample:
    pieces = [f" {draw.choice(words)}" for _ in range(tokens)]
    largest = [-draw.random() for _ in pieces]
    cost = [0.0 if draw.random() < 0.6 else draw.expovariate(0.5) for _ in pieces]
    return Sample(
        f"row {i}",
        " ".join(draw.choices(words, k=60)),
        "student",
        "".join(pieces),
        pieces,
        list(range(tokens)),
        rewards=[-c for c in cost],
        logprobs=[m - c for m, c in zip(largest, cost, strict=True)],
        max_logprobs=largest,
        entropies=[draw.uniform(0, 4) for _ in pieces],
        student_logprobs=[-draw.expovariate(0.5) for _ in pieces],
        top=[[(draw.choice(words), m - draw.expovariate(0.5) * k) for k in range(5)] for m in largest],
        prompts={"template": " ".join(draw.choices(words, k=70))},
    )


def paint(path: Path, chromium: str) -> tuple[float, float]:
    """Seconds from navigation to the first contentful paint, and to the end of loading."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(path.as_uri(), wait_until="load", timeout=120_000)
        first = page.evaluate(
            "new Promise(done => new PerformanceObserver(list => done(list.getEntries()[0].startTime))"
            ".observe({type: 'paint', buffered: true}))"
        )
        loaded = page.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart")
        browser.close()
    return first / 1000, loaded / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    given = parser.parse_args()
    view = made_up(given.inputs, given.tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        started = time.perf_counter()
        view.to_html(path)
        written = time.perf_counter() - started
        times = [paint(path, given.chromium) for _ in range(1 if given.quick else 5)] if given.chromium else []
        figures = {
            "inputs": given.inputs,
            "tokens": given.tokens,
            "page_mb": round(path.stat().st_size / 1e6, 2),
            "write_s": round(written, 2),
            "first_paint_s": round(statistics.median(t[0] for t in times), 2) if times else None,
            "loaded_s": round(statistics.median(t[1] for t in times), 2) if times else None,
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
