"""Alarms: each fires on what it is for, once per episode, and stays silent on healthy runs."""

import copy
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch
from test_tkd import make as make_tkd
from test_tkd import rows as labelled_rows

from rlkd.errors import DivergenceError
from rlkd.evaluation.task_metrics import exact_match
from rlkd.metrics import METRICS
from rlkd.runs.alarms import ALARMS, SETTING, Alarm
from rlkd.runs.files import ALARMS_FILE
from rlkd.runs.guards import CALM, Watch
from rlkd.runs.measures import History, Reading
from rlkd.runs.paired import KEY, BestRows
from rlkd.trainers.arguments import ReinforceArguments
from tiny_runs import examples, logged, make, tiny_teacher

DOCS = Path(__file__).parents[2] / "docs" / "guards.md"


def stream(**columns):
    """Records from columns of numbers; None leaves a name out of its line."""
    lines = zip(*columns.values(), strict=True)
    return [{k: v for k, v in zip(columns, line, strict=True) if v is not None} for line in lines]


def fired(records):
    """(line, alarm) of everything that fires."""
    watch = Watch()
    return [(i, alarm.name) for i, record in enumerate(records) for alarm, _ in watch.add(record)]


# Runs of recipes/studies/quora_agnews.py: lam 0.3, 0.7, 0.9 on validation rows (first seed, second run), and PPO with
# lam 0.3 in the first run. What was logged every 10 steps, to three digits.
START = {"start_length": 7.94, "start_finish_rate": 0.938}
STUDY = {
    "lam 0.3": [
        START,
        *stream(
            regret=[18.4, 14.5, 18.4, 19.7, 21.6],
            length=[7.7, 7.88, 9.53, 10.4, 10.4],
            finish_rate=[0.991, 0.956, 0.822, 0.741, 0.722],
            kl=[0.117, 0.798, 1.47, 1.79, 1.73],
            grad_norm=[2.39, 1.9, 2.25, 1.45, 1.69],
        ),
    ],
    "lam 0.7": [
        START,
        *stream(
            regret=[20.7, 11.3, 11, 9.6, 10.7, 9.86, 8.98],
            length=[7.71, 6.5, 6.47, 6.41, 6.76, 6.24, 6.19],
            finish_rate=[0.975, 1, 1, 0.997, 0.994, 0.997, 1],
            entropy=[2.15, 1.32, 1.05, 0.918, 0.912, 0.882, 0.88],
            kl=[0.0737, 0.344, 0.554, 0.553, 0.591, 0.573, 0.627],
            grad_norm=[5.43, 4.65, 5.57, 5.33, 6.19, 3.02, 2.74],
        ),
    ],
    "lam 0.9": [
        START,
        *stream(
            regret=[20, 12.3, 10.4, 8.99, 10.1, 9.06, 8.33, 7.94, 7.28],
            length=[7.37, 6.02, 5.59, 5.62, 5.59, 5.35, 5.21, 5.21, 5.02],
            finish_rate=[0.984, 1, 1, 1, 1, 1, 1, 1, 1],
            kl=[0.0561, 0.301, 0.44, 0.529, 0.591, 0.584, 0.645, 0.62, 0.643],
        ),
    ],
    "PPO": [
        {"start_length": 8.02, "start_finish_rate": 0.969},
        *stream(
            regret=[18.7, 21.7, 18.1, 23.1, 24.6, 32.7, 26.9, 30.7, 33.3, 29.8, 34],
            length=[7.68, 9.76, 9.52, 10.5, 11.3, 13.4, 11.8, 14.4, 14.2, 11.8, 14.4],
            finish_rate=[0.984, 0.898, 0.859, 0.734, 0.625, 0.438, 0.51, 0.328, 0.339, 0.484, 0.328],
            entropy=[1.83, 1.13, 0.863, 0.699, 0.605, 0.44, 0.358, 0.317, 0.236, 0.246, 0.237],
            teacher_entropy=[2.29, 2.6, 3, 3, 3.01, 3, 3.02, 3.2, 3.53, 3.5, 3.53],
            kl=[0.135, 0.881, 1.48, 1.9, 1.99, 2.46, 2.76, 3, 2.97, 3, 3.09],
            clip_fraction=[0.171, 0.15, 0.0869, 0.0964, 0.0464, 0.0611, 0.0461, 0.049, 0.024, 0.0394, 0.00607],
            value_loss=[15.9, 10.2, 6.57, 6.6, 4.58, 5.29, 3.74, 2.97, 2.5, 3.93, 3.11],
            explained_variance=[-0.002, -0.004, 0.03, 0.07, 0.12, 0.16, 0.26, 0.26, 0.33, 0.32, 0.31],
        ),
    ],
}


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("lam 0.3", {"run_on", "finish_rate_drop", "kl_runaway"}),
        ("lam 0.7", set()),
        ("lam 0.9", {"length_collapse"}),
        ("PPO", {"run_on", "finish_rate_drop", "kl_runaway", "entropy_collapse", "objective_rising"}),
    ],
)
def test_runs_of_the_study_raise_the_alarms_its_readme_describes(run, expected):
    names = [name for _, name in fired(STUDY[run])]
    assert sorted(names) == sorted(expected)


