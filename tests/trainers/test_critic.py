"""The critic's own learning rate, and the updates that train it alone."""

import pytest
import torch

from tiny_runs import assert_same, logged, make, weights

HEAD = {"value_head.weight", "value_head.bias"}


def moved(folder, steps, **options):
    """What changed in a PPO run of `steps` updates, by name."""
    trainer = make("ppo", folder, max_steps=steps, **options)
    before = weights(trainer.policy)
    trainer.train()
    return {name: after - before[name] for name, after in weights(trainer.policy).items()}


def test_the_critic_has_its_own_learning_rate(tmp_path):
    options = {"optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0}
    same = moved(tmp_path / "same", 1, **options)
    own = moved(tmp_path / "own", 1, **options, value_learning_rate=0.3)
    assert same["value_head.weight"].abs().max() > 0
    for name in same:
        torch.testing.assert_close(own[name], (30 if name in HEAD else 1) * same[name], rtol=1e-4, atol=1e-8)


def test_the_schedule_and_weight_decay_of_the_critic_are_those_of_its_kind(tmp_path):
    options = {"value_learning_rate": 0.5, "weight_decay": 0.1, "lr_scheduler_type": "linear", "max_steps": 4}
    trainer = make("ppo", tmp_path, **options)
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    names = {id(p): name for name, p in trainer.policy.named_parameters()}
    for done in range(4):
        rates = {
            names[id(p)]: (group["lr"], group["weight_decay"])
            for group in trainer.optimizer.param_groups
            for p in group["params"]
        }
        assert rates.keys() == set(names.values())
        share = 1 - done / 4
        assert rates["value_head.weight"] == pytest.approx((0.5 * share, 0.1))
        assert rates["value_head.bias"] == pytest.approx((0.5 * share, 0.0))
        assert all(rate == pytest.approx(0.01 * share) for name, (rate, _) in rates.items() if name not in HEAD)
        assert trainer._get_learning_rate() == pytest.approx(0.01 * share)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}])
def test_a_warm_up_trains_the_critic_alone(tmp_path, options):
    """Nothing moves the student, weight decay neither; afterwards its optimizer starts as a new one."""
    options = {"weight_decay": 0.1, "optim": "adamw_torch", "learning_rate": 1e-3, "n": 16, **options}
    changed = moved(tmp_path / "in", -1, num_train_epochs=1, **options, value_warmup_updates=100)
    assert {name for name, change in changed.items() if change.any()} == HEAD
    changed = moved(tmp_path / "after", 6, **options, value_warmup_updates=5)
    student = {name: change for name, change in changed.items() if name not in HEAD}
    largest = max(float(change.abs().max()) for change in student.values())
    assert 0.9e-3 < largest < 1.3e-3  # one step of Adam, which begins with lr for each weight; and decay


def test_the_weight_of_the_kl_penalty_waits_for_the_student(tmp_path):
    options = {"kl_target": 1.0, "kl_coef": 0.1, "max_steps": 12, "value_warmup_updates": 8}
    make("ppo", tmp_path, **options).train()
    coefs = [line["kl_coef"] for line in logged(tmp_path) if "kl_coef" in line]
    assert coefs == pytest.approx([0.1] * 3)
    trainer = make("ppo", tmp_path / "without", **{**options, "value_warmup_updates": 0})
    trainer.train()
    assert trainer.objective.kl_coef < 0.1


def test_without_a_warm_up_nothing_changes(tmp_path):
    runs = []
    for name, options in (("plain", {}), ("same", {"value_learning_rate": 1e-2})):
        trainer = make("ppo", tmp_path / name, max_steps=4, **options)
        trainer.train()
        runs.append(weights(trainer.policy))
    assert_same(*runs)
