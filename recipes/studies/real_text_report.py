"""Tables of the study, and paired comparisons of its methods by a bootstrap over rows and seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlkd import Example, Study, markdown_table, spread_text, spreads, write_json

ANSWERS = "answers.jsonl"  # in a cell's folder: the answers to the held-out rows
AXES = {"": "CPU seconds", "-updates": "updates"}  # end of an arm's name -> what all arms have alike
COLUMNS = {
    "bleu": ("BLEU", 1, 1),
    "sample_bleu": ("of samples", 1, 1),
    "regret": ("regret", 1, 1),
    "sample_regret": ("of samples", 1, 1),
    "slots": ("slots %", 1, 1),
    "sample_slots": ("of samples", 1, 1),
    "self_bleu": ("self-BLEU", 1, 1),
    "copies": ("copies %", 1, 1),
    "length": ("length", 1, 1),
    "finish_rate": ("finished %", 100, 1),
    "sample_entropy": ("entropy", 1, 2),
    "distinct_2": ("distinct-2", 1, 1),
    "sample_distinct_2": ("of samples", 1, 1),
    "updates": ("updates", 1, 0),
    "seconds_per_update": ("s per update", 1, 3),
}
Score = Callable[[np.ndarray], float]


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, score: Score, draws: int, seed: int = 0
) -> dict[str, float]:
    """By how much `first` is better than `second`: the mean over seeds of a corpus score, its 95 % interval and p.

    first, second: [S, N, K], K numbers of each of N rows for each of S seeds, both of the same rows and seeds; score:
    sums over rows [K] -> the score of a corpus. A draw takes S seeds and N rows with replacement, the same for both
    (Koehn 2004, over seeds too); p, two-sided, is twice the smaller share of draws on one side of 0, counted so that
    it is never 0 (Davison & Hinkley 1997, 4.2.3). With few seeds the interval is a little too narrow.
    """
    seeds, rows, _ = first.shape
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(rows, np.full(rows, 1 / rows), size=draws)  # [D, N]
    chosen = generator.integers(seeds, size=(draws, seeds))

    def scores(sums: np.ndarray) -> np.ndarray:
        return np.apply_along_axis(score, -1, sums)

    difference = scores(first.sum(1)) - scores(second.sum(1))  # [S]
    drawn = scores(np.einsum("dn,snk->dsk", counts, first)) - scores(np.einsum("dn,snk->dsk", counts, second))
    means = np.take_along_axis(drawn, chosen, 1).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min((means <= 0).sum(), (means >= 0).sum())
    return {
        "mean": float(difference.mean()),
        "low": float(low),
        "high": float(high),
        "p": float(min(1.0, 2 * (1 + tail) / (1 + draws))),
        "above_0": int((difference > 0).sum()),
        "seeds": seeds,
    }


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the given order."""
    corrected, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = largest
    return corrected


