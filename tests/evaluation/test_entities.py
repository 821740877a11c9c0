"""Scores of tagged words, against spans found by reading the definition of IOB2 and IOBES word by word."""

import random

import numpy as np
import pytest
from transformers import EvalPrediction

from rlkd.checks import tag_fault
from rlkd.evaluation.class_facts import class_facts, constant_prediction
from rlkd.evaluation.entities import entity_f1, entity_precision, entity_recall, entity_scores, token_accuracy
from rlkd.evaluation.problems import PROBLEMS, classification_metrics, classified_rows

TOKENS = "token_classification"


def spans(tags):
    """(type, first, last) of every entity of well-formed tags."""
    found, begin = [], None
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        if begin is not None and prefix in "OBS":
            found.append((begin[0], begin[1], i - 1))
            begin = None
        if prefix in ("B", "S"):
            begin = (kind, i)
        if prefix in ("S", "E") and begin is not None:
            found.append((begin[0], begin[1], i))
            begin = None
    return set(found)


def well_formed(draw, scheme, words):
    tags = []
    while len(tags) < words:
        kind, n = draw.choice(["PER", "LOC", "MISC-X"]), draw.randint(1, 3)
        if draw.random() < 0.4:
            tags.append("O")
        elif scheme == "IOB2":
            tags += [f"B-{kind}"] + [f"I-{kind}"] * (n - 1)
        else:
            tags += [f"S-{kind}"] if n == 1 else [f"B-{kind}", *[f"I-{kind}"] * (n - 2), f"E-{kind}"]
    return tags[:words] if scheme == "IOB2" else tags


@pytest.mark.parametrize("scheme", ["IOB2", "IOBES"])
def test_entities_are_counted_as_their_definition_says(scheme):
    draw = random.Random(0)
    true = [well_formed(draw, scheme, draw.randint(1, 12)) for _ in range(60)]
    # A quarter of the rows is right; the others have tags of their own, as many.
    others = [(well_formed(draw, scheme, 40), len(row)) for row in true]
    predicted = [row if i % 4 == 0 else own[:n] for i, (row, (own, n)) in enumerate(zip(true, others, strict=True))]
    if scheme == "IOBES":  # not cut inside an entity
        predicted = [row if spans(row) and row[-1][0] in "OES" else ["O"] * len(row) for row in predicted]
    gold = {(i, *span) for i, row in enumerate(true) for span in spans(row)}
    given = {(i, *span) for i, row in enumerate(predicted) for span in spans(row)}
    right = len(gold & given)
    assert 0 < right < min(len(gold), len(given))
    assert entity_precision(predicted, true) == pytest.approx(right / len(given))
    assert entity_recall(predicted, true) == pytest.approx(right / len(gold))
    assert entity_f1(predicted, true) == pytest.approx(2 * right / (len(gold) + len(given)))
    names = sorted({tag for row in true for tag in row})
    found = {one.label: one for one in entity_scores(predicted, true, [*names, "B-NONE"])}
    assert list(found) == ["LOC", "MISC-X", "NONE", "PER"]
    for kind, one in found.items():
        own, theirs = ({span for span in side if span[1] == kind} for side in (gold, given))
        assert (one.rows, one.predicted) == (len(own), len(theirs))
        assert one.f1 == pytest.approx(2 * len(own & theirs) / max(len(own) + len(theirs), 1))
        assert one.recall == pytest.approx(len(own & theirs) / max(len(own), 1))


def test_a_tag_inside_may_begin_an_entity_and_types_end_one():
    assert entity_f1([["I-X", "I-X", "B-X", "I-Y"]], [["B-X", "I-X", "B-X", "B-Y"]]) == 1
    assert entity_f1([["B", "I", "O"]], [["B", "I", "O"]]) == 1
    assert [one.label for one in entity_scores([["B", "I"]], [["B", "O"]], ["B", "I", "O"])] == ["_"]


def test_only_words_with_a_known_tag_count():
    names = ["O", "B-X", "I-X"]
    true = np.array([[1, 2, -100, -100], [-100, -100, -100, -100], [0, 1, 0, -100]])
    guess = np.array([[1, 2, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    outputs = np.eye(3)[guess]
    found = classification_metrics(PROBLEMS[TOKENS].always, TOKENS, names)(EvalPrediction(outputs, true))
    assert found == pytest.approx({"entity_f1": 2 / 3, "entity_precision": 1, "entity_recall": 0.5,
                                   "token_accuracy": 4 / 5, "sequence_accuracy": 0.5})  # fmt: skip
    rows = classified_rows(guess, true, ["a b", "c d", "e f g"], TOKENS, names)
    assert rows == [
        {"id": "0", "input": "a b", "label": ["B-X", "I-X"], "predicted": ["B-X", "I-X"], "sequence_accuracy": 1.0},
        {"id": "2", "input": "e f g", "label": ["O", "B-X", "O"], "predicted": ["O", "O", "O"],
         "sequence_accuracy": 0.0},
    ]  # fmt: skip
    facts = class_facts(outputs, true, names, TOKENS)
    assert [(one["label"], one["rows"], one["predicted"]) for one in facts.pop("classes")] == [("X", 2, 1)]
    assert facts == {}
    assert constant_prediction(rows, names, TOKENS) is None
    assert constant_prediction(rows[1:], names, TOKENS) == {"label": "O", "rows": 3}
    assert token_accuracy([], []) == entity_f1([], []) == 0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["O", "B-PER", "NOUN"], "'NOUN' is no tag of an entity"),
        (["0", "1"], "set labels to their names in order"),
        (["O", "U-PER"], "write L- as E-, U- as S-"),
        (["B-PER", "I-PER"], "there is no tag O"),
        (["O", "B-PER", "I-PER", "E-PER", "S-A-B"], None),
        (["O", "B", "I"], None),
    ],
)
def test_what_tags_are(names, message):
    found = tag_fault(names)
    assert found is None if message is None else message in found
