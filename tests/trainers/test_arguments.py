"""Settings that cannot work are refused by name, before anything loads."""

import dataclasses
from dataclasses import replace

import pytest
from transformers import TrainingArguments

from rlkd.errors import ConfigError
from rlkd.objectives.rewards import REWARDS
from rlkd.trainers.arguments import (
    DistillationArguments,
    PPOArguments,
    ReinforceArguments,
    RLArguments,
    SupervisedArguments,
)

ALL = [SupervisedArguments, ReinforceArguments, PPOArguments]
CPU = {"use_cpu": True, "save_strategy": "no"}


@pytest.mark.parametrize("kind", ALL)
def test_defaults_construct(tmp_path, kind):
    args = kind(output_dir=str(tmp_path), use_cpu=True)
    assert args.report_to == []
    assert not args.logging_nan_inf_filter
    assert not args.remove_unused_columns
    assert args.restore_callback_states_from_checkpoint
    assert list(tmp_path.iterdir()) == []


WRONG = [
    *((kind, name, 0, {}) for kind in ALL for name in ("max_input_tokens", "max_new_tokens", "eval_limit")),
    *(
        (kind, name, 0, {})
        for kind in (ReinforceArguments, PPOArguments)
        for name in ("rollouts_per_prompt", "epochs_per_rollout", "minibatches_per_rollout", "sync_every", "k_step")
    ),
    *((ReinforceArguments, name, value, {}) for name in ("gamma", "lam") for value in (-0.1, 1.1)),
    *((ReinforceArguments, name, -0.1, {}) for name in ("entropy_coef", "kl_coef", "value_coef")),
    (ReinforceArguments, "value_clip_range", 0.0, {}),
    (ReinforceArguments, "rollouts_per_prompt", 1, {"baseline": "leave_one_out"}),
    (ReinforceArguments, "baseline", "critic", {"k_step": 2}),
    (ReinforceArguments, "kl_target", 0.0, {}),
    (ReinforceArguments, "kl_target", 0.1, {"kl_coef": 0.0}),
    (ReinforceArguments, "kl_estimator", "k2", {"kl_in": "reward"}),
    (ReinforceArguments, "baseline", "none", {"length_normalised": True}),
    (ReinforceArguments, "k_step", 2, {"length_normalised": True, "baseline": "teacher"}),
    (ReinforceArguments, "lam", 0.0, {"length_normalised": True}),
    (PPOArguments, "dual_clip", 1.0, {}),
    (PPOArguments, "value_learning_rate", 0.0, {}),
    (PPOArguments, "value_learning_rate", 1e-3, {"baseline": "leave_one_out"}),
    (PPOArguments, "value_warmup_updates", 4, {"value_coef": 0.0}),
    (ReinforceArguments, "value_warmup_updates", 4, {}),
    (PPOArguments, "value_warmup_updates", 4, {"max_steps": 4}),
    (ReinforceArguments, "kl_estimator", "exact", {"kl_coef": 0.0}),
    (ReinforceArguments, "rollouts_per_prompt", 3, {"per_device_train_batch_size": 8}),
    (ReinforceArguments, "importance_cap", 0.0, {}),
    (PPOArguments, "clip_range", 0.0, {}),
    (PPOArguments, "save_steps", 6, {"save_strategy": "steps"}),
    (PPOArguments, "save_steps", 0.5, {"save_strategy": "steps"}),
    (PPOArguments, "max_steps", 6, {"save_strategy": "steps"}),
    (
        PPOArguments,
        "eval_steps",
        6,
        {"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "regret"},
    ),
    *((kind, "fp16", True, {}) for kind in ALL),
]


@pytest.mark.parametrize(("kind", "name", "value", "more"), WRONG, ids=lambda x: getattr(x, "__name__", str(x)))
def test_impossible_values_are_refused_by_name(tmp_path, kind, name, value, more):
    with pytest.raises(ConfigError, match=rf"^{name} = {value!r}: "):
        kind(output_dir=str(tmp_path), **{**CPU, **more, name: value})


def test_checkpoints_fall_between_rollout_batches(tmp_path):
    def build(**options):
        return PPOArguments(output_dir=str(tmp_path), use_cpu=True, save_strategy="steps", **options)

    assert build(save_steps=8, max_steps=12).updates_per_rollout == 4
    assert build(save_steps=3, epochs_per_rollout=3, minibatches_per_rollout=1).updates_per_rollout == 3
    ReinforceArguments(output_dir=str(tmp_path), use_cpu=True, save_strategy="steps", save_steps=0.1, max_steps=7)
    PPOArguments(output_dir=str(tmp_path), use_cpu=True, save_strategy="no", max_steps=7)
    PPOArguments(output_dir=str(tmp_path), use_cpu=True, save_strategy="epoch")


def test_rows_of_a_rollout_batch(tmp_path):
    args = PPOArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        minibatches_per_rollout=4,
        rollouts_per_prompt=4,
        **CPU,
    )
    assert args.rows_per_rollout == 24


def test_every_field_of_ours_says_what_it_is_and_repeats_none_of_transformers():
    theirs = {f.name for f in dataclasses.fields(TrainingArguments)}
    changed = {"logging_nan_inf_filter", "remove_unused_columns", "report_to", "learning_rate"}
    changed.add("restore_callback_states_from_checkpoint")
    for kind in (DistillationArguments, RLArguments, *ALL):
        assert set(kind.__annotations__) & theirs <= changed
        for field in dataclasses.fields(kind):
            assert field.name in theirs or field.metadata["help"].endswith((".", "nats"))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"temperature": 2.0}, "temperature = 2.0: objective = 'sequence' does not take it: leave it out"),
        ({"objective": "forward_kl", "beta": 0.3}, "beta = 0.3: objective = 'forward_kl' .*; it takes temperature"),
        ({"objective": "jensen_shannon", "alpha": 0.3}, "alpha = 0.3: .*; it takes temperature, beta"),
        ({"objective": "jensen_shannon", "beta": 1.0}, "beta = 1.0: must be between 0 and 1"),
        ({"objective": "skew_forward_kl", "alpha": 0.0}, "alpha = 0.0: must be between 0 and 1"),
    ],
)
def test_a_parameter_that_the_divergence_does_not_take_is_refused(tmp_path, settings, problem):
    with pytest.raises(ConfigError, match=problem):
        SupervisedArguments(output_dir=str(tmp_path), **settings)
    SupervisedArguments(output_dir=str(tmp_path), objective="jensen_shannon", beta=0.3, temperature=2.0)
    SupervisedArguments(output_dir=str(tmp_path), objective="skew_forward_kl", alpha=0.3)


def test_a_reward_without_an_exact_expectation_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setitem(REWARDS, "sampled only", replace(REWARDS["max"], expected=None))
    with pytest.raises(ConfigError, match="one_step = 'exact': reward_value sampled only has no exact expectation"):
        ReinforceArguments(output_dir=str(tmp_path), reward_value="sampled only")
    ReinforceArguments(output_dir=str(tmp_path), reward_value="sampled only", one_step="sampled")