STREAMS = {
    "length_collapse": (
        [{"start_length": 8.0}, *stream(length=[8, 6, 5, 5])],
        [{"start_length": 8.0}, *stream(length=[8, 7, 6, 6])],
    ),
    "run_on": (stream(length=[8, 9, 10, 11]), stream(length=[8, 9, 9, 9])),
    "finish_rate_drop": (
        stream(finish_rate=[1.0, 0.9, 0.85, 0.8]),
        [{"start_finish_rate": 0.9}, *stream(finish_rate=[0.8, 0.9, 0.85, 0.86])],
    ),
    "entropy_collapse": (
        stream(entropy=[1.0, 0.1, 0.1, 0.1], teacher_entropy=[2.0] * 4),
        stream(entropy=[1.0, 0.001, 0.001, 0.001], teacher_entropy=[0.004] * 4),  # a sharp teacher
    ),
    "kl_runaway": (stream(kl=[0.1, 1.0, 1.5, 2]), stream(kl=[0.1, 0.2, 2.5, 0.2, 0.2])),
    "kl_negative": (stream(kl=[-0.2] * 3), stream(kl=[-0.05] * 6)),
    "value_loss_explosion": (
        stream(value_loss=[3, 2, 2, 1, 1, 1, 30, 40, 50]),
        stream(value_loss=[60, 30, 9, 3, 1, 1, 30, 1, 1, 8]),
    ),
    "critic_misled": (
        stream(explained_variance=[0.9] * 5, value_gain=[-3.0] * 5),  # right but for a constant
        stream(explained_variance=[-0.5] * 6, value_gain=[-0.5, 0, 0.1, 0.2, 0.3, 0.4]),
    ),
    "clip_saturated": (stream(clip_fraction=[0.2, 0.4, 0.5]), stream(clip_fraction=[0.1, 0.6, 0.1, 0.1])),
    "few_effective_samples": (
        stream(effective_sample_size=[0.9, 0.2, 0.1, 0.1]),
        stream(effective_sample_size=[1.0, 0.1, 0.4, 0.1, 0.9]),  # the mean of three lines counts
    ),
    "gradient_spikes": (
        stream(grad_norm=[1, 2, 1, 2, 1, 12, 1, 15]),
        stream(grad_norm=[1, 2, 1, 2, 1, 12, 1, 2, 20, 1, 1]),  # single spikes do not count
    ),
    "objective_rising": (
        stream(loss=[3, 2, 1, 1, 1, 1, 1, 2, 3, 3, 3]),
        stream(loss=[0.7, 1e-3, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 3e-3, 1e-2, 1e-3, 1e-3]),
    ),
    "held_out_worse": (
        stream(
            regret=[5, 4, 3, 2, 1],
            eval_regret=[None, 3, 2, 3, 3],
            eval_bleu=[None, 10, 12, 12, 12],
            eval_seconds=[None, 1, 1, 1, 1],
        ),
        stream(
            regret=[5, 4, 3, 2, 1],
            eval_regret=[None, 3, 2, 2.3, 1.9],
            eval_bleu=[None, 10, 12, 12, 11.5],
            eval_length=[None, 9, 9, 1, 1],
            eval_seconds=[None, 4, 2, 2, 2],
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALARMS)
def test_each_alarm_alone(name):
    alarm, (bad, healthy) = ALARMS[name], STREAMS[name]
    for records, expected in ((bad, True), (healthy, False)):
        history, crossed = History(), []
        for record in records:
            history.add(record)
            reading = alarm.measure(history)
            crossed.append(reading is not None and alarm.crossed(reading))
        assert any(crossed) is expected
        if expected:
            assert not crossed[0]
            assert re.search(r"\d", reading.text)
    assert name in {fired_name for _, fired_name in fired(bad)}
    assert name not in {fired_name for _, fired_name in fired(healthy)}


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        # A task metric that falls while regret improves: reward hacking.
        (stream(regret=[5, 4, 3, 2, 1], eval_bleu=[10, 11, 12, 9, 8], eval_seconds=[1] * 5), True),
        # TKD: cross-entropy falls, and so does the dev score; its loss jumps when the tree joins.
        (stream(ce=[3, 2, 1, 0.5], loss=[3, 2, 9, 9], eval_accuracy=[0.9, 0.9, 0.8, 0.7], eval_runtime=[1] * 4), True),
        (stream(ce=[3, 2, 1, 0.5], loss=[3, 2, 9, 9], eval_accuracy=[0.8, 0.9, 0.9, 0.9], eval_runtime=[1] * 4), False),
        # Everything gets worse together: `objective_rising` reports that.
        (stream(regret=[1, 2, 3, 4, 5], eval_regret=[1, 2, 3, 4, 5], eval_seconds=[1] * 5), False),
    ],
)  # fmt: skip
def test_held_out_scores_that_fall_while_training_improves(records, expected):
    assert ("held_out_worse" in {name for _, name in fired(records)}) is expected


