"""Task metrics by name: (predictions, examples) -> scores. References come from the examples, never from training."""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ..checks import check_choice
from ..errors import ConfigError, DataError, RlkdError, nearest
from ..metrics import held_out
from ..records import Example
from .functions import FUNCTION, imported

logger = logging.getLogger(__name__)


class RowScore(float):
    """A score with one value per row, by which evaluations of the same rows are compared."""

    rows: tuple[float, ...]


class RowMean(RowScore):
    """The mean of one score per row (0 without rows) that keeps the scores, for intervals and paired comparisons."""

    def __new__(cls, rows: Sequence[float]) -> RowMean:
        """rows: one score per row, in the rows' order."""
        mean = super().__new__(cls, sum(rows) / max(len(rows), 1))
        mean.rows = tuple(rows)
        return mean


def references_of(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """The references of each row. Raises DataError with the count of rows that have none."""
    missing = [example.id for example in examples if not example.references]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(examples)} evaluation rows have no reference (first: {missing[0]}). "
            "Name a reference_column with a text in each of them, remove them, or set task_metric: none"
        )
    return [example.references for example in examples]


def rouge(predictions: list[str], examples: list[Example]) -> dict[str, float]:
    """Mean ROUGE-1/2/L F1 (x 100, stemmed) against the best of each row's references; google-research/rouge."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    best = [
        scorer.score_multi(list(references), prediction)
        for prediction, references in zip(predictions, references_of(examples), strict=True)
    ]
    return {kind: RowMean([100 * row[kind].fmeasure for row in best]) for kind in kinds}


def bleu(predictions: list[str], examples: list[Example]) -> dict[str, float]:
    """Corpus BLEU with up to as many references as each row has (sacrebleu, 13a); the rows have their own BLEU."""
    from sacrebleu.metrics import BLEU

    references = references_of(examples)
    width = max(len(r) for r in references)
    # sacrebleu expects None where a row has fewer references than others.
    columns: list[Any] = [[r[i] if i < len(r) else None for r in references] for i in range(width)]
    score = RowScore(BLEU().corpus_score(predictions, columns).score)
    sentence = BLEU(effective_order=True)
    score.rows = tuple(
        sentence.sentence_score(text, list(of_row)).score for text, of_row in zip(predictions, references, strict=True)
    )
    return {"bleu": score}


def exact_match(predictions: list[str], examples: list[Example]) -> dict[str, float]:
    """Share of predictions equal to one of the references, stripped and lower-cased (accuracy of a classifier)."""
    hits = [
        prediction.strip().lower() in {r.strip().lower() for r in references}
        for prediction, references in zip(predictions, references_of(examples), strict=True)
    ]
    return {"exact_match": RowMean(hits)}


def chrf(predictions: list[str], examples: list[Example]) -> dict[str, float]:
    """Corpus chrF2 (Popovic 2015; sacrebleu), which needs no words: F2 of character 1- to 6-grams, 0 to 100."""
    from sacrebleu.metrics import CHRF

    references = references_of(examples)
    width = max(len(r) for r in references)
    # sacrebleu takes a number of references for all rows; of the best one, a repeated reference changes nothing.
    columns = [[r[min(i, len(r) - 1)] for r in references] for i in range(width)]
    metric = CHRF()
    score = RowScore(metric.corpus_score(predictions, columns).score)
    score.rows = tuple(
        metric.sentence_score(text, list(of_row)).score for text, of_row in zip(predictions, references, strict=True)
    )
    return {"chrf": score}


def token_f1(predictions: list[str], examples: list[Example]) -> dict[str, float]:
    """Mean F1 of words (x 100) against the best of each row's references, as SQuAD scores answers: lower-cased,
    without punctuation and articles (Rajpurkar et al. 2016).
    """
    return {
        "token_f1": RowMean(
            [
                100 * max(_word_f1(prediction, reference) for reference in references)
                for prediction, references in zip(predictions, references_of(examples), strict=True)
            ]
        )
    }


def _word_f1(prediction: str, reference: str) -> float:
    mine, other = _squad_words(prediction), _squad_words(reference)
    common = (Counter(mine) & Counter(other)).total()
    return 2 * common / (len(mine) + len(other)) if mine and other else float(mine == other)


def _squad_words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def sari(predictions: list[str], examples: list[Example]) -> dict[str, float]:
    """Mean SARI (x 100; Xu et al. 2016, section 4) of rewritten inputs: the mean of the F1 of n-grams that were rightly
    added, the F1 of those rightly kept and the precision of those deleted, n = 1 to 4; 0 / 0 counts as 1.

    The source is what the student reads, without the template that it may have been given.
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    split = Tokenizer13a()

    def grams(text: str) -> list[Counter[tuple[str, ...]]]:
        words = split(text.lower()).split()
        return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, 5)]

    rows = []
    for text, example, references in zip(predictions, examples, references_of(examples), strict=True):
        told = list(map(grams, references))
        pairs = zip(grams(example.student_input), grams(text), zip(*told, strict=True), strict=True)
        rows.append(100 * sum(sum(_operations(*pair)) / 3 for pair in pairs) / 4)
    return {"sari": RowMean(rows)}