def bleu_counts(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """[N, 10] float64: what corpus BLEU sums over rows, matched and all n-grams of 1 to 4 words, and both lengths."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(effective_order=True)  # as it is meant for sentences; the counts are the same
    scores = [metric.sentence_score(text, list(of_row)) for text, of_row in zip(texts, references, strict=True)]
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], dtype=float)


def corpus_bleu(sums: np.ndarray) -> float:
    """BLEU of the sums [10] of `bleu_counts`, as `sacrebleu` scores the corpus."""
    from sacrebleu.metrics import BLEU

    counts = [int(count) for count in sums]
    smoothed = BLEU.compute_bleu(counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp")
    return float(smoothed.score)


def compare(
    study: Study, name: str, rows: Sequence[Example], pairs: Sequence[Sequence[str]], draws: int
) -> list[dict[str, Any]]:
    """Paired comparisons of methods in BLEU of greedy and sampled answers, of the seeds that both have."""
    references = [example.references for example in rows]
    counts: dict[tuple[str, int, str], np.ndarray] = {}

    def of(arm: str, seed: int, kind: str) -> np.ndarray:
        if (arm, seed, kind) not in counts:
            cell = study.cells[f"{name}/seed-{seed}/{arm}"]
            lines = [json.loads(line) for line in (cell.folder / ANSWERS).read_text(encoding="utf-8").splitlines()]
            counts[arm, seed, kind] = bleu_counts([line[kind] for line in lines], references)
        return counts[arm, seed, kind]

    found = []
    for suffix, axis in AXES.items():
        for pair in pairs:
            first, second = (arm + suffix for arm in pair)
            if not {first, second} <= study.arms.keys():
                continue
            seeds = [s for s in study.results(first, name) if s in study.results(second, name) and s is not None]
            for kind, metric in (("student", "BLEU"), ("sample_student", "BLEU of samples")) if seeds else ():
                mine, other = (np.stack([of(arm, seed, kind) for seed in seeds]) for arm in (first, second))
                of_pair = {"task": name, "equal": axis, "first": pair[0], "second": pair[1], "metric": metric}
                found.append({**of_pair, **paired_bootstrap(mine, other, corpus_bleu, draws)})
    return found


def titles(plan: Mapping[str, Any], suffix: str) -> dict[str, str]:
    """Arm -> row of a table."""
    starts = {
        arm: "warm-up" if share == 1 else f"warm-up, {share:.0%} of labels" for arm, share in plan["starts"].items()
    }
    methods = {method + suffix: settings["title"] for method, settings in plan["methods"].items()}
    return {"teacher-test": "teacher", **starts, **methods}


def table(study: Study, name: str, arms: Mapping[str, str]) -> str:
    """The finished results: mean and range over seeds."""
    runs = {title: list(study.results(arm, name).values()) for arm, title in arms.items() if arm in study.arms}
    runs = {title: found for title, found in runs.items() if found}
    known = {column for found in runs.values() for run in found for column in run}
    shown = {column: form for column, form in COLUMNS.items() if column in known}
    rows = [
        [f"{title} ({len(found)})"]
        + [
            spread_text([factor * run[c] for run in found if c in run], "{mean} [{lowest}, {highest}]", digits)
            for c, (_, factor, digits) in shown.items()
        ]
        for title, found in runs.items()
    ]
    return markdown_table(["", *(head for head, _, _ in shown.values())], rows)


def comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            c["task"],
            c["equal"],
            f"{c['first']} - {c['second']}",
            c["metric"],
            f"{c['mean']:+.2f}",
            f"[{c['low']:+.2f}, {c['high']:+.2f}]",
            f"{c['p']:.4f}",
            f"{c['p_holm']:.4f}",
            f"{c['above_0']} of {c['seeds']}",
        ]
        for c in comparisons
    ]
    return markdown_table(["task", "equal", "difference", "of", "mean", "95 %", "p", "p, Holm", "above 0"], rows)


def report(
    studies: Mapping[str, Study], rows: Mapping[str, Sequence[Example]], plan: Mapping[str, Any], out: Path
) -> None:
    """results.json and table.md of what is finished, and prints the tables."""
    record: dict[str, Any] = {"plan": plan}
    parts: list[str] = []
    comparisons: list[dict[str, Any]] = []
    for name, study in studies.items():
        results = {arm: {str(s): r for s, r in study.results(arm, name).items()} for arm in study.arms}
        record[name] = {
            "results": {arm: found for arm, found in results.items() if found},
            "spread": {arm: spreads(list(found.values())) for arm, found in results.items() if found},
        }
        for suffix, axis in AXES.items():
            parts.append(f"{name}, equal {axis}\n\n{table(study, name, titles(plan, suffix))}")
        comparisons += compare(study, name, rows[name], plan["comparisons"], plan["draws"])
    for comparison, p in zip(comparisons, holm([c["p"] for c in comparisons]), strict=True):
        comparison["p_holm"] = p
    write_json(out / "results.json", {**record, "comparisons": comparisons})
    text = "\n\n".join([*parts, comparison_table(comparisons)]) + "\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"run folder: {out} (results.json, table.md, the teachers, every student and its answers)")
