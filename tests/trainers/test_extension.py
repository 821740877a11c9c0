"""What CONTRIBUTING promises: a reward, a baseline, a divergence, a teacher's signal and an objective are added from
outside, without a change to any trainer, and train.
"""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from rlkd.errors import ConfigError
from rlkd.objectives.advantages import BASELINES, Baseline
from rlkd.objectives.divergences import DIVERGENCES, Divergence
from rlkd.objectives.policy import token_statistics
from rlkd.objectives.rewards import REWARDS, Reward
from rlkd.records import Answers, TeacherSignal
from rlkd.trainers.objective import Objective, StudentTokens
from rlkd.trainers.on_policy import OnPolicyTrainer
from rlkd.trainers.supervised import SequenceKD, SupervisedTrainer
from tiny_runs import TRAINERS, differ, examples, logged, make, tiny_teacher, weights


def trains(trainer, folder):
    """Two steps move the weights, and what was logged is returned."""
    before = weights(trainer.policy)
    trainer.train()
    assert trainer.state.global_step == 2
    assert differ(before, weights(trainer.policy))
    return [line for line in logged(folder) if "loss" in line]


# A reward


def probability(signal: TeacherSignal):
    return (signal.chosen - signal.logsumexp).exp()


def expected_probability(student, teacher, value):
    return (student.softmax(-1) * teacher.softmax(-1)).sum(-1) - value


PROBABILITY = Reward(
    frozenset({"chosen", "logsumexp"}), probability, lambda s: torch.zeros_like(s.chosen), expected_probability
)


@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
@pytest.mark.parametrize("one_step", ["exact", "sampled"])
def test_a_reward(tmp_path, monkeypatch, kind, one_step):
    monkeypatch.setitem(REWARDS, "probability", PROBABILITY)
    trainer = make(
        kind, tmp_path, max_steps=2, reward_value="probability", one_step=one_step, eval_examples=examples(3)
    )
    batch = trainer.annotate(trainer.sample(0))
    mask = batch.answers.answer_mask
    want = torch.where(mask, probability(batch.signal), 0.0)
    torch.testing.assert_close(batch.annotations.rewards, want)
    trains(trainer, tmp_path)


# A baseline


def half(inputs):
    """S_t less the mean of all credit: no better than others, but its own."""
    credit = inputs.to_go()
    return credit - credit[inputs.mask].mean() / 2, None


def test_a_baseline(tmp_path, monkeypatch):
    monkeypatch.setitem(BASELINES, "half", Baseline(half))
    trainer = make("reinforce", tmp_path, max_steps=2, baseline="half")
    batch = trainer.annotate(trainer.sample(0))
    plain = make("reinforce", tmp_path / "plain", baseline="teacher")
    other = plain.annotate(plain.sample(0))
    mask = other.answers.answer_mask
    shift = other.annotations.advantages[mask].mean() / 2
    torch.testing.assert_close(batch.annotations.advantages[mask], other.annotations.advantages[mask] - shift)
    trains(trainer, tmp_path)


# A divergence


def power_kl(student, teacher, alpha):
    return (teacher.softmax(-1) ** alpha * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)


def test_a_divergence_with_a_parameter(tmp_path, monkeypatch):
    monkeypatch.setitem(DIVERGENCES, "power_kl", Divergence(power_kl, (("alpha", 1.0),)))
    losses = {}
    for name, options in {
        "default": {"objective": "power_kl"},
        "given": {"objective": "power_kl", "alpha": 0.5},
        "forward": {"objective": "forward_kl"},
    }.items():
        trainer = make("supervised", tmp_path / name, max_steps=2, **options)
        losses[name] = [line["loss"] for line in trains(trainer, tmp_path / name)]
    assert losses["default"] == pytest.approx(losses["forward"], rel=1e-5)
    assert losses["given"] != pytest.approx(losses["forward"], rel=1e-3)


# A teacher's signal


class ChosenAndBest:
    """A teacher that gives only the chosen and the best log-probability, like a server with one log-probability per
    token.
    """

    gives = frozenset({"chosen", "max"})
    model = None

    def __init__(self, teacher):
        self.teacher = teacher
        self.asked = []

    def score(self, *args, distribution=False, ids=None):
        assert not distribution
        self.asked.append(ids)
        full = self.teacher.score(*args, ids=ids)
        return TeacherSignal(chosen=full.chosen - full.logsumexp, max=full.max - full.logsumexp)


PLAIN = {"one_step": "sampled", "baseline": "leave_one_out", "weak_start": "ignore"}


