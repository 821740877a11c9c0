"""What an evaluation reports, against the same numbers from full logits, answer by answer."""

import math

import pytest
import torch

from rlkd.evaluation.evaluator import Evaluator
from rlkd.evaluation.task_metrics import exact_match
from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.policy import Policy
from rlkd.records import Example
from tiny import VALID, tiny_t5, tiny_teacher, tiny_tokenizer

EXAMPLES = [
    Example(f"row {i}", " ".join("abcdefg"[: 1 + i % 4]), (f"copy : {i}", f"answer is {i}"), (f"{i}",))
    for i in range(7)
]


def evaluator(**options):
    teacher = options.pop("teacher", None) or tiny_teacher(seed=1)
    return Evaluator(teacher, tiny_tokenizer(), EXAMPLES, max_input_tokens=16, max_new_tokens=5, **options)


def policy(seed):
    model = tiny_t5(tied=False, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.4)
        model.lm_head.weight[1] = model.lm_head.weight[:VALID].sum(0)
    return Policy(EncoderDecoder(model, VALID))


def log_probs(model, text, answer):
    prompt = tiny_tokenizer()(text)["input_ids"]
    with torch.no_grad():
        out = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *answer[:-1]]]))
    return out.logits[0, :, :VALID].log_softmax(-1)


def ids_of(text, length):
    """The exact answer behind a text: its words, and the end if a token is left."""
    ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids if len(ids) == length else [*ids, 1]


def greedy_by_hand(model, text):
    answer = []
    while len(answer) < 5 and answer[-1:] != [1]:
        answer.append(int(log_probs(model, text, [*answer, 0])[-1].argmax()))
    return answer


def text_of(ids):
    return tiny_tokenizer().decode(ids, skip_special_tokens=True)


def test_every_row_equals_a_computation_from_full_logits():
    scorer, student, reference = evaluator(), policy(2), policy(3)
    teacher = scorer.teacher.lm.model
    rows = scorer.rows(student, reference, range(7))
    assert [row["index"] for row in rows] == list(range(7))
    assert [row["id"] for row in rows] == [e.id for e in EXAMPLES]
    # Words that decode to nothing (padding, unknown) would hide tokens: sampled rows of that kind are left out.
    checked = 0
    for row, example in zip(rows, EXAMPLES, strict=True):
        best = greedy_by_hand(student.student, example.student_input)
        assert row["student"] == text_of(best)
        assert row["teacher"] == text_of(greedy_by_hand(teacher, example.teacher_inputs[0]))
        assert row["match"] == float(row["student"] == row["teacher"])
        for prefix in ("", "sample_"):
            answer = best if prefix == "" else ids_of(row["sample_student"], row["sample_length"])
            if len(answer) != row[prefix + "length"]:
                continue
            checked += prefix == "sample_"
            per_template = [log_probs(teacher, text, answer) for text in example.teacher_inputs]
            pi, pi_0 = (log_probs(m.student, example.student_input, answer) for m in (student, reference))
            regret = logprob = entropy = kl = 0.0
            rewards = []
            for t, a in enumerate(answer):
                rewards.append(sum(float(lp[t, a] - lp[t].max()) for lp in per_template) / 2)
                regret -= rewards[-1]
                logprob += sum(float(lp[t, a]) for lp in per_template) / 2
                entropy -= sum(math.exp(x) * x for x in pi[t].tolist())
                d = float(pi_0[t, a] - pi[t, a])
                kl += math.exp(d) - 1 - d
            n = len(answer)
            expected = {"regret": regret, "logprob": logprob, "entropy": entropy / n, "kl": kl / n}
            expected |= {"length": n, "finish_rate": float(answer[-1] == 1)}
            assert {k: row[prefix + k] for k in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
            assert "".join(row[prefix + "tokens"]) == tiny_tokenizer().decode(answer)
            assert len(row[prefix + "tokens"]) == len(answer)
            assert row[prefix + "rewards"] == pytest.approx(rewards, rel=1e-4, abs=1e-5)
    assert checked >= 4


def test_summary_is_the_mean_of_the_rows_and_the_task_metric():
    scorer = evaluator(task_metric=exact_match)
    rows = scorer.rows(policy(2), None, [5, 1, 3])
    summary = scorer.summarise(rows)
    for name in ("regret", "logprob", "length", "finish_rate", "entropy", "kl"):
        for prefix in ("", "sample_"):
            assert summary[prefix + name] == pytest.approx(sum(row[prefix + name] for row in rows) / 3)
    assert summary["match"] == pytest.approx(sum(row["match"] for row in rows) / 3)
    hits = [row["student"] == str(row["index"]) for row in rows]
    assert summary["exact_match"] == sum(hits) / 3
    assert [row["exact_match"] for row in rows] == hits
    assert set(summary) == {
        *(p + n for p in ("", "sample_") for n in ("regret", "logprob", "length", "finish_rate", "entropy", "kl")),
        *("match", "exact_match", "sample_exact_match"),
    }
    assert summary["kl"] == summary["sample_kl"] == 0


def test_task_metric_sees_the_examples_of_its_rows():
    seen = []

    def metric(predictions, examples):
        seen.append([e.id for e in examples])
        return {"n": len(predictions)}

    scorer = evaluator(task_metric=metric)
    summary = scorer.summarise(scorer.rows(policy(2), None, [6, 0]))
    assert seen == [["row 6", "row 0"]] * 2
    assert summary["n"] == summary["sample_n"] == 2


@pytest.mark.parametrize("batch_rows", [1, 3, 64])
def test_results_do_not_depend_on_the_batch(batch_rows):
    student, reference = policy(2), policy(3)
    expected = evaluator().rows(student, reference, range(7))
    got = evaluator(batch_rows=batch_rows).rows(student, reference, range(7))
    for one, other in zip(expected, got, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            exact = isinstance(value, str) or "tokens" in key
            assert other[key] == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-5))


