"""The policy gradient of the induced reward, whatever the algorithm: reward, credit, exact one-step term, KL, entropy.

    loss_t = policy_loss(credit_t) - w_t E_{a ~ pi}[r(s_t, a)] - c_H H(pi(.|s_t)) + c_KL KL_t + c_V critic_t

The second term replaces the sampled immediate reward by its exact gradient (`one_step: exact`); the credit then holds
the future only.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..evaluation.samples import Sample
from ..evaluation.task_reward import TaskReward
from ..models.heads import TokenFunction
from ..models.vocabulary import decode_texts
from ..objectives.advantages import BASELINES, CreditInputs, explained_variance, regret_per_sequence, sequence_credit
from ..objectives.policy import adapt_kl_coef, kl_k1, kl_k3, token_statistics, value_loss
from ..objectives.rewards import REWARDS, teacher_value
from ..records import Answers, Batched, Minibatch, TeacherSignal
from ..tensors import masked_mean, masked_moments, moments_to_mean_std, whiten
from .arguments import RLArguments
from .objective import Evidence, Objective, Processes, StudentTokens
from .on_policy import OnPolicyTrainer
from .start import StartCheck

logger = logging.getLogger(__name__)

SMALLEST_DEVIATION = 1e-3  # nats; differences of float32 log-probabilities are 1e-6 to 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit(Batched):
    """The annotations of a policy gradient, [B, R] each.

    advantages       credit of each sampled token after its baseline
    rewards          the terms whose discounted sum is the credit before its baseline
    returns          targets of the critic, and values, its predictions at rollout time; None without a critic
    reference_logps  log-probabilities under the reference policy; None without a KL penalty
    scale            1 / (standard deviation the advantages were whitened with), else 1
    kl_coef          weight of the KL penalty for this batch
    task_scores      [B] the task's score of each answer, and task_credit, [B, 1], the part of the advantages of all its
                     tokens that comes from it; None without a task reward
    """

    advantages: Tensor
    rewards: Tensor
    returns: Tensor | None = None
    values: Tensor | None = None
    reference_logps: Tensor | None = None
    scale: float = 1.0
    kl_coef: float = 0.0
    task_scores: Tensor | None = None
    task_credit: Tensor | None = None


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
            self.needs |= {"logsumexp"}
        self.reads = frozenset({"values", "expected"} & self.inputs)
        if args.kl_coef > 0:
            self.reads |= {"reference_logps"}

    # Before the first update on a batch of rollouts

    def annotate(self, answers: Answers, evidence: Evidence) -> Credit:
        """Reward of each token, and its credit: the discounted sum of rewards less the baseline."""
        args, signal, mask = self.args, evidence.signal, answers.answer_mask
        assert signal is not None
        per_token = self.reward.per_token(signal)
        # k1 in the reward: its expected gradient is that of the KL, which k1 in the loss would not give.
        reward = per_token
        if args.kl_in == "reward":
            reward = per_token - self.kl_coef * self.kl(answers, evidence)
        credit, returns = self.baseline.credit(
            CreditInputs(
                reward=reward,
                mask=mask,
                decay=args.gamma * args.lam,
                stride=args.k_step,
                rollouts_per_prompt=args.rollouts_per_prompt,
                # Without the KL term of the reward: `expected` has no KL, so its sample stays in the credit.
                immediate=per_token if self.exact else None,
                expected=evidence.extra[0] if "expected" in self.reads else None,
                values=evidence.values,
                state_value=teacher_value(signal, args.reward_value) if "state_value" in self.inputs else None,
            )
        )
        task_credit = None
        if evidence.task_scores is not None:
            task_credit = (
                args.task_reward_coef * sequence_credit(evidence.task_scores, args.rollouts_per_prompt)[:, None]
            )
            credit = credit + task_credit
        return Credit(
            advantages=credit * mask,
            rewards=reward * mask,
            returns=returns,
            values=evidence.values,
            reference_logps=evidence.reference_logps,
            kl_coef=self.kl_coef,
            task_scores=evidence.task_scores,
            task_credit=task_credit,
        )

    def kl(self, answers: Answers, evidence: Evidence) -> Tensor:
        """One-sample estimate of KL(pi || reference) at each sampled token, [B, R]; 0 without a KL penalty."""
        if evidence.reference_logps is None:
            return torch.zeros(answers.answer_mask.shape, device=answers.answer_mask.device)
        assert answers.behaviour_logps is not None
        return kl_k1(answers.behaviour_logps, evidence.reference_logps) * answers.answer_mask

    def over_batch(
        self, annotations: Credit, answers: Answers, evidence: Evidence, processes: Processes
    ) -> tuple[Credit, Mapping[str, Tensor | float]]:
        """Whiten advantages and adapt the weight of the KL penalty over the global batch; docs/metrics.md defines the
        logged names.
        """
        args, credit, mask = self.args, annotations, answers.answer_mask
        if args.whiten_advantages:
            credit = self.whitened(credit, mask, processes.sum(masked_moments(credit.advantages, mask)))
        kl, everywhere = processes.gather(self.kl(answers, evidence)), processes.gather(mask)
        mean_kl = masked_mean(kl, everywhere)
        moments = masked_moments(processes.gather(credit.advantages), everywhere)
        logged: dict[str, Tensor | float] = {
            **_of_signal(evidence.signal, mask),
            "kl_coef": self.kl_coef,
            "kl": mean_kl,
            "advantage_std": moments_to_mean_std(moments)[1],
        }
        if credit.values is not None and credit.returns is not None:
            values, returns = processes.gather(credit.values), processes.gather(credit.returns)
            logged["explained_variance"] = explained_variance(values, returns, everywhere)
        if evidence.task_scores is not None:
            logged["task_reward"] = evidence.task_scores.mean()
        # For the next batch: `credit` already holds the coefficient of this one.
        if args.kl_target is not None:
            self.kl_coef = adapt_kl_coef(self.kl_coef, float(mean_kl), args.kl_target)
        return credit, logged

    def whitened(self, credit: Credit, mask: Tensor, moments: Tensor) -> Credit:
        """The credit at mean 0 and standard deviation 1; as it is if it does not vary.

        The exact term and the rewards get the same scale as the advantages, so that their ratio is kept.
        """
        deviation = moments_to_mean_std(moments)[1]
        if deviation < SMALLEST_DEVIATION:
            # A floor in place of the deviation would multiply the exact term by its inverse.
            if not self.flat:
                logger.warning(
                    f"whiten_advantages: the advantages of a batch have a standard deviation of {deviation:.2g} nats, "
                    f"too small to divide by (below {SMALLEST_DEVIATION:g}): such batches are left as they are. Raise "
                    "lam, take more rollouts_per_prompt, or set whiten_advantages to false."
                )
            self.flat = True
            return credit
        scale = 1.0 / deviation
        advantages = whiten(credit.advantages, mask, moments)
        task = None if credit.task_credit is None else scale * credit.task_credit
        return replace(credit, advantages=advantages, rewards=scale * credit.rewards, scale=scale, task_credit=task)

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

    def token_function(self, signal: TeacherSignal | None) -> tuple[TokenFunction, tuple[Tensor, ...]]:
        if "distribution" not in self.needs:
            return token_statistics, ()
        assert signal is not None
        assert signal.distribution is not None
        expected, distribution = self.reward.expected, signal.distribution
        assert expected is not None

        def with_expectation(logits: Tensor, ids: Tensor, value: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            return *token_statistics(logits, ids), expected(logits, distribution.logits(*states), value)

        return with_expectation, (self.reward.state_value(signal), *distribution.token_args)

    @abstractmethod
    def policy_loss(self, logps: Tensor, minibatch: Minibatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Loss of the sampled tokens [B, R] from their log-probabilities under the student [B, R]; what is logged."""

    def state_weights(self, logps: Tensor, minibatch: Minibatch) -> Tensor | float:
        """Weight [B, R] of the exact one-step term at states an older policy reached; 1 unless a subclass corrects."""
        return 1.0

    def token_loss(self, student: StudentTokens, minibatch: Minibatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """policy loss - exact one-step term - entropy bonus + KL penalty + critic loss, [B, R]."""
        args = self.args
        credit: Credit = minibatch.annotations
        loss, logged = self.policy_loss(student.logps, minibatch)
        # The exact term: gradient of E_{a ~ pi}[r(s_t, a)] over the whole vocabulary, without sampling variance.
        if self.exact:
            loss = loss - credit.scale * self.state_weights(student.logps, minibatch) * student.extra[0]
        loss = loss - args.entropy_coef * student.entropy
        # k3 in the loss: non-negative per token; its expected gradient is that of KL(pi_0 || pi).
        if credit.kl_coef > 0 and args.kl_in == "loss" and credit.reference_logps is not None:
            loss = loss + credit.kl_coef * kl_k3(student.logps, credit.reference_logps)
        if credit.values is not None and credit.returns is not None:
            critic = value_loss(student.values, credit.values, credit.returns, args.value_clip_range)
            loss = loss + args.value_coef * critic
            logged = {**logged, "value_loss": critic}
        return loss, logged

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
    start_checks = (StartCheck,)

    def __init__(self, student: Any, args: RLArguments, **inputs: Any):
        self.task_reward = None if args.task_reward is None else TaskReward.of(args.task_reward)
        if self.task_reward is not None:
            self.task_reward.try_on(inputs["train_examples"])
        super().__init__(student, args, **inputs)

    def evidence(self, answers: Answers) -> Evidence:
        """As in `DistillationTrainer`, with the task's scores."""
        evidence = super().evidence(answers)
        return evidence if self.task_reward is None else replace(evidence, task_scores=self.task_scores(answers))

    def task_scores(self, answers: Answers) -> Tensor:
        """[B]. Raises the errors of a `TaskReward` on every process."""
        assert self.task_reward is not None
        texts = [ids[mask].tolist() for ids, mask in zip(answers.answer_ids, answers.answer_mask, strict=True)]
        scores: list[float] = []
        with self.errors_on_all():
            scores = self.task_reward(decode_texts(self.tokenizer, texts), answers.examples)
        return torch.tensor(scores, device=answers.answer_ids.device)

    def rollout_samples(self) -> list[Sample]:
        """As in `OnPolicyTrainer`, with the task's scores as facts."""
        samples = super().rollout_samples()
        scores = None if self.newest is None else self.newest.annotations.task_scores
        if scores is None:
            return samples
        return [
            replace(sample, facts={**sample.facts, "task_reward": float(score)})
            for sample, score in zip(samples, scores, strict=True)
        ]


def _of_signal(signal: TeacherSignal | None, mask: Tensor) -> dict[str, Tensor | float]:
    """Regret and the teacher's log-probability per answer, its entropy per token, as far as the signal has them."""
    assert signal is not None
    logged: dict[str, Tensor | float] = {}
    if signal.max is not None:
        logged["regret"] = regret_per_sequence(signal.chosen - signal.max, mask).mean()
    if signal.logsumexp is not None:
        logged["teacher_logprob"] = ((signal.chosen - signal.logsumexp) * mask).sum(1).mean()
    if signal.entropy is not None:
        logged["teacher_entropy"] = signal.entropy
    return logged
