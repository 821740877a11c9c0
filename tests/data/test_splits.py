"""The dev rows that are split off: the share of each label, the same for a seed, and no text on both sides."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.data.splits import split_off


def row(text, label, pair=None):
    return {"text": text, "text_pair": pair, "label": label}


def test_every_label_gives_its_share():
    rows = [row(f"text {i}", 0 if i % 10 else 1) for i in range(200)]
    rest, part = split_off(rows, 0.1)
    assert Counter(r["label"] for r in part) == {0: 18, 1: 2}
    assert sorted([*rest, *part], key=rows.index) == rows
    assert part == sorted(part, key=rows.index)
    assert split_off(rows, 0.1) == (rest, part)
    assert split_off(rows, 0.1, seed=1)[1] != part


def test_equal_texts_stay_together():
    rows = [row(f"Text {i % 30}" if i < 30 else f"text  {i % 30}", i % 30 % 2) for i in range(60)]
    rest, part = split_off(rows, 0.2)
    plain = [{" ".join(r["text"].lower().split()) for r in side} for side in (rest, part)]
    assert not plain[0] & plain[1]
    assert len(part) == 12
    # The pair is part of the text.
    pairs = [row("same", 0, f"pair {i}") for i in range(10)] + [row("same", 1, f"pair {i}") for i in range(10, 20)]
    assert len(split_off(pairs, 0.5)[1]) == 10


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.sampled_from([None, 0, 1, 2])), max_size=40),
    st.floats(0.01, 0.99),
)
def test_nothing_is_lost_and_rare_labels_stay_in_training(made, fraction):
    rows = [row(f"t{text}", label) for text, label in made]
    rest, part = split_off(rows, fraction)
    assert len(rest) + len(part) == len(rows)
    assert not {r["text"] for r in rest} & {r["text"] for r in part}
    first = {}  # a text's label is the first it is given
    for r in rows:
        if r["label"] is not None:
            first.setdefault(r["text"], r["label"])
    texts = Counter(first.values())
    held = Counter(first[t] for t in {r["text"] for r in part})
    for label, count in texts.items():
        assert held[label] == min(max(round(fraction * count), 1), count - 1)


def test_texts_without_a_label_are_for_training():
    rows = [row(f"t{i}", None) for i in range(9)] + [row("a", 0), row("b", 0)]
    rest, part = split_off(rows, 0.5)
    assert len(part) == 1
    assert len(rest) == 10
