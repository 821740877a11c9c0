"""`rlkd data filter`: a label folder of the labels that are worth learning from.

Every input row keeps its label rows, so that all readers take the new folder; a label that is left out has status
`skipped` and the rule as its reason.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..checks import Count, check_settings
from ..data.splits import plain
from ..errors import ConfigError, DataError
from ..io.cards import CARD
from ..io.files import refuse_links, write_durably
from ..io.lock import writer_lock
from ..records import PseudoLabel
from .card import card
from .folder import BAD_ROWS, check_output, clear
from .integrity import finished_manifest, shard_problem, total
from .manifest import MANIFEST, Manifest, shard_name
from .options import By
from .run import digest_of
from .store import TOP_K, summarise, write_labels

# What an answer gives, and a label that is left out does not have.
ANSWER = (
    "label", "token_ids", "n_in", "n_out", "truncated", "finish_reason", "sum_logprob", "choices", "choice_logprobs",
    "top_ids", "top_logps",
)  # fmt: skip


@dataclass(frozen=True)
class Filter:
    """The rules, in the order in which they apply, each to what those before it left; None and False: not that rule.

    min_logprob            of the answer y, log p(y|x) = sum_t log p(y_t|x, y_<t), in nats
    min_logprob_per_token  the same divided by the number of tokens
    min_tokens, max_tokens of the answer, end-of-sequence included
    agree                  the same answer, up to case and spaces, under at least so many templates of an input
    best                   so many answers to an input, whatever the template; of equal ones the first
    by                     what the best have most of: logprob, logprob_per_token, or the reward
                           sum_t log p(y_t|x, y_<t) - max_a log p(a|x, y_<t), minus the regret of `reward_value: max`
    drop_duplicates        only the first of the labels with the same student input and the same text
    Raises ConfigError if there is no rule, or rules contradict each other.
    """

    min_logprob: float | None = None
    min_logprob_per_token: float | None = None
    min_tokens: Count | None = None
    max_tokens: Count | None = None
    agree: Count | None = None
    best: Count | None = None
    by: By | None = None
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.rules.keys() - {"by"}:
            raise ConfigError(f"there is nothing to filter by: give one of {', '.join(map(option, asdict(self)))}.")
        for name in ("min_logprob", "min_logprob_per_token"):
            if (getattr(self, name) or 0) > 0:
                raise ConfigError(f"{option(name)} {getattr(self, name)}: log-probabilities are at most 0.")
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            raise ConfigError(f"--min-tokens {self.min_tokens} is above --max-tokens {self.max_tokens}.")
        if self.by is not None and self.best is None:
            raise ConfigError(f"--by {self.by} orders the answers of --best: give it, too.")
        if self.agree == 1:
            raise ConfigError("--agree 1: every answer is given under one template: use 2 or more.")

    @property
    def rules(self) -> dict[str, Any]:
        """The rules that are given, in their order."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}

    def check(self, folder: Path, manifest: Manifest) -> None:
        """Raise ConfigError for a rule that can have no effect on a folder, DataError for one that needs what was not
        recorded.
        """
        each = max(shard["rows"] // max(shard["inputs"], 1) for shard in manifest.shards.values())
        templates = min(len(header["settings"].get("templates") or [0]) for header in manifest.headers)
        if self.best is not None and self.best >= each:
            raise ConfigError(f"--best {self.best}: every input has {each} labels at most, so none would be left out.")
        if self.agree is not None and self.agree > templates:
            raise ConfigError(
                f"--agree {self.agree}: the labels are of {templates} templates, so all would be left out."
            )
        files = (folder / shard["file"] for shard in manifest.shards.values())
        if self.by == "reward" and any("top_logps" not in pq.read_schema(file).names for file in files):
            raise DataError(
                f"--by reward: {folder} has no column top_logps, so that the reward is not known. Make the labels with "
                "--top-k-logprobs 1, or order by logprob."
            )

    def dropped(self, rows: Sequence[dict[str, Any]], seen: set[bytes]) -> list[str | None]:
        """The rule that leaves out each label row, None for those that stay and those that have no label. rows: of
        whole inputs, in order; seen: what earlier rows had, to find duplicates, and is added to.
        """
        why: list[str | None] = [None] * len(rows)
        left = [i for i, row in enumerate(rows) if row["status"] == "ok"]

        def apply(rule: str, keeps: Iterable[bool]) -> None:
            nonlocal left
            kept = []
            for i, keep in zip(left, keeps, strict=True):
                if keep:
                    kept.append(i)
                else:
                    why[i] = rule
            left = kept

        if self.min_logprob is not None:
            apply("min_logprob", [value_of(rows[i], "logprob") >= self.min_logprob for i in left])
        if (low := self.min_logprob_per_token) is not None:
            apply("min_logprob_per_token", [value_of(rows[i], "logprob_per_token") >= low for i in left])
        if self.min_tokens is not None:
            apply("min_tokens", [rows[i]["n_out"] >= self.min_tokens for i in left])
        if self.max_tokens is not None:
            apply("max_tokens", [rows[i]["n_out"] <= self.max_tokens for i in left])
        if self.agree is not None:
            apply("agree", self._agreeing([rows[i] for i in left]))
        if self.best is not None:
            apply("best", self._best([rows[i] for i in left]))
        if self.drop_duplicates:
            apply("drop_duplicates", [_is_new(rows[i], seen) for i in left])
        return why

    def _agreeing(self, rows: list[dict[str, Any]]) -> list[bool]:
        given: dict[Any, set[str]] = defaultdict(set)
        for row in rows:
            given[row["row"], plain(row["label"])].add(row["template"])
        return [len(given[row["row"], plain(row["label"])]) >= (self.agree or 0) for row in rows]

    def _best(self, rows: list[dict[str, Any]]) -> list[bool]:
        of_input: dict[int, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            of_input[row["row"]].append(i)
        by: By = self.by or "logprob"
        kept = {i for own in of_input.values() for i in sorted(own, key=lambda i: -value_of(rows[i], by))[: self.best]}
        return [i in kept for i in range(len(rows))]


def value_of(row: dict[str, Any], by: By) -> float:
    """What a label is ordered or bounded by; formulas in `Filter`."""
    logprob = float(row["sum_logprob"])
    if by == "logprob":
        return logprob
    if by == "logprob_per_token":
        return logprob / max(row["n_out"], 1)
    return logprob - sum(best[0] for best in row["top_logps"])


def option(name: str) -> str:
    """The flag of a rule."""
    return f"--{name.replace('_', '-')}"


def filter_labels(
    folder: Path, out: Path, rules: Filter, *, overwrite: bool = False, request: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write the labels of a finished folder that the rules leave to the new folder `out`. Returns: totals, with the
    labels that each rule left out (`filtered`).

    An interrupted run begins again, and writes the same bytes. Raises DataError if the folder is not whole, no label
    would be left, or `out` is taken; ConfigError as `Filter.check`.
    """
    manifest = finished_manifest(folder)
    if out.resolve() == folder.resolve():
        raise ConfigError(f"{out} holds the labels to filter: name another folder.")
    rules.check(folder, manifest)
    check_output(out, overwrite=overwrite)
    why = _decide(folder, manifest, rules)
    with writer_lock(out / MANIFEST):
        check_output(out, overwrite=overwrite)
        clear(out, None)
        return _write(manifest, out, rules, why, request)


def _decide(folder: Path, manifest: Manifest, rules: Filter) -> dict[int, list[str | None]]:
    """The rule that leaves out each label row, by shard."""
    names = ["row", "status", "template", "student_input", "label", "n_out", "sum_logprob"]
    names += ["top_logps"] if rules.by == "reward" else []
    seen: set[bytes] = set()
    why, left = {}, 0
    for k, shard in sorted(manifest.shards.items()):
        if problem := shard_problem(manifest, shard):
            raise DataError(f"{problem}. Regenerate only that shard: rlkd data repair {folder}")
        rows = pq.read_table(folder / shard["file"], columns=names).to_pylist()
        why[k] = rules.dropped(rows, seen)
        left += sum(row["status"] == "ok" and rule is None for row, rule in zip(rows, why[k], strict=True))
    if not left:
        counts = Counter(rule for rows_why in why.values() for rule in rows_why if rule is not None)
        raise DataError(f"{folder}: no label would be left ({_shown(counts) or 'none has status ok'}). Filter by less.")
    return why


def _write(
    source: Manifest, out: Path, rules: Filter, why: dict[int, list[str | None]], request: dict[str, Any] | None
) -> dict[str, Any]:
    """The shards, then the card and the end of the log."""
    folder, manifest = source.path.parent, Manifest(out / MANIFEST)
    headers = [_header(header, folder, rules, request) for header in source.headers]
    made = {old["generation"]: new["generation"] for old, new in zip(source.headers, headers, strict=True)}
    for header in headers:
        manifest.append("header", **header)
    filtered = dict.fromkeys((name for name in rules.rules if name != "by"), 0)
    for k, shard in sorted(source.shards.items()):
        table = pq.read_table(folder / shard["file"])
        labels = [_filtered(PseudoLabel(**row), rule) for row, rule in zip(table.to_pylist(), why[k], strict=True)]
        labels = [replace(label, generation=made[label.generation]) for label in labels]
        for rule in why[k]:
            if rule is not None:
                filtered[rule] += 1
        checksum = write_labels(out / shard_name(k), labels, top_k=set(TOP_K.names) <= set(table.column_names))
        kept = {
            name: shard[name] for name in ("shard", "file", "first_row", "inputs", "rows", "flaws") if name in shard
        }
        manifest.append("shard", **kept, sha256=checksum, generation=made[shard["generation"]], **summarise(labels))
    bad = folder / BAD_ROWS
    refuse_links(bad)
    if bad.exists():
        write_durably(out / BAD_ROWS, bad.read_bytes())
    totals = total(list(manifest.shards.values()))
    totals |= {"bad_rows": (source.finished or {}).get("bad_rows", 0), "filtered": filtered}
    write_durably(out / CARD, card(manifest.header, totals).encode())
    manifest.append("finished", **totals)
    return totals


def _header(header: dict[str, Any], folder: Path, rules: Filter, request: dict[str, Any] | None) -> dict[str, Any]:
    """The header of a generation of labels after filtering. `labels` tells what they were made of."""
    settings = {**header["settings"], "filter": {**rules.rules, "labels": header["generation"]}}
    first = header.get("labels") or header  # the request that made the labels, however often they were filtered
    made = {"folder": str(folder), "generation": header["generation"], "request": first.get("request")}
    generation = digest_of(json.dumps(settings, sort_keys=True))
    return {**header, "generation": generation, "settings": settings, "part": None, "request": request, "labels": made}


def _filtered(label: PseudoLabel, rule: str | None) -> PseudoLabel:
    if rule is None:
        return label
    return replace(label, status="skipped", error=f"filter: {option(rule)}", **dict.fromkeys(ANSWER))  # type: ignore[arg-type]


def _is_new(row: dict[str, Any], seen: set[bytes]) -> bool:
    """Whether no earlier label has its student input and its text; it is then remembered."""
    pair = json.dumps([row["student_input"], row["label"]])
    key = hashlib.sha256(pair.encode("utf-8", "surrogatepass")).digest()[:16]
    new = key not in seen
    seen.add(key)
    return new


def _shown(counts: Counter[str]) -> str:
    return ", ".join(f"{option(name)}: {count}" for name, count in counts.items())
