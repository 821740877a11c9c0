"""`until_ready`: a warm-up that stops when regret no longer falls, resumes exactly, and says whether RL can start."""

import copy
import json
import logging
import math
import shutil
from dataclasses import replace

import datasets
import pytest
import torch

from rlkd.errors import ConfigError
from rlkd.io.provenance import attach
from rlkd.runs.checkpoints import checkpoints
from rlkd.sampling.rollouts import sample_rollouts
from rlkd.trainers.arguments import SupervisedArguments
from tiny_runs import EOS, assert_same, examples, labels, logged, make, tiny_teacher, weights

WARM_UP = {
    "until_ready": True, "lr_scheduler_type": "reduce_lr_on_plateau", "max_steps": 40, "learning_rate": 1e-2,
    **dict.fromkeys(("eval_strategy", "save_strategy"), "steps"), **dict.fromkeys(("eval_steps", "save_steps"), 1),
}  # fmt: skip
CLOCKS = ("time", "second", "runtime", "train_", "flos")


def warm_up(folder, regrets=None, **options):
    """A trainer; `regrets` are what its evaluations yield, in turn, the last one for ever."""
    trainer = make("supervised", folder, **{"eval_examples": examples(4), **WARM_UP, **options})
    if regrets is not None:
        trainer.evaluate_policy = lambda limit: []
        trainer.evaluator.summarise = lambda rows: {"regret": regrets[min(trainer.state.global_step, len(regrets)) - 1]}
    return trainer


def plan(regrets, rate, factor=0.3, patience=1, threshold=0.01, lowest=0.03):
    """The rate of every update, and the step of the best regret: written from the rule, by hand."""
    best, best_step, smallest, waited, rates = math.inf, 0, math.inf, 0, []
    current, floor = rate, lowest * rate
    for step, regret in enumerate(regrets, 1):
        rates.append(current)
        if regret < smallest:
            smallest, best_step = regret, step
        waited = 0 if regret < best * (1 - threshold) else waited + 1
        best = regret if waited == 0 else best
        if waited > patience:
            if current == floor:
                break
            waited, current = 0, max(factor * current, floor)
    return rates, best_step


SAW = [9.0, 5.0, 6.0, 4.98, 4.0, 4.1, 4.2, 3.0, 3.5, 2.99, 2.9, 3.0, 3.1, 2.5, 2.5, 2.6, 2.6, 2.4, *[2.39] * 12]


@pytest.mark.parametrize(
    ("regrets", "kwargs"),
    [(SAW, {}), ([3.0, *[4.0] * 20], {}), (SAW, {"patience": 2, "factor": 0.5, "min_lr": 2e-3})],
)
def test_the_rate_falls_when_regret_stops_and_the_run_ends_at_the_lowest(tmp_path, regrets, kwargs):
    trainer = warm_up(tmp_path, regrets, save_strategy="best", **({"lr_scheduler_kwargs": kwargs} if kwargs else {}))
    trainer.train()
    rule = {**{k: v for k, v in kwargs.items() if k != "min_lr"}, "lowest": kwargs.get("min_lr", 3e-4) / 1e-2}
    rates, best = plan(regrets, 1e-2, **rule)
    assert len(rates) < len(regrets)
    assert [line["learning_rate"] for line in logged(tmp_path) if "loss" in line] == pytest.approx(rates)
    assert trainer.state.global_step == len(rates)
    assert (trainer.state.best_global_step, trainer.last.best_step) == (best, best)
    assert trainer.warm_up.saturated


def outcome(trainer):
    lines = [{k: v for k, v in line.items() if not any(c in k for c in CLOCKS)} for line in logged(trainer.run_folder)]
    record = json.loads((trainer.run_folder / "run.json").read_text())
    return weights(trainer.policy), lines, record["readiness"]