# Evaluations of n rows, compared row by row


def evaluations(quality, n, seed, scores=("exact_match", "sample_exact_match", "regret")):
    """Whether held_out_worse fires over evaluations of n rows, drawn anew with the quality (0 to 1) of its turn."""
    draw, best, watch = random.Random(seed), BestRows(), Watch()
    for k, q in enumerate(quality):
        rows = {
            name: [
                draw.expovariate(1 / (7 - 6 * q)) if name == "regret" else float(draw.random() < q) for _ in range(n)
            ]
            for name in scores
        }
        means = {f"eval_{name}": mean(values) for name, values in rows.items()}
        watch.add({"regret": 10 - k / 10})
        fired = watch.add({**means, "eval_seconds": 1.0, KEY: best.compare(means, rows)})
        if "held_out_worse" in {alarm.name for alarm, _ in fired}:
            return fired[0][1]
    return None


@pytest.mark.parametrize(
    "quality", [[0.3] * 15, [0.8] * 15, [0.05] * 15, [min(0.05 + 0.12 * k, 0.9) for k in range(12)]]
)
def test_noise_and_fast_improvement_are_no_loss(quality):
    assert sum(evaluations(quality, 40, seed) is not None for seed in range(40)) <= 2


@pytest.mark.parametrize("n", [40, 200])
def test_a_loss_beyond_noise_is_told_with_its_interval(n):
    quality = [0.3, 0.6, 0.9, 0.9, 0.8, 0.7, 0.55, 0.4, 0.3, 0.3]
    for seed in range(10):
        found = evaluations(quality, n, seed, ("exact_match",))
        low, high, rows = map(float, re.search(r"row by row worse by (\S+) to (\S+), (\d+) rows", found.text).groups())
        assert 0 < low < high <= 1.2
        assert rows == n
        assert found.value > 0.1


