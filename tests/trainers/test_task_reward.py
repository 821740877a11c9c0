"""A task's score beside the teacher's reward: its gradient by enumeration, what is logged, and what is refused."""

import math
from dataclasses import replace
from itertools import combinations_with_replacement, product

import pytest
import torch
from test_losses import full_logits, perturb, prompt_ids

from rlkd.errors import ConfigError, DataError
from rlkd.evaluation.task_reward import TaskReward
from rlkd.inspection.saved import from_run
from rlkd.objectives.advantages import sequence_credit
from rlkd.records import Answers, Example
from rlkd.trainers.arguments import PPOArguments, ReinforceArguments
from tiny_runs import EOS, VALID, WORDS, assert_same, differ, examples, logged, make, student, weights

LETTERS = "test_task_reward:letters"


def letters(answers, rows):
    """Distinct words, and half a point for every word c of the input: no sum over tokens."""
    return [len(set(a.split())) ** 2 + 0.5 * r.student_input.count("c") for a, r in zip(answers, rows, strict=True)]


def one_short(answers, rows):
    return [0.0] * (len(answers) - 1)


def fails_on_row_2(answers, rows):
    if any(row.id == "row 2" for row in rows):
        raise KeyError("no such thing")
    return [0.0] * len(answers)


def fails_on_two(answers, rows):
    return [1 / (len(answers) == 1)] * len(answers)


def infinite(answers, rows):
    return [math.inf if row.id == "row 1" else 0.0 for row in rows]


def test_the_credit_of_a_score_by_hand():
    scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    assert sequence_credit(scores, 3).tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="k >= 2 rollouts"):
        sequence_credit(scores, 1)


def expected_gradient(trainer, behaviour):
    """Of the loss, over every pair of answers of at most two tokens to one prompt, drawn by `behaviour`."""
    words = [a for a in range(VALID) if a != EOS]
    every = [(EOS,), *product(words, range(VALID))]
    example = Example("x", "a b c", ("copy : a b",))
    prompt = prompt_ids(example.student_input)
    chance = torch.stack([sequence_logp(behaviour, prompt, y) for y in every]).detach().exp()
    assert float(chance.sum()) == pytest.approx(1.0, abs=1e-5)
    pairs = torch.tensor(list(combinations_with_replacement(range(len(every)), 2)))
    rows = pairs.flatten()
    ids = torch.tensor([[*y, 0][:2] for y in every])[rows]
    mask = torch.tensor([[True, len(y) == 2] for y in every])[rows]
    inputs = torch.tensor([prompt] * len(rows))
    given = (inputs, torch.ones_like(inputs).bool(), ids, mask)
    with torch.no_grad():
        (mu, _), _ = trainer.behaviour(*given)
    finished = torch.tensor([y[-1] == EOS for y in every])[rows]
    minibatch = trainer.annotate(Answers([example] * len(rows), *given, mu, finished))
    # The loss is linear in the credit: each row's is weighted by the probability of its pair, halved for two rows.
    orders = 1.0 + (pairs[:, 0] != pairs[:, 1])
    share = (orders * chance[pairs].prod(1) / 2).repeat_interleave(2)[:, None]
    credit = minibatch.annotations
    scaled = {name: share * getattr(credit, name) for name in ("advantages", "rewards")}
    if credit.task_credit is not None:
        scaled["task_credit"] = share * credit.task_credit
    trainer.current_gradient_accumulation_steps = 1
    trainer.policy.zero_grad()
    weighted = replace(minibatch, annotations=replace(credit, **scaled), denominator=1.0)
    trainer.compute_loss(trainer.policy, {"minibatch": weighted}).backward()
    return torch.cat([p.grad.flatten() for p in trainer.policy.parameters()]), every, example


def sequence_logp(model, prompt, answer):
    return full_logits(model, prompt, list(answer))[0].log_softmax(-1)[range(len(answer)), list(answer)].sum()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(
            "ppo", {"baseline": "leave_one_out", "minibatches_per_rollout": 1, "lam": 0.0}, marks=pytest.mark.slow
        ),
        ("reinforce", {"sync_every": 2, "importance_cap": 1e9, "lam": 0.3}),
    ],
    ids=["PPO, first update", "REINFORCE, stale"],
)
def test_the_expected_gradient_is_that_of_the_expected_score(tmp_path, kind, options):
    """With the task reward less without: coef * grad E_pi[R], whatever lam is, and under a stale behaviour policy."""
    gradients = []
    for more in ({"task_reward": LETTERS, "task_reward_coef": 0.7}, {}):
        trainer = make(
            kind, tmp_path / str(len(more)), max_new_tokens=2, loss_reduction="sequence_sum", one_step="sampled",
            kl_coef=0.0, **options, **more,
        )  # fmt: skip
        if "sync_every" in options:
            perturb(trainer.policy, 0.3)
        gradient, every, example = expected_gradient(trainer, student())
        gradients.append(gradient)
    scores = [
        0.7 * score
        for score in letters([" ".join(WORDS[a] for a in y if a > 2) for y in every], [example] * len(every))
    ]
    prompt = prompt_ids(example.student_input)
    trainer.policy.zero_grad()
    chance = torch.stack([sequence_logp(trainer.policy.student, prompt, y) for y in every]).exp()
    (-(chance * torch.tensor(scores)).sum()).backward()
    truth = torch.cat([p.grad.flatten() for p in trainer.policy.parameters()])
    assert float(truth.abs().max()) > 1e-3
    torch.testing.assert_close(gradients[0] - gradients[1], truth, rtol=0, atol=5e-4 * float(truth.abs().max()))


