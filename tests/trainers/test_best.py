"""The best checkpoint by a held-out metric: chosen, kept, found again, and when to stop waiting for a better one."""

import shutil

import pytest
from test_tkd import make as make_tkd
from test_tkd import rows as labelled_rows

from rlkd.errors import ConfigError
from rlkd.evaluation.task_metrics import exact_match
from rlkd.trainers.arguments import PPOArguments, ReinforceArguments, SupervisedArguments
from tiny_runs import assert_same, examples, make, weights

KINDS = ["ppo", "reinforce", "supervised"]
EVERY = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4, "max_steps": 40}
BEST = {**EVERY, "load_best_model_at_end": True, "early_stopping_patience": 2, "save_total_limit": 1}


def scripted(kind, folder, scores, **options):
    """A trainer whose evaluations yield `scores` in turn as regret; keeps the weights of each."""
    trainer = make(kind, folder, eval_examples=examples(4), **{**BEST, **options})
    kept = {}

    def summarise(rows):
        kept[trainer.state.global_step] = weights(trainer.policy.student)
        return {"regret": scores[trainer.state.global_step // 4 - 1]}

    trainer.evaluator.summarise = summarise
    return trainer, kept


@pytest.mark.parametrize("kind", KINDS)
def test_training_stops_early_and_the_best_checkpoint_is_never_deleted(tmp_path, kind):
    trainer, kept = scripted(kind, tmp_path, [3.0, 1.0, 2.0, 1.5, 0.5])
    trainer.train()
    assert trainer.state.global_step == 16
    assert trainer.state.best_metric == 1.0
    assert (tmp_path / "checkpoint-8").is_dir()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-8")
    assert_same(weights(trainer.policy.student), kept[8])


def test_a_resumed_run_stops_where_it_would_have_stopped(tmp_path):
    scores = [3.0, 1.0, 2.0, 1.5, 0.5]
    first, _ = scripted("reinforce", tmp_path / "one", scores, max_steps=12, save_total_limit=None)
    first.train()
    # Moved, as to another machine: the best checkpoint is found there.
    shutil.move(tmp_path / "one", tmp_path / "two")
    resumed, kept = scripted("reinforce", tmp_path / "two", scores)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 16
    assert list(kept) == [16]
    assert resumed.state.best_model_checkpoint == str(tmp_path / "two" / "checkpoint-8")
    assert (tmp_path / "two" / "checkpoint-8").is_dir()


def test_a_run_whose_patience_is_spent_continues_only_with_more_patience(tmp_path):
    scores = [3.0, 1.0, 2.0, 1.5, 0.5, 2.0, 2.0, 2.0]
    options = {"save_total_limit": None, "max_steps": 28}
    scripted("reinforce", tmp_path, scores, **options)[0].train()
    again, kept = scripted("reinforce", tmp_path, scores, **options)
    again.train(resume_from_checkpoint=True)
    assert (again.state.global_step, list(kept)) == (16, [])
    more, kept = scripted("reinforce", tmp_path, scores, **options, early_stopping_patience=3)
    more.train(resume_from_checkpoint=True)
    assert (more.state.global_step, list(kept)) == (28, [20, 24, 28])
    assert more.state.best_metric == 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["regrets", "loss", "rouge1"])
def test_a_metric_no_evaluation_yields_is_refused_before_training(tmp_path, kind, metric):
    with pytest.raises(ConfigError, match=rf"^metric_for_best_model = '{metric}': .* regret, .*exact_match") as caught:
        make(kind, tmp_path, eval_examples=examples(4), task_metric=exact_match, metric_for_best_model=metric, **EVERY)
    assert ("Did you mean 'regret'?" in str(caught.value)) == (metric == "regrets")
    assert list(tmp_path.iterdir()) == []


def test_tkd_refuses_it_too_and_takes_what_its_metrics_name(tmp_path):
    def make_one(metric, **options):
        dev = labelled_rows(6, seed=1)
        return make_tkd(
            tmp_path, preset="kd", dev=dev, **{**EVERY, "max_steps": 2, "metric_for_best_model": metric, **options}
        )

    with pytest.raises(ConfigError, match=r"'accurate': .* Allowed are loss, accuracy. Did you mean 'accuracy'"):
        make_one("accurate")
    for metric, greater in (("accuracy", True), ("eval_accuracy", True), ("loss", False)):
        assert make_one(metric).args.greater_is_better is greater
    make_one("accurate", eval_strategy="no", save_strategy="no")


@pytest.mark.parametrize("metric", ["exact_match", "eval_sample_exact_match", "regret", "match"])
def test_metrics_that_exist_are_taken(tmp_path, metric):
    make(
        "reinforce", tmp_path, eval_examples=examples(4), task_metric=exact_match, metric_for_best_model=metric, **EVERY
    )


def test_a_task_metric_that_cannot_be_asked_beforehand_is_trusted(tmp_path):
    def picky(predictions, rows):
        if len(predictions) < 4:
            raise ZeroDivisionError
        return {"mine": 1.0}

    options = {**EVERY, "max_steps": 4, "metric_for_best_model": "mine"}
    trainer = make("reinforce", tmp_path, eval_examples=examples(4), task_metric=picky, **options)
    trainer.train()
    assert trainer.state.best_metric == 1.0


@pytest.mark.parametrize("kind", [SupervisedArguments, ReinforceArguments, PPOArguments])
def test_the_default_is_the_lowest_regret(tmp_path, kind):
    def build(**options):
        return kind(output_dir=str(tmp_path), use_cpu=True, **{**EVERY, **options})

    args = build(load_best_model_at_end=True)
    assert (args.metric_for_best_model, args.greater_is_better) == ("regret", False)
    for metric, greater in (("eval_sample_regret", False), ("kl", False), ("rougeL", True)):
        assert build(metric_for_best_model=metric).greater_is_better is greater
    assert build(metric_for_best_model="regret", greater_is_better=True).greater_is_better


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_steps": 8, "load_best_model_at_end": True}, r"^save_steps = 8: .* set it to eval_steps = 4"),
        ({"early_stopping_patience": 2}, r"^early_stopping_patience = 2: needs load_best_model_at_end: true"),
        ({"early_stopping_patience": 0, "load_best_model_at_end": True}, r"^early_stopping_patience = 0: must be"),
        ({"alarms": "loud"}, r"^alarms = 'loud': allowed are 'warn', 'stop', 'off'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_keep_the_best_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        ReinforceArguments(output_dir=str(tmp_path), use_cpu=True, **{**EVERY, **options})
