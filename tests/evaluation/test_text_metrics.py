"""chrF, token F1 and SARI; what a setting `task_metric` may name."""

import random
from collections import Counter

import pytest
from sacrebleu.metrics import CHRF

from rlkd.errors import ConfigError
from rlkd.evaluation.task_metrics import chrf, sari, task_metric_of, token_f1
from rlkd.records import Example

ABOUT = "About 95 species are currently accepted."
REFERENCES = (
    "About 95 species are currently known.",
    "About 95 species are now accepted.",
    "95 species are now accepted.",
)


def rows(*references, source="x"):
    return [Example(f"row {i}", source, (source,), r) for i, r in enumerate(references)]


def test_chrf_is_that_of_sacrebleu_and_takes_rows_with_fewer_references():
    texts, references = ["the cat sat", "в саду"], [("a cat sat down", "the cats"), ("в парке",)]
    got = chrf(texts, rows(*references))["chrf"]
    assert got == pytest.approx(
        CHRF().corpus_score(texts, [["a cat sat down", "в парке"], ["the cats", "в парке"]]).score
    )
    assert list(got.rows) == pytest.approx(
        [CHRF().sentence_score(t, list(r)).score for t, r in zip(texts, references, strict=True)]
    )


def test_token_f1_by_hand():
    # Two of three predicted and two of four wanted words; the best reference counts; nothing against nothing is right.
    got = token_f1(["The cat, sat down!", "an", "x"], rows(("cat sat on mats", "dog"), ("the",), ("y",)))["token_f1"]
    assert got.rows == pytest.approx((100 * 2 * 2 / (3 + 4), 100, 0))


def test_sari_of_the_published_example():
    """The example in the documentation of Hugging Face's metric, with its number."""
    got = sari(["About 95 you now get in."], rows(REFERENCES, source=ABOUT))["sari"]
    assert got == pytest.approx(26.953601953601954)


def test_sari_orders_answers():
    source, best = "the feline was seated on the rug .", "the cat sat on the rug ."
    perfect, copied, lost = (float(sari([t], rows((best,), source=source))["sari"]) for t in (best, source, "no"))
    assert perfect == pytest.approx(100)
    assert perfect > copied
    assert perfect > lost


def brute_force(source, answer, references):
    """SARI from lists of n-grams, counted one by one."""

    def grams(words, n):
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    def mean(values, otherwise=1.0):
        return sum(values) / len(values) if values else otherwise

    total = 0.0
    for n in range(1, 5):
        s, a, told = grams(source, n) * len(references), grams(answer, n) * len(references), []
        for reference in references:
            told += grams(reference, n)
        kept = {g: min(s.count(g), a.count(g)) for g in set(s) & set(a)}
        right = {g: min(k, told.count(g)) for g, k in kept.items()}
        wanted = sum(min(s.count(g), told.count(g)) for g in set(s))
        precision, recall = mean([right[g] / kept[g] for g in kept]), sum(right.values()) / wanted if wanted else 1.0
        keep = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        gone = {g: s.count(g) - a.count(g) for g in set(s) if s.count(g) > a.count(g)}
        delete = mean([max(k - told.count(g), 0) / k for g, k in gone.items()])
        new, to_add = set(a) - set(s), set(told) - set(s)
        precision, recall = mean([g in told for g in new]), mean([g in a for g in to_add])
        add = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        total += (keep + delete + add) / 3
    return 100 * total / 4


@pytest.mark.parametrize("seed", range(20))
def test_sari_against_counting_one_by_one(seed):
    draw = random.Random(seed)
    texts = [[draw.choice("abcde") for _ in range(draw.randint(1, 9))] for _ in range(2 + draw.randint(1, 3))]
    source, answer, *references = texts
    got = sari([" ".join(answer)], rows(tuple(" ".join(r) for r in references), source=" ".join(source)))["sari"]
    assert got == pytest.approx(brute_force(source, answer, references))


def test_settings(tmp_path, monkeypatch):
    assert task_metric_of("none") is None
    both = task_metric_of("exact_match, chrf")(["a"], rows(("a",)))
    assert Counter(both) == {"exact_match": 1, "chrf": 100}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_metrics_of_text.py").write_text(
        "def length(predictions, examples):\n    return {'words': sum(map(len, map(str.split, predictions)))}\n"
    )
    assert task_metric_of("my_metrics_of_text:length")(["a b", "c"], []) == {"words": 3}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("blue", "'blue' is unknown; allowed are none, rouge, .* Did you mean 'bleu'"),
        ("bleu,chrf,bleu", "'bleu' is given twice"),
        ("bleu,none", "'none' is unknown"),
        ("", "'' is unknown"),
        ("no_such_module_x:f", "cannot import no_such_module_x"),
        ("json:nothing", "json has no function nothing"),
    ],
)
def test_what_is_no_metric(setting, words):
    with pytest.raises(ConfigError, match=rf"task_metric = '{setting}': {words}"):
        task_metric_of(setting)