def test_an_evaluation_is_the_reading_and_not_a_mean_of_two():
    records = stream(regret=[5, 4, 3, 2], eval_bleu=[20, 30, 18, 17], eval_seconds=[1] * 4)
    history = History()
    for record in records:
        history.add(record)
    assert "eval_bleu is 17, its best was 30" in ALARMS["held_out_worse"].measure(history).text


@pytest.mark.parametrize("kind", ["reinforce", "supervised", "tkd"])
def test_trainers_compare_rows_and_resumed_runs_have_the_same_alarms(tmp_path, kind):
    """The rows of the best evaluation are in the checkpoint, and what was compared in the history."""
    options = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}

    def build(folder):
        if kind == "tkd":
            trainer = make_tkd(folder, preset="kd", dev=labelled_rows(40, seed=9), learning_rate=1e-5, **options)
        else:
            trainer = make(kind, folder, eval_examples=examples(40), task_metric=exact_match, **options)
        score = "accuracy" if kind == "tkd" else "exact_match"
        compare, observe = trainer.alarms.compare, trainer.alarms.observe

        def improving(logs):
            if "loss" in logs:
                names = ("regret", "ce", "kd", "loss")
                logs.update({name: 10 - trainer.state.global_step / 10 for name in names if name in logs})
            observe(logs)

        def worse(logs, rows):  # 90 % right until step 2, then less and less
            right = 36 if trainer.state.global_step <= 2 else 16 - trainer.state.global_step
            logs[f"eval_{score}"] = right / 40
            compare(logs, {score: [float(i < right) for i in range(40)]})

        trainer.alarms.compare, trainer.alarms.observe = worse, improving
        return trainer

    straight, cut = build(tmp_path / "straight"), build(tmp_path / "cut")
    straight.train()
    assert ("kl_coef" in ALARMS["held_out_worse"].advice_for(straight.args)) == (kind == "reinforce")
    cut.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    lines = [alarms_of(tmp_path / run) for run in ("straight", "cut")]
    told = [[line for line in run if line["alarm"] == "held_out_worse"] for run in lines]
    assert [line["step"] for line in told[0]] == [6]
    assert told[0][0]["message"] == told[1][0]["message"]
    assert "40 rows" in told[0][0]["message"]
    assert not any(KEY in line for line in logged(tmp_path / "straight"))


def test_advice_names_settings_that_exist():
    args = {kind: make(kind, Path("unused")).args for kind in ("ppo", "reinforce", "supervised")}
    for alarm in ALARMS.values():
        for remedy in alarm.advice:
            assert any(all(hasattr(a, name) for name in SETTING.findall(remedy)) for a in args.values()), remedy
        for a in args.values():
            told = (
                alarm.advice_for(a) if alarm.name in ("held_out_worse", "objective_rising", "gradient_spikes") else ""
            )
            assert all(hasattr(a, name) for name in SETTING.findall(told)), told
    assert ALARMS["held_out_worse"].advice_for(args["supervised"]) == (
        "Keep the best checkpoint (load_best_model_at_end, early_stopping_patience) or use more data."
    )


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([-1, -2, -5, -5, -5, -5, -5, -5, -2, -1, 0, 0], True),
        ([1, 0.5, -1, -2, -2, -2, -2, -2, -0.5, 1, 1, 1], True),  # through 0
        ([-1, -2, -3, -4, -5, -6, -6, -6, -6, -6, -6, -6], False),
        ([-5, -4.8, -5.2, -5, -5.1, -4.9, -5, -5, -4.9, -5.1], False),
        ([0.1, -0.2, 0.3, -0.1, 0.2, -0.3, 0.1, -0.2, 0.3, 0.1, 0.2, -0.1], False),  # noise around 0
        ([0.0] * 12, False),
    ],
)
def test_losses_below_0_may_not_rise_either(losses, expected):
    assert ("objective_rising" in {name for _, name in fired([{"loss": x} for x in losses])}) is expected


