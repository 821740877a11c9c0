"""Sampled and greedy answers against full logits, and their independence of the batch they were drawn in."""

import pytest
import torch

from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.policy import Policy
from rlkd.records import Example
from rlkd.sampling.rollouts import greedy_answers, sample_rollouts
from tiny import VALID, tiny_t5, tiny_tokenizer

EXAMPLES = [Example(f"row {i}", " ".join("abcdefg"[: 1 + i]), ("t",)) for i in range(5)]
LIMITS = {"max_input_tokens": 5, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def policy():
    model = tiny_t5(tied=False, seed=3)
    with torch.no_grad():
        # Flatter, and end-of-sequence likelier: answers of every length.
        model.lm_head.weight.mul_(0.3)
        model.lm_head.weight[1] = model.lm_head.weight[:VALID].sum(0)
    return Policy(EncoderDecoder(model, VALID))


def sample(policy, examples=EXAMPLES, k=4, seed=(7, "rollout", 0)):
    return sample_rollouts(policy, tiny_tokenizer(), examples, rollouts_per_prompt=k, seed=seed, **LIMITS)


def full_log_probs(policy, example, answer):
    prompt = tiny_tokenizer()(example.student_input, truncation=True, max_length=5)["input_ids"]
    with torch.no_grad():
        out = policy.student(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *answer[:-1]]]))
    return out.logits[0, :, :VALID].log_softmax(-1)


def test_log_probabilities_are_those_of_full_logits(policy):
    rollouts = sample(policy)
    lengths = rollouts.answer_mask.sum(1)
    assert [e.id for e in rollouts.examples] == [f"row {i}" for i in range(5) for _ in range(4)]
    assert len(set(lengths.tolist())) > 2
    for i, example in enumerate(rollouts.examples):
        answer = rollouts.answer_ids[i, : lengths[i]].tolist()
        expected = full_log_probs(policy, example, answer)[range(len(answer)), answer]
        torch.testing.assert_close(rollouts.behaviour_logps[i, : lengths[i]], expected, rtol=0, atol=1e-5)
        assert rollouts.behaviour_logps[i, lengths[i] :].eq(0).all()
        assert rollouts.answer_ids[i, lengths[i] :].eq(0).all()
        assert rollouts.answer_mask[i].tolist() == [t < lengths[i] for t in range(rollouts.answer_mask.shape[1])]
        assert bool(rollouts.finished[i]) == (answer[-1] == 1)
        assert 1 not in answer[:-1]
        assert answer[-1] == 1 or len(answer) == 6
        assert max(answer) < VALID


def test_prompts_are_cut_and_keep_their_end(policy):
    rollouts = sample(policy, k=1)
    assert rollouts.input_mask.sum(1).tolist() == [2, 3, 4, 5, 5]
    assert rollouts.input_ids[4].tolist()[-1] == 1


def test_a_row_does_not_depend_on_its_batch_or_order(policy):
    together = sample(policy)
    for i, example in enumerate(EXAMPLES):
        alone = sample(policy, [example])
        width = alone.answer_ids.shape[1]
        rows = slice(4 * i, 4 * i + 4)
        assert torch.equal(together.answer_ids[rows, :width], alone.answer_ids)
        torch.testing.assert_close(together.behaviour_logps[rows, :width], alone.behaviour_logps, rtol=0, atol=1e-5)
        assert not together.answer_mask[rows, width:].any()
    backwards = sample(policy, EXAMPLES[::-1])
    order = [4 * (4 - i) + k for i in range(5) for k in range(4)]
    assert torch.equal(together.answer_ids, backwards.answer_ids[order])


def test_seeds_and_rollouts_differ(policy):
    one, other = sample(policy), sample(policy, seed=(7, "rollout", 1))
    assert one.answer_ids.tolist() != other.answer_ids.tolist()
    assert len({tuple(row) for row in one.answer_ids[:4].tolist()}) > 1
    assert torch.equal(one.answer_ids, sample(policy).answer_ids)


def test_first_tokens_follow_the_policy(policy):
    """Chi-square of 4,000 first tokens against the exact distribution."""
    k = 4000
    rollouts = sample_rollouts(
        policy, tiny_tokenizer(), EXAMPLES[:1], rollouts_per_prompt=k, seed=(0,), max_input_tokens=5, max_new_tokens=1
    )
    expected = full_log_probs(policy, EXAMPLES[0], [0])[0].exp() * k
    counts = torch.bincount(rollouts.answer_ids[:, 0], minlength=VALID)
    common = expected > 5
    chi2 = ((counts[common] - expected[common]).square() / expected[common]).sum()
    assert chi2 < int(common.sum()) + 5 * (2 * int(common.sum())) ** 0.5


def test_greedy_answers_are_the_argmax_at_every_step(policy):
    answers = greedy_answers(policy, tiny_tokenizer(), EXAMPLES, **LIMITS)
    for i, example in enumerate(EXAMPLES):
        answer = answers.answer_ids[i, answers.answer_mask[i]].tolist()
        log_probs = full_log_probs(policy, example, answer)
        assert log_probs.argmax(-1).tolist() == answer
        torch.testing.assert_close(
            answers.behaviour_logps[i, : len(answer)], log_probs.max(-1).values, rtol=0, atol=1e-5
        )
