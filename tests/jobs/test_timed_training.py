"""Training for a number of CPU seconds: where it ends, and the learning rate over it."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest

from rlkd.jobs.timed_training import timed_training


class FakeTrainer:
    """Steps of one CPU second each, with the calls that a Trainer makes of its callbacks."""

    def __init__(self, max_steps: int, warmup_steps: float, clock):
        self.args = SimpleNamespace(warmup_steps=warmup_steps, learning_rate=0.5)
        self.state = SimpleNamespace(global_step=0, max_steps=max_steps)
        self.callbacks, self.rates, self.clock = [], [], clock

    def remove_callback(self, kind):
        pass

    def add_callback(self, callback):
        self.callbacks.append(callback)

    def train(self):
        control, optimizer = SimpleNamespace(should_training_stop=False), SimpleNamespace(param_groups=[{"lr": 0.5}])
        self.clock.now += 5  # what is done before the first step
        call = self.callbacks[0]
        call.on_train_begin(self.args, self.state, control)
        while self.state.global_step < self.state.max_steps and not control.should_training_stop:
            self.clock.now += 0.5
            call.on_pre_optimizer_step(self.args, self.state, control, optimizer=optimizer)
            self.rates.append(optimizer.param_groups[0]["lr"])
            self.clock.now += 0.5
            self.state.global_step += 1
            call.on_log(self.args, self.state, control, logs={"loss": 2.0, "regret": 1.25})
            call.on_step_end(self.args, self.state, control)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "process_time", lambda: clock.now)
    ticks = itertools.count(0.0, 1.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    return clock


def test_a_budget_of_cpu_seconds_ends_training_at_a_learning_rate_of_0(clock, capsys):
    trainer = FakeTrainer(10**6, 4, clock)
    assert timed_training(trainer, "seed-1/ppo", 20.0) == {"steps": 20, "cpu_seconds": 20.0}
    expected = [0.5 * min(1 - (step + 0.5) / 20, (step + 1) / 4) for step in range(20)]
    assert trainer.rates == pytest.approx(expected)
    assert "seed-1/ppo: 20 steps, 20 of 20 CPU s, regret 1.25" in capsys.readouterr().out


def test_without_a_budget_it_is_timed_as_it_is(clock, capsys):
    trainer = FakeTrainer(12, 0.1, clock)
    assert timed_training(trainer, "warm-up") == {"steps": 12, "cpu_seconds": 5 + 12}
    assert set(trainer.rates) == {0.5}
    shown = capsys.readouterr().out
    assert "warm-up: step 12/12, " in shown
    assert shown.count("\n") == 2  # one within ten seconds, and the last