@pytest.mark.parametrize("name", ["regret", "ce", "kd", "loss"])
def test_what_training_lowers_may_not_rise(name):
    rising = [3.0, 2, 1, 1, 1, 1, 1, 2, 3, 3, 3]
    assert "objective_rising" in {found for _, found in fired([{name: value} for value in rising])}
    # The loss of RL alone is not informative, and TKD's grows when terms join.
    falling = sorted(rising, reverse=True)
    records = stream(**{name: falling, "loss": rising}) if name != "loss" else stream(loss=falling)
    assert fired(records) == []


def test_an_alarm_fires_once_per_episode():
    bad, good = {"kl": 5.0}, {"kl": 0.0}
    assert fired([bad] * 20) == [(2, "kl_runaway")]
    # Three means inside the threshold end the episode; fewer do not.
    ends = [bad] * 3 + [good] * (3 + CALM) + [bad] * 3
    assert [name for _, name in fired(ends)] == ["kl_runaway"] * 2
    holds = [bad] * 3 + [good] * 4 + [bad] * 3
    assert [name for _, name in fired(holds)] == ["kl_runaway"]


def test_numbers_that_are_not_finite_are_ignored():
    records = [{"kl": value} for value in (float("nan"), float("inf"), 0.1, 0.1, 0.1)]
    assert fired(records) == []


def alarms_of(folder):
    path = folder / ALARMS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def twin():
    """A student that equals its teacher and reads what it reads."""
    teacher = tiny_teacher()
    data = [replace(e, student_input=e.teacher_inputs[0]) for e in examples(32)]
    return {"model": copy.deepcopy(teacher.lm.model).requires_grad_(), "teacher": teacher, "data": data}


BATCH = {"per_device_train_batch_size": 16, "weak_start": "warn", "n": 16}
SHORTER = {**BATCH, "reward_value": "lse", "lam": 1.0, "learning_rate": 3e-2, "kl_coef": 0.01, "max_steps": 12}


@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
def test_a_healthy_run_raises_none(tmp_path, kind):
    options = {
        **BATCH,
        "learning_rate": 1e-3,
        "max_steps": 24,
        "eval_strategy": "steps",
        "eval_steps": 8,
        "logging_steps": 4,
    }
    start = twin()
    make(kind, tmp_path, eval_examples=start["data"], **{**options, **start}).train()
    assert alarms_of(tmp_path) == []
    assert {line["alarms"] for line in logged(tmp_path) if "loss" in line} == {0}


def test_a_healthy_supervised_run_raises_none(tmp_path):
    options = {"max_steps": 20, "eval_strategy": "steps", "eval_steps": 5, "eval_examples": examples(8)}
    make("supervised", tmp_path, learning_rate=3e-3, **options).train()
    assert alarms_of(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        # From random weights answers first become longer, then lse with the full return makes them short.
        ("reinforce", SHORTER, {"run_on", "finish_rate_drop", "length_collapse"}),
        (
            "reinforce",
            {**BATCH, "reward_value": "softmax", "lam": 1.0, "learning_rate": 0.1, "kl_coef": 0.01, "max_steps": 12},
            {"kl_runaway", "entropy_collapse"},
        ),
        (
            "ppo",
            {"n": 16, "learning_rate": 0.1, "epochs_per_rollout": 4, "kl_coef": 0.01, "max_steps": 16},
            {"clip_saturated"},
        ),
    ],
)
def test_runs_that_go_wrong_raise_them(tmp_path, kind, options, expected):
    start = twin() if options.get("reward_value") == "softmax" else {}
    make(kind, tmp_path, **{**options, **start}).train()
    assert expected <= {line["alarm"] for line in alarms_of(tmp_path)}