def test_inputs_of_one_id_have_their_own_teachers_answers():
    same = [Example("same", e.student_input, e.teacher_inputs) for e in EXAMPLES]
    answers = evaluator().teacher_answers(same)
    assert answers == [evaluator().teacher_answers([example])[0] for example in EXAMPLES]
    assert len(set(answers)) > 1


def test_the_teacher_answers_each_input_once(monkeypatch):
    scorer, calls = evaluator(batch_rows=4), []
    answer = scorer.teacher.answer
    monkeypatch.setattr(scorer.teacher, "answer", lambda inputs, *r: calls.append(len(inputs)) or answer(inputs, *r))
    first = scorer.rows(policy(2), None, [0, 1, 2, 3, 4])
    assert calls == [4, 1]
    again = scorer.rows(policy(3), None, range(7))
    assert calls == [4, 1, 2]
    assert [row["teacher"] for row in again[:5]] == [row["teacher"] for row in first]


def test_another_seed_draws_other_samples_and_the_same_greedy_answers():
    one, other = (evaluator(seed=s).rows(policy(2), None, range(7)) for s in (0, 1))
    assert [row["student"] for row in one] == [row["student"] for row in other]
    assert [row["sample_student"] for row in one] != [row["sample_student"] for row in other]


def test_no_rows_no_error():
    scorer = evaluator(task_metric=exact_match)
    assert scorer.rows(policy(2), None, []) == []
    assert scorer.summarise([])["regret"] == 0


@pytest.mark.parametrize("twin", [True, False])
def test_match_compares_with_the_answer_of_the_teacher(twin):
    """A student that is the teacher matches it everywhere, though no answer is the input; one that copies does not."""
    examples = [Example(f"row {i}", f"copy : {i}", (f"copy : {i}",)) for i in range(4)]
    scorer = Evaluator(tiny_teacher(seed=1), tiny_tokenizer(), examples, max_input_tokens=16, max_new_tokens=5)
    student = Policy(EncoderDecoder(tiny_t5(tied=False, seed=1), VALID))
    if not twin:
        texts = iter([[e.student_input for e in examples]] * 2)
        scorer.texts = lambda ids, mask: next(texts)
    rows = scorer.rows(student, None, range(4))
    assert [row["match"] for row in rows] == [float(twin)] * 4
    assert not any(row["teacher"] in (row["input"], "") for row in rows)
