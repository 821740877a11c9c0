"""The rewards that are shown are those that training uses."""

from __future__ import annotations

import pytest
import torch
from trainers.tiny_runs import make

from rlkd import reward_view
from rlkd.errors import ConfigError
from rlkd.evaluation.token_rewards import score_rollouts
from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.policy import Policy
from rlkd.objectives.rewards import induced_reward, teacher_value
from rlkd.records import Example
from tiny import KINDS, VALID, tiny_model, tiny_teacher, tiny_tokenizer

EXAMPLES = [
    Example("one", "a b c", ("copy a b c", "reverse : a b c"), ("c b a",)),
    Example("two", "d e", ("copy d e", "reverse : d e"), ()),
    Example("three", "1 2 3 4", ("copy 1 2 3 4", "reverse : 1 2 3 4"), ("1 2", "2 1")),
]


@pytest.mark.parametrize("value", ["max", "lse", "softmax"])
def test_shown_rewards_are_the_trainers(tmp_path, value):
    trainer = make("ppo", tmp_path, reward_value=value, one_step="sampled", whiten_advantages=False)
    rollouts = trainer.sample(0)
    batch = trainer.annotate(rollouts)
    rewards = batch.annotations.rewards
    samples = score_rollouts(trainer.teacher, trainer.tokenizer, rollouts, source="student", value=value)
    assert len(samples) == len(rewards)
    for i, sample in enumerate(samples):
        kept = rollouts.answer_mask[i]
        assert sample.rewards == pytest.approx(rewards[i][kept].tolist(), abs=1e-5)
        assert sample.total_reward == pytest.approx(float(rewards[i].sum()), abs=1e-5)
        assert sample.ids == rollouts.answer_ids[i][kept].tolist()
    # The return of the reward itself is that sum and V(s_0).
    mask = rollouts.answer_mask
    returns = induced_reward(batch.signal, mask, value=value).sum(1) - teacher_value(batch.signal, value)[:, 0]
    assert [s.total_reward for s in samples] == pytest.approx(returns.tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_agree_with_a_plain_forward(kind):
    """Oracle: transformers' own forward with labels, one row at a time, without rlkd's heads and caches."""
    teacher, tokenizer = tiny_teacher(kind), tiny_tokenizer()
    student = tiny_model(kind, seed=5)
    examples = [Example(e.id, e.student_input, e.teacher_inputs[:1]) for e in EXAMPLES]
    view = reward_view(teacher, tokenizer, examples, student=student, answers={"mine": ["a", "", "b c d"]})
    assert [s.source for s in view.cases()[0].samples] == ["student", "teacher greedy", "mine"]
    for sample in view:
        for model, prompt, shown in (
            (teacher.lm.model, sample.prompts["template 1"], sample.logprobs),
            (student, sample.input, sample.student_logprobs),
        ):
            logits = model(**tokenizer(prompt, return_tensors="pt"), labels=torch.tensor([sample.ids])).logits[0]
            logps = logits[:, :VALID].log_softmax(-1)
            assert shown == pytest.approx(logps.gather(1, torch.tensor(sample.ids)[:, None])[:, 0].tolist(), abs=1e-4)
            if model is not student:
                assert sample.max_logprobs == pytest.approx(logps.amax(1).tolist(), abs=1e-4)
                assert sample.entropies == pytest.approx((-logps * logps.exp()).sum(1).tolist(), abs=1e-4)
                best = logps.topk(5)
                for t, shown_best in enumerate(sample.top):
                    assert [p for _, p in shown_best] == pytest.approx(best.values[t].tolist(), abs=1e-4)
                    assert [text for text, _ in shown_best] == [tokenizer.decode([i]) for i in best.indices[t].tolist()]


def test_each_of_several_students_scores_its_own_answers():
    tokenizer = tiny_tokenizer()
    models = {"student": tiny_model("t5", seed=5), "student before": tiny_model("t5", seed=6)}
    view = reward_view(tiny_teacher(), tokenizer, EXAMPLES, student=models)
    assert {s.source for s in view} == {"student", "student before", "teacher greedy", "reference"}
    for sample in view:
        model = models.get(sample.source, models["student"])
        logits = model(**tokenizer(sample.input, return_tensors="pt"), labels=torch.tensor([sample.ids])).logits[0]
        logps = logits[:, :VALID].log_softmax(-1).gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
        assert sample.student_logprobs == pytest.approx(logps.tolist(), abs=1e-4)
    before = reward_view(tiny_teacher(), tokenizer, EXAMPLES, student={"student before": models["student before"]})
    assert {s.source for s in before if s.student_logprobs is not None} == {"student before"}


def test_the_teachers_own_greedy_answer_has_no_regret():
    view = reward_view(tiny_teacher(), tiny_tokenizer(), [EXAMPLES[0]])
    (own,) = [s for s in view if s.source == "teacher greedy" and s.template == "template 1 + template 2"]
    alone = reward_view(tiny_teacher(), tiny_tokenizer(), [Example("one", "a b c", ("copy a b c",))]).samples[0]
    assert alone.regret == pytest.approx(0, abs=1e-5)
    assert own.ids == alone.ids
    assert own.regret > 0  # under the mean of two templates it has some


def test_an_answer_under_two_templates_is_their_mean():
    names = ("copy", "reverse")
    view = reward_view(tiny_teacher(), tiny_tokenizer(), EXAMPLES, template_names=names)
    for case in view.cases():
        both, one, other = [s for s in case.samples if s.source == "teacher greedy"]
        assert (both.template, one.template, other.template) == ("copy + reverse", "copy", "reverse")
        mean = [(a + b) / 2 for a, b in zip(one.rewards, other.rewards, strict=True)]
        assert both.rewards == pytest.approx(mean, abs=1e-5)
        assert case.template_gap >= abs(one.total_reward - other.total_reward) - 1e-9


def test_references_and_given_answers_end_and_are_cut():
    view = reward_view(tiny_teacher(), tiny_tokenizer(), EXAMPLES, answers=["a", "", "a b c d e"], max_new_tokens=3)
    by_source = {(s.id, s.source): s for s in view}
    assert by_source["one", "answer"].tokens == ["a", " </s>"]
    assert by_source["two", "answer"].tokens == ["</s>"]
    cut = by_source["three", "answer"]
    assert (cut.text, cut.finished, len(cut)) == ("a b c", False, 3)
    assert by_source["one", "reference"].finished is False  # three words fill the three tokens
    assert by_source["three", "reference"].text == "1 2"
    assert ("two", "reference") not in by_source


def test_a_critics_values_are_shown():
    policy = Policy(EncoderDecoder(tiny_model("t5", seed=3), VALID), critic=True)
    torch.nn.init.ones_(policy.value_head.bias)
    view = reward_view(tiny_teacher(), tiny_tokenizer(), EXAMPLES, student=policy)
    assert [x for s in view for x in s.values] == pytest.approx([1.0] * sum(map(len, view)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": []}, "no examples"),
        ({"answers": "a"}, "answers is a single text"),
        ({"answers": []}, "0 answers for 3 examples"),
        ({"answers": ["a"]}, "1 answers for 3 examples"),
        ({"answers": {"mine": ["a"] * 4}}, "mine: 4 answers for 3 examples"),
        ({"template_names": ["a"]}, "1 names for 2 teacher inputs"),
        ({"examples": [EXAMPLES[0], Example("x", "a", ("a",))]}, "1 to 2 teacher inputs"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    options = {"examples": EXAMPLES, **options}
    with pytest.raises(ConfigError, match=message):
        reward_view(tiny_teacher(), tiny_tokenizer(), **options)