@pytest.mark.parametrize(
    ("settings", "expected"), [({"teacher_mix": 0.9}, True), ({"rollout_temperature": 0.9}, False)]
)
def test_few_effective_samples_in_a_run(tmp_path, settings, expected):
    """Answers of a teacher that has nothing in common with the student, and of nearly the student itself."""
    make("reinforce", tmp_path, max_new_tokens=12, max_steps=3, learning_rate=0.0, **settings).train()
    assert ("few_effective_samples" in {line["alarm"] for line in alarms_of(tmp_path)}) is expected


def test_samples_of_another_policy_are_noticed(tmp_path):
    trainer = make("reinforce", tmp_path, max_steps=4, learning_rate=1e-3)
    sample = trainer.sample

    def lagging(index):
        rollouts = sample(index)
        return replace(rollouts, behaviour_logps=rollouts.behaviour_logps - 0.5 * rollouts.answer_mask)

    trainer.sample = lagging
    trainer.train()
    assert "kl_negative" in {line["alarm"] for line in alarms_of(tmp_path)}


def test_what_is_written(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("rlkd.runs.guards.logger.propagate", True)
    make("reinforce", tmp_path, **SHORTER).train()
    lines = alarms_of(tmp_path)
    assert {line["alarm"] for line in lines} >= {"length_collapse"}
    for line in lines:
        assert set(line) == {"step", "time", "alarm", "message", "value", "threshold"}
        alarm = ALARMS[line["alarm"]]
        assert line["threshold"] == alarm.threshold
        assert (line["value"] < line["threshold"]) == alarm.below
        assert alarm.advice_for() in line["message"]
        assert f"alarm at step {line['step']}, {line['message']}" in caplog.text
    # Every line of training counts the alarms up to and with its own step.
    for row in logged(tmp_path):
        if "loss" in row:
            assert row["alarms"] == sum(line["step"] <= row["step"] for line in lines)


def test_off_watches_nothing(tmp_path):
    make("reinforce", tmp_path, **SHORTER, alarms="off").train()
    assert alarms_of(tmp_path) == []
    assert not any("alarms" in line for line in logged(tmp_path))


@pytest.mark.parametrize("strategy", ["no", "steps", "best"])
@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
def test_stop_saves_a_checkpoint_and_ends_with_exit_code_5(tmp_path, kind, strategy):
    options = {**SHORTER, "save_strategy": strategy, "save_steps": 100, "max_steps": 100, "learning_rate": 0.1}
    if strategy == "best":
        options |= {"eval_strategy": "steps", "eval_steps": 100, "eval_examples": examples(4)}
    trainer = make(kind, tmp_path, **options, alarms="stop")
    with pytest.raises(DivergenceError, match=r"stopped at step \d+ by an alarm .*checkpoint-\d+") as caught:
        trainer.train()
    assert caught.value.exit_code == 5
    step, first = trainer.state.global_step, alarms_of(tmp_path)[0]
    # At once, or where the rollout batch ends.
    every = trainer.args.updates_per_rollout
    assert step == -(-first["step"] // every) * every < 100
    folder = tmp_path / f"checkpoint-{step}"
    assert str(folder) in str(caught.value)
    assert first["alarm"] in str(caught.value)
    again = make(kind, tmp_path, **{**options, "max_steps": step + every, "save_strategy": "no"})
    again.train(resume_from_checkpoint=str(folder))
    assert again.state.global_step == step + every
    # The episode continues: it is not reported again.
    assert [line["alarm"] for line in alarms_of(tmp_path)].count(first["alarm"]) == 1


def test_a_resumed_run_remembers_the_start(tmp_path):
    options = {**SHORTER, "save_strategy": "steps", "save_steps": 5}
    make("reinforce", tmp_path / "straight", **options).train()
    make("reinforce", tmp_path / "resumed", **options).train(
        resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-5")
    )
    later = [line for line in alarms_of(tmp_path / "straight") if line["step"] > 5]
    assert later
    for line in [*later, *alarms_of(tmp_path / "resumed")]:
        line.pop("time")
    assert alarms_of(tmp_path / "resumed")[0]["alarm"] == later[0]["alarm"]
    counts = [[row["alarms"] for row in logged(tmp_path / run) if "loss" in row] for run in ("straight", "resumed")]
    assert counts[0][5:] == counts[1]


def test_the_page_lists_every_alarm_with_its_threshold_and_remedy():
    rows = [line.split("|")[1:-1] for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    listed = {cells[0].strip(" `"): [cell.strip() for cell in cells] for cells in rows if len(cells) == 5}
    assert list(listed) == list(ALARMS)
    for name, (_, meaning, threshold, advice, test) in listed.items():
        alarm = ALARMS[name]
        assert meaning == alarm.meaning
        assert advice == alarm.advice_for()
        assert re.search(rf"{'below' if alarm.below else 'above'} {alarm.threshold:g}\b", threshold), name
        function = test.strip("`").partition("[")[0]
        assert function in globals(), name


def test_every_name_an_alarm_reads_is_a_logged_one():
    names = {name for row in METRICS for name in row.names}
    for alarm in ALARMS.values():
        assert set(alarm.reads) <= names, alarm.name


def test_every_alarm_has_a_finite_threshold_and_a_stream():
    assert all(torch.isfinite(torch.tensor(alarm.threshold)) for alarm in ALARMS.values())
    assert set(STREAMS) == set(ALARMS)


def test_an_alarm_is_one_entry(tmp_path, monkeypatch):
    """One added from outside the package is measured, counted and written as those of the package are."""

    def newest(history):
        return Reading(history.values["learning_rate"][-1], "the learning rate is positive")

    alarm = Alarm(
        name="mine", meaning="It learns.", advice=("stop",), reads=("learning_rate",), measure=newest, threshold=0.0
    )
    monkeypatch.setitem(ALARMS, alarm.name, alarm)
    make("reinforce", tmp_path, max_steps=2).train()
    (line,) = [line for line in alarms_of(tmp_path) if line["alarm"] == "mine"]
    assert (line["step"], line["value"], line["threshold"]) == (1, 1e-2, 0.0)
    assert line["message"] == "mine: the learning rate is positive. It learns. Stop."
    assert [row["alarms"] for row in logged(tmp_path) if "loss" in row] == [1, 1]


def test_advice_on_lam_is_one_procedure():
    """Warm up, start with the default, then one direction in small steps: docs, start warning and alarms agree."""
    root = DOCS.parents[1]
    section = (root / "docs" / "method.md").read_text(encoding="utf-8").split("## Choosing `lam`")[1].split("\n## ")[0]
    default = ReinforceArguments.__dataclass_fields__["lam"].default
    assert f"`lam` {default}" in section
    assert "Provisional" in section
    readme = (root / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in readme.splitlines() if line.startswith("| `lam` |")]
    assert f"| `lam` | {default} |" in row
    assert "docs/method.md#choosing-lam) (provisional)" in row
    for name, direction in (("run_on", "raise"), ("finish_rate_drop", "raise"), ("length_collapse", "lower")):
        first, second, *_ = ALARMS[name].advice
        assert first.startswith("warm up longer")
        assert second == f"{direction} lam in small steps (docs/method.md, Choosing lam)"
        assert re.search(rf"`{name}`[^;:]*: {direction} it", section)
    start = (root / "rlkd" / "trainers" / "start.py").read_text(encoding="utf-8")
    assert "docs/method.md, Choosing lam" in start
    assert "towards 0" not in start + readme