@pytest.mark.slow
def test_a_warm_up_killed_twice_is_the_undisturbed_one(tmp_path):
    """Killed at the full rate, after it was lowered, and after its end; the evaluations are real."""
    whole = tmp_path / "whole"
    options = {"per_device_train_batch_size": 4, "n": 12}
    straight = warm_up(whole, **options)
    straight.train()
    expected, last = outcome(straight), straight.state.global_step
    rates = {line["step"]: line["learning_rate"] for line in logged(whole) if "loss" in line}
    assert last < 40
    assert len(set(rates.values())) == 4
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    for stop in (last // 3, next(step for step, rate in rates.items() if rate < 1e-2) + 1, last):
        for step, path in checkpoints(killed).items():
            if step > stop:
                shutil.rmtree(path)
        again = warm_up(killed, **options)
        again.train(resume_from_checkpoint="auto")
        found = outcome(again)
        assert_same(expected[0], found[0])
        assert expected[1:] == found[1:]


def by_hand(trainer, model, rows):
    """Regret and the price of an early end of sampled answers, from full logits, row by row."""
    answers = sample_rollouts(
        trainer.policy, trainer.tokenizer, rows, rollouts_per_prompt=1, max_input_tokens=512, max_new_tokens=5,
        seed=(trainer.args.seed, "start"),
    )  # fmt: skip
    regrets, gaps = [], []
    for i, row in enumerate(rows):
        answer = answers.answer_ids[i, answers.answer_mask[i]].tolist()
        prompt = torch.tensor([trainer.tokenizer(row.teacher_inputs[0])["input_ids"]])
        with torch.no_grad():
            out = model(input_ids=prompt, decoder_input_ids=torch.tensor([[0, *answer[:-1]]]))
        q = out.logits[0, :, : trainer.policy.lm.valid_vocab]
        regrets.append(sum(float(q[t].max() - q[t, a]) for t, a in enumerate(answer)))
        gaps += [float(q[t].max() - q[t, EOS]) for t, a in enumerate(answer) if a != EOS]
    return {"start_regret": sum(regrets) / len(rows), "start_eos_price": sum(gaps) / len(gaps)}


def test_at_its_upper_bound_it_warns_and_measures_the_best_student(tmp_path, caplog):
    rows = examples(5)
    trainer = warm_up(
        tmp_path, [9.0, 5.0, 6.0], eval_examples=rows, eval_limit=3, per_device_eval_batch_size=2, max_steps=3
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert_same(weights(trainer.policy), policy_of(trainer, tmp_path / "checkpoint-2"))
    expected = by_hand(trainer, trainer.teacher.lm.model, rows[:3])
    (line,) = [line for line in logged(tmp_path) if "start_regret" in line]
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    readiness = json.loads((tmp_path / "run.json").read_text())["readiness"]
    assert (readiness["ready"], readiness["saturated"], readiness["step"]) == (False, False, 2)
    assert {name: readiness[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert "not ready for RL: held-out regret was still falling at step 3, the upper bound" in caplog.text
    # The bound may be raised: the schedule does not depend on it.
    longer = warm_up(tmp_path, [9.0, 5.0, 6.0, 5.0], eval_examples=rows, eval_limit=3, per_device_eval_batch_size=2)
    longer.train(resume_from_checkpoint="auto")
    assert longer.warm_up.saturated


def policy_of(trainer, folder):
    twin = copy.deepcopy(trainer.policy)
    twin.load(folder)
    return weights(twin)


def test_a_student_that_answers_as_its_teacher_is_ready(tmp_path, capsys, caplog):
    teacher = tiny_teacher()
    twin = copy.deepcopy(teacher.lm.model).requires_grad_()
    with torch.no_grad():
        twin.lm_head.weight.mul_(50)
    rows = [replace(e, student_input=e.teacher_inputs[0]) for e in examples(4)]
    options = {"eval_examples": rows, "learning_rate": 1e-9, "save_strategy": "best"}
    trainer = warm_up(tmp_path, model=twin, teacher=teacher, **options)
    trainer.announcement.whole_job = True
    trainer.train()
    # Best at once, then twice patience for each of the four rates.
    assert trainer.state.global_step == 9
    assert trainer.warm_up.ready
    assert not trainer.warm_up.start.weak
    assert "ready for RL: regret 0.0 nats" in capsys.readouterr().out
    assert "not ready" not in caplog.text
    assert json.loads((tmp_path / "run.json").read_text())["readiness"]["ready"]


def test_a_saturated_weak_student_is_not_ready(tmp_path, caplog):
    trainer = warm_up(tmp_path, [9.0], learning_rate=1e-9, save_strategy="best")
    trainer.train()
    assert trainer.warm_up.start.weak
    assert trainer.warm_up.saturated
    assert not trainer.warm_up.ready
    assert "not ready for RL: a weak start, and held-out regret has stopped falling" in caplog.text


@pytest.mark.parametrize(
    ("strategies", "said"),
    [(["sample"], "decoded with strategy sample"), (["greedy", "beam"], "strategy beam"), (["greedy", "rank"], None)],
)
def test_labels_that_the_reward_does_not_want_are_said(tmp_path, caplog, strategies, said):
    rows = datasets.Dataset.from_list([{**row, "generation": "x"} for row in labels()])
    origin = {"folder": "f", "dataset": None, "vocabulary": None, "generation": "x"}
    attach(rows, [{**origin, "settings": {"strategy": name}} for name in strategies])
    with caplog.at_level(logging.INFO):
        warm_up(tmp_path, [1.0], data=rows, max_steps=1).train()
    assert ("pays for the teacher's greedy answers" in caplog.text) == (said is not None)
    assert said is None or said in caplog.text
    assert "how the labels were decoded is not recorded" not in caplog.text


def test_labels_without_origin_are_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        warm_up(tmp_path, [1.0], max_steps=1).train()
    assert "how the labels were decoded is not recorded" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_strategy": "no"}, r"^eval_strategy = 'no': until_ready watches held-out regret: set it to steps or"),
        ({"save_strategy": "no"}, r"^save_strategy = 'no': until_ready keeps the best checkpoint: set it to steps, as"),
        ({"save_steps": 3}, r"^save_steps = 3: load_best_model_at_end"),
        ({"lr_scheduler_type": "cosine"}, r"^lr_scheduler_type = 'cosine': until_ready lowers the rate"),
        ({"warmup_steps": 5}, r"^warmup_steps = 5: until_ready starts at the full learning_rate"),
        ({"early_stopping_patience": 2}, r"^early_stopping_patience = 2: until_ready stops by itself"),
        ({"metric_for_best_model": "match"}, r"^metric_for_best_model = 'match': until_ready takes regret"),
        ({"greater_is_better": True}, r"^greater_is_better = True: until_ready watches regret"),
        ({"lr_scheduler_kwargs": {"cooldown": 2}}, r"^lr_scheduler_kwargs = {'cooldown': 2}: until_ready takes factor"),
        ({"lr_scheduler_kwargs": {"factor": 1.0}}, r"^lr_scheduler_kwargs = {'factor': 1.0}: until_ready takes factor"),
    ],
)  # fmt: skip
def test_settings_that_contradict_it_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        SupervisedArguments(output_dir=str(tmp_path), use_cpu=True, **{**WARM_UP, **options})


def test_it_needs_held_out_inputs(tmp_path):
    with pytest.raises(ConfigError, match="there are no held-out rows"):
        warm_up(tmp_path, eval_examples=None)


def test_what_it_implies(tmp_path):
    given = {"output_dir": str(tmp_path), "use_cpu": True, **WARM_UP, "lr_scheduler_type": "linear"}
    args = SupervisedArguments(**given, metric_for_best_model="eval_sample_regret")
    assert (args.load_best_model_at_end, args.greater_is_better) == (True, False)
    assert args.lr_scheduler_type == "reduce_lr_on_plateau"
    assert args.lr_scheduler_kwargs["min_lr"] == pytest.approx(3e-4)
    again = replace(args)
    assert again.lr_scheduler_kwargs == args.lr_scheduler_kwargs
