"""Views of label folders agree with what labelling recorded."""

from __future__ import annotations

import pytest

from rlkd import Decoding, RewardView, generate_pseudolabels
from rlkd.errors import DataError
from rlkd.records import Example
from tiny import VALID, tiny_teacher, tiny_tokenizer

INPUTS = [Example(str(i), text, (f"copy {text}",), (text,)) for i, text in enumerate(["a b", "c", "1 2 3", "d e f"])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sampled labels, two an input, with every token's log-probability."""
    out = tmp_path_factory.mktemp("labels") / "out"
    decoding = Decoding("sample", 6, labels_per_input=2, top_k_logprobs=VALID)
    generate_pseudolabels(tiny_teacher(), INPUTS, out=out, template_names=["copy"], decoding=decoding)
    return out


@pytest.mark.parametrize("value", ["max", "lse"])
def test_recorded_and_scored_numbers_agree(folder, value):
    recorded = RewardView.from_labels(folder, tiny_tokenizer(), value=value)
    scored = RewardView.from_labels(folder, tiny_tokenizer(), value=value, teacher=tiny_teacher())
    assert len(recorded) == len(scored) == 4 * 2 + 4
    for one, other in zip(recorded, scored, strict=True):
        assert (one.source, one.text, one.tokens, one.prompts) == (
            other.source, other.text, other.tokens, other.prompts,
        )  # fmt: skip
        if one.source == "pseudo-label":
            assert one.rewards == pytest.approx(other.rewards, abs=1e-4)
            assert one.logprob == pytest.approx(one.facts["recorded log-prob"], abs=1e-4)
            assert one.finished is (one.ids[-1] == 1)
            for shown, expected in zip(one.top, other.top, strict=True):
                assert [p for _, p in shown[:5]] == pytest.approx([p for _, p in expected], abs=1e-4)
        else:
            assert one.text == one.input  # these inputs' references
            assert one.tokens == []


def test_what_was_not_recorded_is_not_made_up(tmp_path):
    decoding = Decoding("greedy", 4)
    generate_pseudolabels(tiny_teacher(), INPUTS, out=tmp_path / "out", template_names=["copy"], decoding=decoding)
    plain = RewardView.from_labels(tmp_path / "out", tiny_tokenizer(), limit=2)
    labels = [s for s in plain if s.source == "pseudo-label"]
    assert len(labels) == 2
    assert all(s.rewards is None and s.top is None and s.total_reward is None for s in labels)
    assert all("recorded log-prob" in s.facts for s in labels)


def test_softmax_needs_a_teacher(folder):
    assert all(s.rewards is None for s in RewardView.from_labels(folder, tiny_tokenizer(), value="softmax"))


def test_a_folder_without_labels_is_refused(tmp_path):
    with pytest.raises(DataError, match="no labels"):
        RewardView.from_labels(tmp_path, tiny_tokenizer())