@pytest.mark.parametrize("kind", ["ppo", "reinforce"])
def test_a_coefficient_of_0_only_logs(tmp_path, kind):
    options = {"max_steps": 4, "baseline": "leave_one_out", "lam": 0.7}
    runs = [
        make(kind, tmp_path / str(i), **options, **more)
        for i, more in enumerate([{}, {"task_reward": LETTERS, "task_reward_coef": 0.0}, {"task_reward": LETTERS}])
    ]
    for run in runs:
        run.train()
    assert_same(weights(runs[0].policy), weights(runs[1].policy))
    assert differ(weights(runs[0].policy), weights(runs[2].policy))
    assert "task_reward" not in logged(tmp_path / "0")[0]


def test_the_mean_score_is_logged_and_whitening_keeps_its_share(tmp_path):
    options = {"task_reward": LETTERS, "task_reward_coef": 2.0, "one_step": "exact", "lam": 0.7}
    trainer = make("reinforce", tmp_path / "a", **options, max_steps=1)
    answers = trainer.sample(0)
    scores = trainer.evidence(answers).task_scores
    by_hand = letters([" ".join(WORDS[t] for t in ids[m].tolist() if t > 2) for ids, m in
                       zip(answers.answer_ids, answers.answer_mask, strict=True)], answers.examples)  # fmt: skip
    assert scores.tolist() == pytest.approx(by_hand)
    assert len(set(by_hand)) > 2
    plain = trainer.annotate(answers).annotations
    white = make("reinforce", tmp_path / "b", **options, whiten_advantages=True).annotate(answers).annotations
    mask = answers.answer_mask
    assert white.scale != pytest.approx(1.0, abs=0.1)
    centred = (plain.advantages - plain.advantages[mask].mean()) * mask
    torch.testing.assert_close(white.advantages, white.scale * centred)
    torch.testing.assert_close(white.task_credit, white.scale * plain.task_credit)
    pair = scores.view(-1, 2)
    torch.testing.assert_close(plain.task_credit.view(-1, 2), 2.0 * (pair - pair.flip(1)))
    trainer.train()
    assert logged(tmp_path / "a")[0]["task_reward"] == pytest.approx(sum(by_hand) / len(by_hand))


def test_views_show_the_score_of_a_rollout(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_examples": examples(2), "max_steps": 1}
    make("reinforce", tmp_path, task_reward="rouge1", **options).train()
    found = {sample.source: sample.facts for sample in from_run(tmp_path).samples}
    assert "task_reward" in found["rollout"]
    assert "task_reward" not in found["student"]


@pytest.mark.parametrize("name", ["rouge1", "exact_match"])
def test_metrics_by_name_are_those_of_the_task_metric(name):
    rows = [Example("1", "x", ("x",), ("a b", "c")), Example("2", "x", ("x",), ("a",))]
    expected = {"rouge1": [100.0, 100 * 2 / 3], "exact_match": [1.0, 0.0]}[name]
    assert TaskReward.of(name)(["c", "a b"], rows) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_reward": "bleu"}, r"^task_reward = 'bleu': a score of a whole corpus .* Use rougeL"),
        ({"task_reward": "rougel"}, r"^task_reward = 'rougel': allowed are .* Did you mean 'rougeL'\?"),
        ({"task_reward": "a b:c"}, r"^task_reward = 'a b:c': allowed are"),
        ({"task_reward": "rougeL", "rollouts_per_prompt": 1}, r"^rollouts_per_prompt = 1: task_reward compares"),
        ({"task_reward_coef": 0.5}, r"^task_reward_coef = 0.5: weighs nothing: name a task_reward"),
        ({"task_reward": "rougeL", "task_reward_coef": -1.0}, r"^task_reward_coef = -1.0: must be at least 0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [PPOArguments, ReinforceArguments])
def test_settings_are_refused(tmp_path, kind, options, message):
    options = {"rollouts_per_prompt": 2, "baseline": "teacher", **options}
    with pytest.raises(ConfigError, match=message):
        kind(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("no_such_module:f", ConfigError, r"cannot import no_such_module \(ModuleNotFoundError"),
        ("test_task_reward:letter", ConfigError, r"has no function letter. Did you mean 'letters'\?"),
        ("test_task_reward:one_short", ConfigError, r"returned 7 numbers for 8 answers"),
        ("test_task_reward:fails_on_row_2", DataError, r"fails on row row 2, answer 'c a a' \(KeyError: "),
        ("test_task_reward:fails_on_two", DataError, r"fails \(ZeroDivisionError"),
        ("test_task_reward:infinite", DataError, r"gives inf for row row 1, answer 'b a'"),
    ],
)  # fmt: skip
def test_functions_that_cannot_score_are_refused_before_training(tmp_path, name, error, message):
    with pytest.raises(error, match=rf"^task_reward = '{name}'.*{message}"):
        make("reinforce", tmp_path, task_reward=name)
    assert list(tmp_path.iterdir()) == []


def test_a_function_is_found_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_scores_of_this_folder.py").write_text(
        "def f(answers, examples):\n    return [1.0] * len(answers)\n"
    )
    assert TaskReward.of("my_scores_of_this_folder:f")(["a"], examples(1)) == [1.0]


def test_references_are_needed_by_those_that_compare(tmp_path):
    rows = [*examples(7), replace(examples(8)[7], references=())]
    with pytest.raises(DataError, match=r"'exact_match': 1 of 8 training rows have no reference \(first: row 7\)"):
        make("reinforce", tmp_path, task_reward="exact_match", data=rows)
    make("reinforce", tmp_path, task_reward=LETTERS, data=rows)


def test_a_row_that_fails_in_training_is_named(tmp_path):
    trainer = make("reinforce", tmp_path, task_reward=LETTERS)
    trainer.task_reward = replace(trainer.task_reward, function=fails_on_row_2)
    with pytest.raises(DataError, match="fails on row row 2"):
        trainer.train()