def _operations(
    source: Counter[tuple[str, ...]], answer: Counter[tuple[str, ...]], references: Sequence[Counter[tuple[str, ...]]]
) -> tuple[float, float, float]:
    """F1 of added n-grams, F1 of kept ones, precision of deleted ones; counts are of as many copies of source and
    answer as there are references.
    """
    told = sum(references, Counter())
    times = len(references)
    many_source, many_answer = (Counter({g: n * times for g, n in of.items()}) for of in (source, answer))
    kept, to_keep = many_source & many_answer, many_source & told
    well_kept = kept & told
    deleted = many_source - many_answer
    well_deleted = deleted - told
    added, to_add = answer.keys() - source.keys(), told.keys() - source.keys()
    well_added = len(added & told.keys())
    return (
        _f1(_share(well_added, len(added)), _share(well_added, len(to_add))),
        _f1(
            _share(sum(n / kept[g] for g, n in well_kept.items()), len(kept)),
            _share(well_kept.total(), to_keep.total()),
        ),
        _share(sum(n / deleted[g] for g, n in well_deleted.items()), len(deleted)),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


TASK_METRICS = {
    "rouge": rouge,
    "bleu": bleu,
    "chrf": chrf,
    "exact_match": exact_match,
    "token_f1": token_f1,
    "sari": sari,
}


def task_metric_of(setting: str) -> Callable[..., dict[str, float]] | None:
    """What a setting `task_metric` names: none, metrics separated by commas, or module:function of (predictions,
    examples). Raises ConfigError for another name, and if there is no such function.
    """
    if setting == "none":
        return None
    if FUNCTION.fullmatch(setting):
        return imported(setting, "task_metric")
    names = check_task_metric(setting)

    def together(predictions: list[str], examples: list[Example]) -> dict[str, float]:
        return {k: v for name in names for k, v in TASK_METRICS[name](predictions, examples).items()}

    return TASK_METRICS[names[0]] if len(names) == 1 else together


def check_task_metric(setting: str) -> list[str]:
    """The metrics that a setting names; none for a function, which is not imported. Raises ConfigError."""
    if setting == "none" or FUNCTION.fullmatch(setting):
        return []
    names = [name.strip() for name in setting.split(",")]
    unknown = [name for name in names if name not in TASK_METRICS]
    if unknown or len(set(names)) < len(names):
        what = unknown[0] if unknown else max(names, key=names.count)
        raise ConfigError(
            f"task_metric = {setting!r}: {what!r} is {'unknown' if unknown else 'given twice'}; allowed are none, "
            f"{', '.join(TASK_METRICS)} (several separated by commas), and module:function of (predictions, examples) "
            f"that returns named scores.{nearest(what, ['none', *TASK_METRICS]) if unknown else ''}"
        )
    return names


FEW = 64  # rows that a metric is tried on


def try_metric(metric: Callable[..., dict[str, float]], examples: Sequence[Example]) -> list[str]:
    """The names of a metric's scores, from answers that are the rows' first references (their inputs, without any).

    Raises DataError if the metric needs references that rows lack, ConfigError if it fails on such answers; a score of
    ours that is 0 for them, which cannot tell good answers from bad ones, is a warning.
    """
    ours = getattr(metric, "__module__", None) == __name__
    if ours:
        references_of(examples)
    scores = _tried(metric, examples[:FEW]) or _tried(metric, examples, last=True)
    if ours:
        warn_of_useless(scores, "ROUGE reads the letters a-z and digits only, BLEU needs texts of at least 4 tokens")
    return list(scores)


def warn_of_useless(scores: dict[str, float], reason: str) -> None:
    """Name the scores of right answers that are 0 although more is better."""
    useless = [name for name, value in scores.items() if value == 0 and not held_out(name).lower_is_better]
    if useless:
        logger.warning(
            f"{', '.join(useless)}: 0 for the right answers themselves, so it cannot tell good answers from bad ones "
            f"({reason}). Choose another metric, or other held-out rows."
        )


def _tried(metric: Callable[..., dict[str, float]], rows: Sequence[Example], last: bool = False) -> dict[str, float]:
    """The scores; {} if the metric fails, which it may on a few rows (unless `last`)."""
    try:
        found = metric([(row.references or (row.student_input,))[0] for row in rows], list(rows))
        return {name: float(value) for name, value in found.items()}
    except RlkdError:
        raise
    except Exception as error:  # a user's function may raise anything
        if not last:
            return {}
        raise ConfigError(
            f"task_metric fails on {len(rows)} answers that are the references ({type(error).__name__}: {error}): it "
            "must take (predictions, examples) and return a dictionary of numbers"
        ) from error


def score_labels(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Scores of pseudo-labels (dictionaries with the fields of PseudoLabel) against their references, per template.

    Returns: template -> score -> value. Besides the metrics `names`: rows; tokens, mean length; logprob, mean nats per
    token; finished, share of answers that were not cut. Raises DataError if rows have no references.
    """
    for name in names:
        check_choice("metric", name, TASK_METRICS)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["template"], []).append(row)
    scores = {}
    for template, mine in groups.items():
        labels = [row["label"] for row in mine]
        inputs = [Example(row["id"], row["student_input"], (), tuple(row["references"])) for row in mine]
        tokens = sum(row["n_out"] for row in mine)
        scores[template] = {
            "rows": len(mine),
            **{name: value for metric in names for name, value in TASK_METRICS[metric](labels, inputs).items()},
            "tokens": tokens / len(mine),
            "logprob": sum(row["sum_logprob"] for row in mine) / max(tokens, 1),
            "finished": sum(row["finish_reason"] != "length" for row in mine) / len(mine),
        }
    return scores
