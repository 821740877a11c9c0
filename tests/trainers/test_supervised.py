"""Cross-entropy and divergences against full logits, the collator token by token, and learning by heart."""

import pytest
import torch
from torch.nn import functional as F

from rlkd.errors import ConfigError
from rlkd.evaluation.task_metrics import exact_match
from rlkd.objectives.divergences import DIVERGENCES
from rlkd.records import Example
from rlkd.trainers.arguments import SupervisedArguments
from rlkd.trainers.supervised import PseudoLabelCollator, SupervisedTrainer
from tiny import tiny_tokenizer
from tiny_runs import EOS, VALID, WORDS, examples, labels, logged, make, tiny_teacher, weights

TOKEN = {word: i for i, word in enumerate(WORDS)}


def collator(max_input_tokens=16, max_new_tokens=5):
    return PseudoLabelCollator(tiny_tokenizer(WORDS), max_input_tokens, max_new_tokens)


def rows_of(batch, name):
    pairs = zip(batch[f"{name}_ids"], batch[f"{name}_mask"], strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def test_labels_end_and_padding_is_masked():
    batch = collator()([{"student_input": "a b", "label": "c"}, {"student_input": "a", "label": "b c a"}])
    a, b, c = (TOKEN[w] for w in "abc")
    assert rows_of(batch, "input") == [[a, b, EOS], [a, EOS]]
    assert rows_of(batch, "answer") == [[c, EOS], [b, c, a, EOS]]
    assert batch["answer_ids"][0].tolist() == [c, EOS, 0, 0]
    assert set(batch) == {"examples", "input_ids", "input_mask", "answer_ids", "answer_mask"}


def test_exact_tokens_win_over_text_and_cut_answers_stay_cut():
    rows = [
        {"student_input": "a", "label": "other words", "token_ids": [5, 4, 3]},
        {"student_input": "a", "label": "b", "token_ids": [3] * 9},
        {"student_input": "a", "label": "b", "token_ids": [3, EOS]},
    ]
    assert rows_of(collator()(rows), "answer") == [[5, 4, 3], [3] * 5, [3, EOS]]


def test_a_long_text_label_is_cut():
    (answer,) = rows_of(collator(max_new_tokens=3)([{"student_input": "a", "label": "a b c a b"}]), "answer")
    assert len(answer) == 3


def test_ids_and_teacher_inputs_travel_along():
    batch = collator()([{"id": 7, "student_input": "a", "label": "b", "teacher_input": "copy : a"}])
    assert batch["examples"] == [Example("7", "a", ("copy : a",))]


def full_logits(model, prompt, answer):
    ids = tiny_tokenizer(WORDS)(prompt)["input_ids"]
    return model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[0, *answer[:-1]]])).logits[
        0, :, :VALID
    ]


def hand_divergence(objective, log_pi, log_p):
    pi, p = log_pi.exp(), log_p.exp()

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    return {
        "forward_kl": lambda: kl(p, pi),
        "reverse_kl": lambda: kl(pi, p),
        "jensen_shannon": lambda: 0.5 * kl(p, (p + pi) / 2) + 0.5 * kl(pi, (p + pi) / 2),
        "total_variation": lambda: (p - pi).abs().sum(-1) / 2,
        "skew_forward_kl": lambda: kl(p, 0.1 * p + 0.9 * pi),
        "skew_reverse_kl": lambda: kl(pi, 0.1 * pi + 0.9 * p),
        "alpha_beta": lambda: ((2 * p**0.9 + 7 * pi**0.9) / 9 - p**0.2 * pi**0.7).sum(-1) / 0.14,
        "best_token": lambda: -log_pi.gather(-1, p.argmax(-1, keepdim=True)).squeeze(-1),
    }[objective]()


OBJECTIVES = ["sequence", *DIVERGENCES]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_equal_full_logits(tmp_path, objective):
    trainer = make("supervised", tmp_path, objective=objective)
    batch = trainer.data_collator(labels())
    trainer.compute_loss(trainer.policy, batch).backward()
    got = [p.grad.clone() for p in trainer.policy.parameters()]
    loss = trainer.compute_loss(trainer.policy, batch).detach()
    trainer.policy.zero_grad()

    losses = []
    for row in labels():
        answer = tiny_tokenizer(WORDS)(row["label"])["input_ids"]
        student = full_logits(trainer.policy.student, row["student_input"], answer)
        if objective == "sequence":
            losses.append(F.cross_entropy(student, torch.tensor(answer), reduction="none"))
        else:
            with torch.no_grad():
                target = full_logits(trainer.teacher.lm.model, row["teacher_input"], answer).log_softmax(-1)
            losses.append(hand_divergence(objective, student.log_softmax(-1), target))
    expected = torch.cat(losses).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    for gradient, parameter in zip(got, trainer.policy.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_logged_loss_is_the_mean_over_the_tokens_of_the_update(tmp_path):
    """Micro-batches of unequal length: their means averaged would be another number."""
    trainer = make("supervised", tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1)
    expected = trainer.compute_loss(trainer.policy, trainer.data_collator(labels())).item()
    trainer.train()
    assert logged(tmp_path)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_eight_pairs_are_learnt_by_heart(tmp_path):
    trainer = make(
        "supervised", tmp_path, max_steps=300, learning_rate=1e-2, eval_examples=examples(), task_metric=exact_match,
        logging_steps=300,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_exact_match"] == 1.0


def test_training_a_teacher_on_gold_labels_needs_no_teacher(tmp_path):
    args = SupervisedArguments(
        output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, max_steps=2, save_strategy="no"
    )
    model = tiny_teacher().lm.model.requires_grad_()
    trainer = SupervisedTrainer(model, args, tokenizer=tiny_tokenizer(WORDS), train_dataset=labels())
    before = weights(model)
    trainer.train()
    assert any(not torch.equal(before[n], t) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match=r"evaluate\(\) needs eval_examples"):
        trainer.evaluate()
    args = SupervisedArguments(output_dir=str(tmp_path), use_cpu=True, objective="forward_kl")
    with pytest.raises(ConfigError, match="objective = 'forward_kl' needs a teacher"):
        SupervisedTrainer(model, args, tokenizer=tiny_tokenizer(WORDS), train_dataset=labels())


@pytest.mark.parametrize("scaled", [True, False])
def test_adafactor_reads_its_optim_args(tmp_path, scaled):
    """Adafactor's first step has RMS 1 before the learning rate; with scale_parameter, the weight's own RMS."""
    lr = 1e-2
    options = {"optim": "adafactor", "optim_args": "scale_parameter=True" if scaled else None, "learning_rate": lr}
    trainer = make("supervised", tmp_path, max_steps=1, warmup_steps=0, lr_scheduler_type="constant", **options)
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    before = trainer.policy.lm.model.get_parameter(name).detach().clone()
    trainer.train()
    step = trainer.policy.lm.model.get_parameter(name).detach() - before
    rms = step.square().mean().sqrt() / lr
    expected = before.square().mean().sqrt() if scaled else torch.tensor(1.0)
    torch.testing.assert_close(rms, expected, rtol=0.15, atol=0.0)
