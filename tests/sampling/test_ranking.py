"""T0-style ranking against sums over plain forwards."""

import pytest
import torch

from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.sampling.engines.torch_engine import TorchEngine
from rlkd.sampling.ranking import choice_problem, rank
from rlkd.sampling.schedule import Budget
from tiny import EOS, KINDS, VALID, tiny_model, tiny_tokenizer

PROMPTS = [[3 + (5 * i + j * j) % 29 for j in range(1 + i % 4)] for i in range(7)]
CHOICES = [[[3 + (i + c + t) % 29 for t in range(c)] + [EOS] for c in range(2 + i % 3)] for i in range(7)]


def oracle(lm, prompt, choice):
    decoder_input = torch.tensor([[lm.start_id, *choice[:-1]]])
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_input).logits
    table = logits[0, :, :VALID].double().log_softmax(-1)
    return sum(table[t, token].item() for t, token in enumerate(choice))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_scores_are_sums_of_log_probs_end_of_sequence_included(kind, tokens):
    lm = EncoderDecoder(tiny_model(kind), VALID)
    scores = rank(TorchEngine(lm), PROMPTS, CHOICES, Budget(tokens))
    assert [len(row) for row in scores] == [len(row) for row in CHOICES]
    for prompt, row, choices in zip(PROMPTS, scores, CHOICES, strict=True):
        assert row == pytest.approx([oracle(lm, prompt, choice) for choice in choices], abs=2e-5)


def test_choices_of_one_prompt_share_its_encoder_work(monkeypatch):
    encoded, encode = [], EncoderDecoder.encode

    def counting(self, ids, mask):
        encoded.append(len(ids))
        return encode(self, ids, mask)

    monkeypatch.setattr(EncoderDecoder, "encode", counting)
    rank(TorchEngine(EncoderDecoder(tiny_model("t5"), VALID)), PROMPTS, CHOICES)
    assert sum(encoded) == len({tuple(prompt) for prompt in PROMPTS}) < sum(map(len, CHOICES))


def test_nothing_to_rank():
    engine = TorchEngine(EncoderDecoder(tiny_model("t5"), VALID))
    assert rank(engine, [], []) == []


@pytest.mark.parametrize(
    ("choices", "problem"),
    [
        (("a", "b", "a b", "b a", "a a"), None),
        (("a", "b", "a"), None),  # one choice, given twice
        (("a ?", "b"), None),  # one unknown character among known ones
        ((), "there are no answer choices"),
        (("a", ""), "an answer choice is empty"),
        (("a", " \t"), "an answer choice is empty"),
        (("{", "<"), "the tokenizer has no tokens for the answer choice '{'"),
        (("a", "<"), "the tokenizer has no tokens for the answer choice '<'"),
        (("a b", "a  b"), "the answer choices 'a b' and 'a  b' have the same tokens"),
        (("a {", "b", "a <"), "the answer choices 'a {' and 'a <' have the same tokens"),
        (("a", "</s>"), "the tokenizer has no tokens for the answer choice '</s>'"),
    ],
)
def test_choices_that_tokens_do_not_tell_apart(choices, problem):
    assert choice_problem(tiny_tokenizer(), choices) == problem


def test_a_tokenizer_that_ignores_case():
    from tokenizers.normalizers import Lowercase

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    assert choice_problem(tokenizer, ("A", "b", "a")) == "the answer choices 'A' and 'a' have the same tokens"