def test_a_signal_of_two_numbers_per_token_is_enough_for_the_regret(tmp_path):
    source = ChosenAndBest(tiny_teacher())
    trainer = make("reinforce", tmp_path / "two", teacher=source, max_steps=2, **PLAIN)
    lines = trains(trainer, tmp_path / "two")
    assert len(source.asked) == 2
    full = make("reinforce", tmp_path / "full", max_steps=2, **PLAIN)
    for one, other in zip(lines, trains(full, tmp_path / "full"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["regret"] == pytest.approx(other["regret"], abs=1e-4)
        assert "teacher_entropy" not in one


def test_a_start_that_cannot_be_checked_is_logged(tmp_path, caplog):
    trainer = make(
        "reinforce", tmp_path, teacher=ChosenAndBest(tiny_teacher()), max_steps=1, **{**PLAIN, "weak_start": "warn"}
    )
    trainer.train()
    assert "cannot be checked: the teacher provides no distribution" in caplog.text
    options = {**PLAIN, "weak_start": "refuse"}
    strict = make("reinforce", tmp_path / "strict", teacher=ChosenAndBest(tiny_teacher()), max_steps=1, **options)
    with pytest.raises(ConfigError, match="cannot be checked"):
        strict.train()


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"one_step": "exact"}, "distribution"),
        ({"reward_value": "lse"}, "logsumexp"),
        ({"baseline": "closed_form"}, "distribution"),
        ({"baseline": "none"}, "logsumexp"),
    ],
)
def test_what_a_signal_cannot_give_is_refused_by_name(tmp_path, options, missing):
    with pytest.raises(
        ConfigError, match=rf"reward_value = .* needs the teacher's .*{missing}.* provides chosen, max only"
    ):
        make("reinforce", tmp_path, teacher=ChosenAndBest(tiny_teacher()), **{**PLAIN, **options})


def test_an_evaluation_tells_what_the_signal_gives(tmp_path, caplog):
    """The regret of held-out answers is that of the full teacher; what is missing is said."""
    options = {**PLAIN, "eval_examples": examples(3), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    two = make("reinforce", tmp_path / "two", teacher=ChosenAndBest(tiny_teacher()), **options)
    full = make("reinforce", tmp_path / "full", **options)
    for trainer in (two, full):
        trainer.train()
    assert "held-out answers have no logprob, match, token rewards: that takes the teacher's model" in caplog.text
    one, other = (logged(tmp_path / name)[-2] for name in ("two", "full"))
    assert other.keys() - one.keys() == {"eval_logprob", "eval_sample_logprob", "eval_match"}
    for name in ("eval_regret", "eval_sample_regret"):
        assert one[name] == pytest.approx(other[name], abs=1e-4)


def test_a_divergence_needs_the_distribution(tmp_path):
    with pytest.raises(ConfigError, match="objective = 'reverse_kl' needs the teacher's distribution"):
        make("supervised", tmp_path, objective="reverse_kl", teacher=ChosenAndBest(tiny_teacher()))


# An objective


class BestToken(Objective):
    """ImitKD (Lin et al. 2020): cross-entropy to the teacher's best token at every prefix of the answers."""

    needs = frozenset({"chosen", "distribution"})

    def __init__(self, args):
        self.args = args

    def token_function(self, signal, annotations=None):
        def best(logits, ids, *states):
            target = signal.distribution.logits(*states).argmax(-1)
            return *token_statistics(logits, ids), -logits.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)

        return best, signal.distribution.token_args

    def token_loss(self, student: StudentTokens, minibatch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        return student.extra[0], {"best_token_loss": student.extra[0]}


class BestTokenTrainer(OnPolicyTrainer):
    objective_type = BestToken


def test_an_on_policy_objective(tmp_path, monkeypatch):
    monkeypatch.setitem(TRAINERS, "reinforce", BestTokenTrainer)
    trainer = make("reinforce", tmp_path, max_steps=2, eval_examples=examples(3), eval_strategy="steps", eval_steps=1)
    for line in trains(trainer, tmp_path):
        assert line["best_token_loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert line["length"] > 0


# Where answers come from


class Mixed(OnPolicyTrainer):
    """Every other batch of answers are labels: here the teacher's inputs' own words."""

    objective_type = staticmethod(lambda args: SequenceKD())

    def sample(self, index) -> Answers:
        drawn = super().sample(index)
        if index % 2:
            return drawn
        labels = [{"student_input": e.student_input, "label": e.student_input, "id": e.id} for e in drawn.examples]
        return Answers(**SupervisedTrainer.collate(self.labelled, labels))


def test_answers_may_come_from_labels_from_rollouts_or_from_a_mix(tmp_path, monkeypatch):
    labelled = make("supervised", tmp_path / "labels")
    monkeypatch.setitem(TRAINERS, "reinforce", Mixed)
    Mixed.labelled = labelled
    trainer = make("reinforce", tmp_path / "mix", max_steps=2)
    first = trainer.annotate(trainer.sample(0))
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.policy, {"minibatch": replace(first, denominator=None)})
    rows = [{"student_input": e.student_input, "label": e.student_input} for e in first.answers.examples]
    want = labelled.compute_loss(labelled.policy, labelled.data_collator(rows))
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    lines = trains(trainer, tmp_path / "mix")
    assert ["finish_rate" in line for line in lines] == [False, True]
