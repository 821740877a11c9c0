"""The contents of a label folder as text: the data card, and the summary at the end of a run."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..data.flaws import FlawCounts
from ..io.cards import cell, front_matter, table


def summary(totals: dict[str, Any]) -> str:
    """Rows by status, reasons for missing labels, and counts per template; plain text for a terminal."""
    status = totals["status"]
    lines = [
        f"{totals['rows']} rows in {plural(totals['shards'], 'shard')}: {_counts(status)}; "
        f"{totals['truncated']} prompts truncated; {totals['bad_rows']} bad input rows skipped"
    ]
    lines += [f"  {count} x {reason}" for reason, count in sorted(totals["reasons"].items(), key=lambda item: -item[1])]
    lines += [f"  {name}: {_counts(counts)}" for name, counts in totals["templates"].items()]
    lines += [f"  filtered by {name}: {count}" for name, count in totals.get("filtered", {}).items()]
    lines += [f"warning: {line}" for line in FlawCounts(totals.get("flaws")).lines()]
    if seconds := totals.get("seconds"):
        lines.append(f"{totals['made'] / seconds:.1f} rows/s, {seconds:.1f} s")
    return "\n".join(lines)


def card(header: dict[str, Any], totals: dict[str, Any]) -> str:
    """The data card: Markdown with the YAML that lets `datasets.load_dataset(folder)` find the shards."""
    settings, status = header["settings"], totals["status"]
    ok = max(status["ok"], 1)
    ended = totals["finish"].get("eos", 0) + totals["finish"].get("ranked", 0)
    front = {"configs": [{"config_name": "default", "data_files": "labels-*.parquet"}]}
    rows = [(name, _counts(counts)) for name, counts in totals["templates"].items()]
    predicted = ((header.get("labels") or header).get("request") or {}).get("command") == "predict"
    whose, rows_of = ("model", "prediction") if predicted else ("teacher", "label")
    lengths = (
        f"Answers have {totals['tokens'] / ok:.1f} tokens on average;\n{100 * ended / ok:.1f} % of them are complete. "
    )
    lengths = "" if settings.get("engine") == "classifier" else lengths
    reasons = [f"- {count} x {cell(text)}" for text, count in totals["reasons"].items()] or ["- none"]
    return f"""{front_matter(front)}

# {"Predictions" if predicted else "Pseudo-labels"} of {cell(str(settings.get("teacher", "a teacher")))}

{totals["rows"]} rows from {totals["inputs"]} inputs: {_counts(status)}.
{totals["truncated"]} prompts were truncated. {lengths}{totals["bad_rows"]} bad input rows were skipped.

{table(("template", "rows"), rows)}

{_filter(header, totals)}Why rows have no {rows_of}:

{chr(10).join(reasons)}

{_flaws(totals)}## Load

```python
from rlkd import load_pseudolabels

labels = load_pseudolabels("path/to/this/folder")  # rows with status ok, checked against their checksums
```

## Settings

```yaml
{_settings(header, predicted=predicted)}
```

## Limits
{_precision(header)}
The {rows_of}s are a model's answers and were not checked for correctness. `truncated` marks prompts of which the
{whose} read only a part, and `finish_reason` length answers that were cut; `sum_logprob` is the {whose}'s
log-probability of the answer.
"""


def _filter(header: dict[str, Any], totals: dict[str, Any]) -> str:
    """What `rlkd data filter` left out, by rule, if it made the folder."""
    if "filtered" not in totals:
        return ""
    rules = header["settings"]["filter"]
    lines = [(f"{name} {cell(str(rules[name]))}", count) for name, count in totals["filtered"].items()]
    by = f", best by {cell(str(rules['by']))}" if "by" in rules else ""
    head = f"Filtered from generation {cell(str(rules['labels']))}{by}; each rule applies to what those before left."
    return f"{head}\n\n{table(('rule', 'labels left out'), lines)}\n\n"


def _flaws(totals: dict[str, Any]) -> str:
    """The section on prompts that say less than their rows, if there are any."""
    lines = [f"- {cell(line)}" for line in FlawCounts(totals.get("flaws")).lines()]
    return "\n".join(["Prompts that say less than their rows:", "", *lines, "", ""]) if lines else ""


def _settings(header: dict[str, Any], *, predicted: bool) -> str:
    """YAML that cannot end its block: a folder may come from elsewhere."""
    settings = header["settings"]
    if predicted:  # the log has one name for whatever answers
        settings = {re.sub("^teacher(?=$|_)", "model", name): value for name, value in settings.items()}
    block = {"generation": header["generation"], **settings, "packages": header["packages"]}
    return yaml.safe_dump(block, sort_keys=False, allow_unicode=True).strip().replace("```", "")


def _precision(header: dict[str, Any]) -> str:
    """How labels of an engine of lower precision differ, if one was used."""
    if not (measured := header.get("agreement")):
        return ""
    return f"""
Made at lower precision than the teacher's own: on the first {measured["prompts"]} prompts,
{100 * measured["exact_match"]:.1f} % of the greedy answers are equal to the full-precision teacher's, and
log-probabilities differ by {measured["mean_abs_delta_logprob"]:.4f} nats per token on average.
"""


def plural(count: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.items())
