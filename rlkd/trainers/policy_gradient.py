"""The policy gradient of the induced reward, whatever the algorithm: reward, credit, exact one-step term, KL, entropy.

    loss_t = policy_loss(credit_t) - w_t E_{a ~ pi}[r(s_t, a)] - c_H H(pi(.|s_t)) + c_KL KL_t + c_V critic_t

The second term replaces the sampled immediate reward by its exact gradient (`one_step: exact`); the credit then holds
the future only. KL_t is the penalty in the loss (`PolicyGradient.kl_penalty`); with `kl_in: reward` it is a part of the
reward instead, as is -c_H log pi(a_t|s_t) with `entropy_in: reward`.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from ..errors import ConfigError
from ..evaluation.samples import Sample
from ..models.heads import TokenFunction
from ..objectives.advantages import BASELINES, CreditInputs
from ..objectives.policy import adapt_kl_coef, expected_log_reference, kl_k1, kl_k2, value_loss
from ..objectives.rewards import REWARDS, teacher_value
from ..records import Answers, Example, Minibatch, TeacherSignal, given
from ..tensors import masked_mean
from .arguments import RLArguments
from .credit import SMALLEST_DEVIATION, Credit, numbers_of_credit, numbers_of_signal, whitened
from .critic import critic_alone, give_own_learning_rate
from .cut_answers import cut_rows, end_price, without_cut
from .distillation import TrainerInputs
from .labelled import with_imitation
from .objective import Evidence, Objective, Processes, StudentTokens, Term, with_terms
from .off_policy import weighted, with_effective_sample_size
from .on_policy import OnPolicyTrainer
from .start import StartCheck
from .task import task_credit, task_reward_of, task_scores, with_scores

logger = logging.getLogger(__name__)


class PolicyGradient(Objective):
    """Settings as in `RLArguments`; subclasses give `policy_loss`."""

    def __init__(self, args: RLArguments):
        self.args = args
        self.reward = REWARDS[args.reward_value]
        self.baseline = BASELINES[args.baseline]
        self.exact = args.one_step == "exact"
        self.what = f"reward_value = {args.reward_value!r}, baseline = {args.baseline!r}, one_step = {args.one_step!r}"
        self.remedy = (
            "choose reward_value: max, baseline: leave_one_out and one_step: sampled, which need the least from the "
            "teacher."
        )
        self.kl_coef = args.kl_coef
        self.flat = False  # whether a batch had nothing to whiten
        self.critic = self.baseline.critic
        self.loss_reduction = args.loss_reduction
        self.inputs = self.baseline.inputs(exact=self.exact)
        self.needs = self.reward.needs
        if self.exact or "expected" in self.inputs:
            self.needs |= {"distribution"}
        if "state_value" in self.inputs:
            self.needs |= {"logsumexp", "state_value"}
        self.reads = frozenset({"values", "expected"} & self.inputs)
        if args.kl_coef > 0:
            self.reads |= {"reference_logps"}
            if args.kl_in == "loss" and args.kl_estimator != "k2":
                self.reads |= {"reference"}
        if args.cut_answers == "end_price":
            self.reads |= {"ending"}

    # Before the first update on a batch of rollouts

    def annotate(self, answers: Answers, evidence: Evidence) -> Credit:
        """Reward of each token, and its credit: the discounted sum of rewards less the baseline."""
        args, signal, mask = self.args, evidence.signal, answers.answer_mask
        assert signal is not None
        per_token = self.per_token(answers, signal)
        # k1 in the reward: its expected gradient is that of the KL, which k1 in the loss would not give.
        reward = per_token
        if args.kl_in == "reward":
            reward = reward - self.kl_coef * self.kl(answers, evidence)
        if evidence.ending is not None:
            reward = reward + end_price(self.reward.per_token(evidence.ending), answers)
        credit, returns = self.baseline.credit(
            CreditInputs(
                reward=reward,
                mask=mask,
                decay=args.gamma * args.lam,
                stride=args.k_step,
                length_normalised=args.length_normalised,
                rollouts_per_prompt=args.rollouts_per_prompt,
                # Without the KL term of the reward: `expected` has no KL, so its sample stays in the credit.
                immediate=per_token if self.exact else None,
                expected=self.expected(evidence.extra[0], evidence.entropy) if "expected" in self.reads else None,
                values=evidence.values,
                state_value=teacher_value(signal, args.reward_value) if "state_value" in self.inputs else None,
            )
        )
        of_task = task_credit(evidence.task_scores, args)
        return Credit(
            advantages=(credit if of_task is None else credit + of_task) * mask,
            rewards=reward * mask,
            returns=returns,
            values=evidence.values,
            reference_logps=evidence.reference_logps,
            reference=evidence.reference,
            kl_coef=self.kl_coef,
            task_scores=evidence.task_scores,
            task_credit=of_task,
        )

    def per_token(self, answers: Answers, signal: TeacherSignal) -> Tensor:
        """r(s_t, a_t), [B, R]: the teacher's, and with `entropy_in: reward` - c log pi(a_t|s_t) of the rollout.

        The return of the latter has the gradient of E[sum r] + c times the entropy of whole answers.
        """
        reward, args = self.reward.per_token(signal), self.args
        return reward - args.entropy_coef * given(answers.own_logps) if args.entropy_in == "reward" else reward

    def expected(self, reward: Tensor, entropy: Tensor | None) -> Tensor:
        """E_{a ~ pi}[r(s_t, a)], [B, R]; of r - c log pi it is E_{a ~ pi}[r] + c H(pi) under `entropy_in: reward`."""
        return reward + self.args.entropy_coef * given(entropy) if self.args.entropy_in == "reward" else reward

    def kl(self, answers: Answers, evidence: Evidence) -> Tensor:
        """One-sample estimate of KL(pi || reference) at each sampled token, [B, R]; 0 without a KL penalty."""
        if evidence.reference_logps is None:
            return torch.zeros(answers.answer_mask.shape, device=answers.answer_mask.device)
        return kl_k1(given(answers.own_logps), evidence.reference_logps) * answers.answer_mask

    def learned(self, answers: Answers) -> Answers:
        """With `cut_answers: drop`, none of a cut answer's tokens; `leave_one_out` still compares with it."""
        return without_cut(answers) if self.args.cut_answers == "drop" else answers

    def over_batch(
        self, annotations: Credit, answers: Answers, evidence: Evidence, processes: Processes
    ) -> tuple[Credit, Mapping[str, Tensor | float]]:
        """Whiten advantages and adapt the weight of the KL penalty over the global batch; docs/metrics.md defines the
        logged names.
        """
        args, credit, mask = self.args, annotations, self.learned(answers).answer_mask
        if args.whiten_advantages:
            credit = self.whitened(credit, self.learned(answers), given(evidence.signal), processes)
        # Of tokens that the policy itself would draw.
        ratio = (given(answers.own_logps) - given(answers.behaviour_logps)).exp()
        kl = processes.gather(ratio * self.kl(answers, evidence))
        mean_kl = masked_mean(kl, processes.gather(answers.answer_mask))
        logged: dict[str, Tensor | float] = {
            **numbers_of_signal(given(evidence.signal), answers.answer_mask),
            **numbers_of_credit(credit, mask, processes),
            **self.numbers_of_cut(answers, evidence),
            "kl_coef": self.kl_coef,
            "kl": mean_kl,
        }
        if evidence.task_scores is not None:
            logged["task_reward"] = evidence.task_scores.mean()
        # For the next batch: `credit` already holds the coefficient of this one.
        if args.kl_target is not None:
            self.kl_coef = adapt_kl_coef(self.kl_coef, float(mean_kl), args.kl_target)
        return credit, logged

    def numbers_of_cut(self, answers: Answers, evidence: Evidence) -> dict[str, Tensor | float]:
        """How many answers were dropped, or what they were charged for a missing end."""
        if self.args.cut_answers == "drop":
            return {"dropped": cut_rows(answers).double().mean()}
        if self.args.cut_answers == "end_price":
            price = 0.0 if evidence.ending is None else -self.reward.per_token(evidence.ending)
            return {"end_price": (price * cut_rows(answers)[:, None]).double().sum() / len(answers.examples)}
        return {}

    def whitened(self, credit: Credit, answers: Answers, signal: TeacherSignal, processes: Processes) -> Credit:
        """As `whitened`; says once that a batch had nothing to divide by."""
        immediate = self.per_token(answers, signal) if self.exact else None
        credit, deviation = whitened(credit, immediate, answers.answer_mask, processes)
        if deviation < SMALLEST_DEVIATION and not self.flat:
            self.flat = True
            logger.warning(
                f"whiten_advantages: the credit in a batch has a standard deviation of {deviation:.2g} nats, too small "
                f"to divide by (below {SMALLEST_DEVIATION:g}): such batches are left as they are. Set "
                "whiten_advantages to false."
            )
        return credit

    def numbers(self, annotations: Credit) -> dict[str, Tensor | None]:
        return {
            "the reference's log-probability": annotations.reference_logps,
            "the critic's value": annotations.values,
            "the reward": annotations.rewards,
            "the advantage": annotations.advantages,
            "the return": annotations.returns,
        }

    def shown(self, annotations: Credit) -> dict[str, Tensor]:
        # In nats: the whitening of the rewards is undone.
        shown = {"rewards": annotations.rewards / annotations.scale, "advantages": annotations.advantages}
        return shown if annotations.values is None else {**shown, "values": annotations.values}

    # The loss

    def token_function(
        self, signal: TeacherSignal | None, annotations: Credit | None = None
    ) -> tuple[TokenFunction, tuple[Tensor, ...]]:
        """In `extra`: E_{a ~ pi}[r(s_t, a)] where it is exact or a baseline, then E_{a ~ pi}[log reference(a|s_t)]
        where the KL penalty is exact.
        """
        terms = []
        if self.exact or (annotations is None and "expected" in self.reads):
            terms.append(self.expectation(given(signal)))
        if annotations is not None and annotations.reference is not None:
            reference = annotations.reference
            terms.append(Term(expected_log_reference, lambda *x: (reference.logits(*x),), reference.token_args))
        return with_terms(*terms)

    def expectation(self, signal: TeacherSignal) -> Term:
        """E_{a ~ pi}[r(s_t, a)]."""
        expected, distribution = given(self.reward.expected), given(signal.distribution)

        def of_chunk(value: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            return distribution.logits(*states), value

        return Term(expected, of_chunk, (self.reward.state_value(signal), *distribution.token_args))

    @abstractmethod
    def policy_loss(self, logps: Tensor, advantages: Tensor, answers: Answers) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of the sampled tokens [B, R] from their log-probabilities under the student and their (weighted)
        advantages, [B, R]; what is logged.
        """

    def stands_for(self, logps: Tensor, answers: Answers) -> Tensor:
        """Log-probabilities [B, R] of the policy that importance weights make the answers those of: the student's.

        Another one if the objective corrects for the rest, as PPO's ratio does for the updates since the rollouts.
        """
        return logps

    def token_loss(self, student: StudentTokens, minibatch: Minibatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """policy loss - exact one-step term - entropy bonus + KL penalty + critic loss, [B, R]."""
        args = self.args
        credit: Credit = minibatch.annotations
        corrected = weighted(args, self.stands_for(student.logps, minibatch.answers), minibatch)
        loss, logged = self.policy_loss(student.logps, corrected.advantages, minibatch.answers)
        # The exact term: gradient of E_{a ~ pi}[r(s_t, a)] over the whole vocabulary, without sampling variance.
        if self.exact:
            expected = self.expected(student.extra[0], student.entropy)
            loss = loss - credit.scale * corrected.states * expected
        if args.entropy_in == "loss":
            loss = loss - args.entropy_coef * student.entropy
        if args.kl_coef > 0 and args.kl_in == "loss":
            loss = loss + credit.kl_coef * corrected.states * self.kl_penalty(student, minibatch)
        if credit.values is not None and credit.returns is not None:
            critic = value_loss(student.values, credit.values, credit.returns, args.value_clip_range)
            loss = loss + args.value_coef * critic
            logged = {**logged, "value_loss": critic}
        return loss, {**logged, **corrected.logged}

    def kl_penalty(self, student: StudentTokens, minibatch: Minibatch) -> Tensor:
        """KL(pi || reference) at every visited state, [B, R]: its gradient there, not its effect on later states.

            exact   sum_a pi(a|s_t) (log pi(a|s_t) - log reference(a|s_t)) over the vocabulary, nothing sampled
            k2      rho_t (log pi(a_t|s_t) - log reference(a_t|s_t))^2 / 2, rho_t = pi / mu without gradient: unbiased
                    for that gradient whatever mu the token was drawn from

        The states of both are those that mu reached; they get the weights of the exact one-step term (`weighted`).
        """
        credit: Credit = minibatch.annotations
        if credit.reference is not None:
            return -student.entropy - student.extra[-1]
        mask = minibatch.answers.answer_mask
        ratio = ((student.logps.detach() - given(minibatch.answers.behaviour_logps)) * mask).exp()
        return ratio * kl_k2(student.logps, given(credit.reference_logps))

    # kl_coef changes during training, so checkpoints keep it

    def state(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_coef}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.kl_coef = state["kl_coef"]


class PolicyGradientTrainer(OnPolicyTrainer):
    """On-policy training by a `PolicyGradient`; whether the student is strong enough for it is checked at the start.

    Raises as `TaskReward` does if the task reward cannot score the training data.
    """

    args: RLArguments
    objective: PolicyGradient
    start_checks = (StartCheck,)

    def __init__(
        self,
        student: Any,
        args: RLArguments,
        *,
        train_examples: Sequence[Example],
        labels: Any = None,
        **inputs: Unpack[TrainerInputs],
    ):
        self.task_reward = task_reward_of(args, train_examples)
        super().__init__(student, args, train_examples=train_examples, labels=labels, **inputs)

    def evidence(self, answers: Answers) -> Evidence:
        """As in `DistillationTrainer`, with the task's scores."""
        evidence, reward = super().evidence(answers), self.task_reward
        return evidence if reward is None else replace(evidence, task_scores=task_scores(self, reward, answers))

    def rollout_samples(self) -> list[Sample]:
        """As in `OnPolicyTrainer`, with the task's scores as facts."""
        return with_scores(super().rollout_samples(), None if self.newest is None else self.newest.annotations)

    def recorded(self) -> dict[str, float]:
        """As in `StudentTrainer`, with the effective sample size of all weights since the last line."""
        return with_effective_sample_size(super().recorded())

    def minibatches(self, batch: Minibatch, index: int) -> Iterator[Minibatch]:
        """As in `OnPolicyTrainer`; with `imitation_coef`, every update also has as many labels as answers."""
        own = super().minibatches(batch, index)
        return own if self.label_batches is None else with_imitation(self, own, index)

    def describe_run(self, steps: int, epochs: float) -> str:
        """As in `OnPolicyTrainer`, and how many labels are imitated."""
        described = super().describe_run(steps, epochs)
        if self.label_batches is None:
            return described
        rows = self.args.rows_per_update * self.accelerator.num_processes
        return f"{described}; every update also imitates {rows} of {len(self.label_batches)} labels"

    def check_teacher(self) -> None:
        """As in `DistillationTrainer`; end_price scores one token beyond the longest answer."""
        super().check_teacher()
        args, longest = self.objective.args, getattr(self.teacher, "longest_answer", None)
        if args.cut_answers == "end_price" and longest is not None and args.max_new_tokens >= longest:
            shorter = (
                f"max_new_tokens to at most {longest - 1}" if longest > 1 else "the teacher's max_input_tokens lower"
            )
            raise ConfigError(
                f"cut_answers = 'end_price': the teacher has {longest} positions for an answer and its end: set "
                f"{shorter}, or cut_answers to keep or drop"
            )

    def create_optimizer(self, model: Any = None) -> Any:
        """As in Trainer, with the critic's own learning rate."""
        made, rate = self.optimizer is None, self.args.value_learning_rate
        optimizer = super().create_optimizer(model)
        if made and rate is not None and self.policy.value_head is not None:
            give_own_learning_rate(optimizer, self.policy.value_head, rate)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in Trainer; the first `value_warmup_updates` train the critic alone."""
        with critic_alone(self.policy) if self.critic_warms_up else nullcontext():
            return super().training_step(*args, **kwargs)

    def annotate(self, answers: Answers) -> Minibatch:
        """As in `OnPolicyTrainer`; while the critic is trained alone, kl_coef does not move."""
        kl_coef = self.objective.kl_coef
        batch = super().annotate(answers)
        if self.critic_warms_up:
            self.objective.kl_coef = kl_coef
        return batch

    @property
    def critic_warms_up(self) -> bool:
        """Whether the coming update is one of the first `value_warmup_updates`."""
        return self.state.global_step < self.args.value_warmup_updates
