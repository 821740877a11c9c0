"""Memory of one device in each phase of a training, from its settings: the training's own code runs on weights without
values (`models.weightless`), on prompts and answers of the greatest length.

    rollouts    the behaviour policy samples: keys and values of all answers, logits of one step
    evidence    the teacher's signal and the reference policy on a whole batch of rollouts
    update      forward and backward of one micro-batch
    optimizer   its step

Not counted, because settings do not tell it: evaluation, the context of CUDA, what an allocator cannot use again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..models.architectures import architecture_of
from ..models.encoder_decoder import separate_head
from ..models.footprint import count_parameters
from ..models.heads import HeadOverStates
from ..models.language_model import LanguageModel
from ..models.policy import Policy
from ..models.spec import ModelSpec
from ..models.weightless import Ledger, fake_weights, size_of, unset_fake, weightless, without_memory
from ..objectives.rewards import token_scores
from ..records import Answers, Example, Imitation, Minibatch, TeacherSignal
from ..sampling.decode import decode, sampler
from ..settings.trl_compat import ModelConfig
from ..tensors import pad_rows, unpack
from ..trainers.arguments import OnPolicyArguments, RLArguments
from ..trainers.base_arguments import DistillationArguments
from ..trainers.core import StudentTrainer
from ..trainers.distillation import DistillationTrainer
from ..trainers.objective import Evidence, Objective
from .models import load_student

FEW = 4  # rows on which the evidence is computed; more of them take so much more
FIRST = 3  # of the ids of prompts, after those that end or pad texts in most vocabularies
SEEDS = [0]
CACHE = "teacher's prompt cache, at most"


@dataclass(frozen=True)
class Phase:
    """What is held at the peak of a phase, bytes by the name of the part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass
class Rehearsal:
    """A training of a language model without memory.

    student   as it is to be trained;  peft, the settings of its adapter
    teachers  of which weights are here;  base, whether the student's base is the teacher
    gives     what there is of a teacher's signal
    cache     bytes of prompt states that each teacher keeps, at most;  rows, inputs, None if it is not known how many
    processes  that share the gradients
    """

    student: ModelSpec
    peft: ModelConfig
    teachers: Sequence[ModelSpec]
    training: DistillationArguments
    objective: Objective
    templates: int = 1
    base: bool = False
    cache: int = 0
    rows: int | None = None
    processes: int = 1
    ledger: Ledger = field(default_factory=Ledger)
    operations: dict[str, int] = field(default_factory=dict)
    state_bytes: int = 0

    def phases(self) -> list[Phase]:
        """The phases in their order."""
        with without_memory():
            _ = self.policy, self.scorers
            with self.ledger:
                rl = isinstance(self.training, OnPolicyArguments)
                found = [*(self._before_updates() if rl else ()), self._update(), self._optimizer()]
        cached = {CACHE: self._cached()} if self.state_bytes else {}
        return [replace(phase, parts={**phase.parts, **cached}) for phase in found]

    def _cached(self) -> int:
        """Bytes of prompts' states that teachers keep: of all rows, if it is known how many, or the most."""
        full = self.cache * max(len(self.teachers), 1)
        return full if self.rows is None else min(full, self.rows * self.templates * self.state_bytes)

    # Models

    @cached_property
    def policy(self) -> Policy:
        spec = replace(self.student, random_weights=True, device=None)
        model = weightless(lambda: load_student(spec, self.peft, self.training.seed))
        lm = wrapped(model, separate=not self.student.random_weights)
        with unset_fake():
            policy = Policy(lm, critic=self.objective.critic)
        if policy.value_head is not None:
            fake_weights(policy.value_head)
        return policy

    @cached_property
    def scorers(self) -> list[LanguageModel]:
        """The teachers."""
        return [self.policy.lm] if self.base else [without_weights(spec) for spec in self.teachers]

    @cached_property
    def held(self) -> dict[str, int]:
        """Weights that are there all the time, and what a teacher keeps of prompts."""
        parts = {"student": size_of(self.policy)}
        if isinstance(self.training, OnPolicyArguments):
            parts["reference policy"] = self.copied
            if self.training.sync_every > 1:
                parts["behaviour policy"] = self.copied
        if not self.base:
            parts["teacher"] = sum(size_of(lm.model) for lm in self.scorers)  # type: ignore[attr-defined]
        return parts

    @property
    def copied(self) -> int:
        """Bytes of a frozen copy (`Policy.frozen_copy`): of what is trained."""
        return size_of(self.policy, trained=True)

    @property
    def gradients(self) -> int:
        """Bytes of the gradients; DistributedDataParallel keeps them a second time, in buckets."""
        return size_of(self.policy, trained=True) * (1 if self.processes == 1 else 2)

    # Phases

    def _before_updates(self) -> Iterator[Phase]:
        args: Any = self.training
        rows, ledger = args.rows_per_rollout, self.ledger
        common = {**self.held, "optimizer state": self.state}
        growth: list[int] = []
        before, operations = ledger.now, ledger.operations
        ledger.start()
        self.policy.eval()
        sample = sampler(SEEDS * rows, args.max_new_tokens, torch.device("cpu"))

        def choose(log_probs: Tensor, live: Tensor, step: int) -> Tensor:
            sample(log_probs, live, step)
            growth.append(ledger.now)
            return torch.full((rows,), FIRST)

        with self.autocast(), torch.no_grad():
            states = self.policy.lm.prompt_states(_prompts(args.max_input_tokens, rows // args.rollouts_per_prompt))
            several = [state for state in states for _ in range(args.rollouts_per_prompt)]
            decode(self.policy.lm, several, choose, max_new_tokens=min(args.max_new_tokens, 3))
        # Of each further token, the keys and values.
        later = (growth[-1] - growth[-2]) * (args.max_new_tokens - len(growth)) if len(growth) == 3 else 0
        peak = ledger.peak - before + later
        del states, several
        self.operations["rollouts"] = ledger.operations - operations
        yield Phase("rollouts", {**common, "prompts, keys and values, logits": peak})
        peak, self.batch = self._evidence_of_batch(rows)
        yield Phase("evidence", {**common, "batch of rollouts": self.batch, "hidden states, logits": peak})

    def _evidence_of_batch(self, rows: int) -> tuple[int, int]:
        """Bytes at the peak beyond the batch, and of the batch, with what is kept of models for its updates."""
        few, ledger = min(rows, FEW), self.ledger
        before, operations = ledger.now, ledger.operations
        ledger.start()
        args: Any = self.training
        answers = self._answers(few, max(few // args.rollouts_per_prompt, 1))
        kept = self._minibatch(answers)
        batch, peak = ledger.now - before, ledger.peak - before
        del kept, answers
        self.operations["evidence"] = (ledger.operations - operations) * rows // few
        return max(peak - batch, 0), batch * rows // few

    def _update(self) -> Phase:
        """A micro-batch; if an update has several, gradients are there from the one before."""
        args: Any = self.training
        rows, ledger = args.per_device_train_batch_size, self.ledger
        rl = isinstance(args, OnPolicyArguments)
        per_prompt = max(args.rollouts_per_prompt // args.minibatches_per_rollout, 1) if rl else 1
        answers = self._answers(rows, -(-rows // per_prompt))
        ready = self._minibatch(answers) if rl else None
        self.policy.train()
        if args.gradient_checkpointing:
            options = args.gradient_checkpointing_kwargs or {"use_reentrant": False}
            self.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        before, operations = ledger.now, ledger.operations
        if args.gradient_accumulation_steps > 1:
            fill_gradients(self.policy)
        ledger.start()
        minibatch = self._minibatch(answers) if ready is None else ready
        if isinstance(args, RLArguments) and args.imitation_coef > 0:
            imitation = Imitation(labels=self._answers(rows, rows), tokens=1.0, coef=1.0)
            minibatch = replace(minibatch, imitation=imitation)
        self._loss(minibatch).backward()
        self.operations["update"] = ledger.operations - operations
        peak = ledger.peak - before
        grown = self.gradients if self.processes > 1 else 0
        own = size_of(self.policy, trained=True)
        parts = {**self.held, "optimizer state": self.state, "gradients": own + grown // 2}
        if rl:
            parts["batch of rollouts"] = self.batch
        return Phase("update", {**parts, "activations, logits": max(peak - own, 0)})

    def _loss(self, minibatch: Minibatch) -> Tensor:
        """As `DistillationTrainer.compute_loss`, without what it logs."""
        function, token_args = self.objective.token_function(minibatch.signal, minibatch.annotations)
        labels = None if minibatch.imitation is None else minibatch.imitation.labels.policy_inputs
        loss = DistillationTrainer.row_loss(self, minibatch)  # type: ignore[arg-type]
        with self.autocast():
            total, _, *beside = self.policy(*minibatch.answers.policy_inputs, function, token_args, labels, loss)
        return total + sum(one.sum() for one in beside)

    def _optimizer(self) -> Phase:
        """Its step, with gradients of all that is trained."""
        return Phase("optimizer", {**self.held, "optimizer state": self.state, "gradients": self.gradients,
                                   "in the step": self.in_step})  # fmt: skip

    @property
    def state(self) -> int:
        return self._stepped[0]

    @property
    def in_step(self) -> int:
        return self._stepped[1]

    @cached_property
    def _stepped(self) -> tuple[int, int]:
        return optimizer_bytes(self.training, self.policy, self.ledger)

    def parameters(self) -> dict[str, int]:
        """Parameters by the name of the model, those of adapters included."""
        models: dict[str, Any] = {"student": self.policy.student}
        for spec, lm in zip(self.teachers, [] if self.base else self.scorers, strict=True):
            models[spec.name if len(self.teachers) > 1 else "teacher"] = lm.model  # type: ignore[attr-defined]
        return {name: count_parameters(model) for name, model in models.items()}

    def saved(self) -> tuple[int, int]:
        """Bytes of the saved student (with use_peft, of its adapter), and of a checkpoint."""
        student = size_of(self.policy.student)
        if self.peft.use_peft:
            student = size_of(self.policy.student, trained=True)
        lags = isinstance(self.training, OnPolicyArguments) and self.training.sync_every > 1
        return student, student + self.state + (self.copied if lags else 0)

    # What the trainers' own functions read, on a stand-in for a trainer

    @property
    def accelerator(self) -> Rehearsal:
        return self

    @contextmanager
    def autocast(self) -> Iterator[None]:
        kind = {"bf16": torch.bfloat16}.get(self.training.mixed_precision)
        with torch.autocast("cpu", dtype=kind or torch.bfloat16, enabled=kind is not None):
            yield

    @property
    def reference(self) -> Policy:
        return self.policy  # of the same shape

    def _minibatch(self, answers: Answers) -> Minibatch:
        """Answers as the objective sees them before an update."""
        self.policy.eval()
        with torch.no_grad():
            evidence: Evidence = DistillationTrainer.evidence(self, answers)  # type: ignore[arg-type]
            annotations = self.objective.annotate(answers, evidence)
        self.policy.train()
        return Minibatch(answers=answers, signal=evidence.signal, annotations=annotations, denominator=1.0)

    def score(self, answers: Answers, *, distribution: bool) -> TeacherSignal:
        """As `Teacher.score`; zeros for a teacher that is elsewhere."""
        mask, found = answers.answer_mask, []
        if not self.scorers:
            return _signal(*(torch.zeros(mask.shape) for _ in range(5)))
        for lm in self.scorers:
            head, before = lm.head(), self.ledger.operations
            states = lm.prompt_states(_prompts(self.training.max_input_tokens, 1))  # each prompt alone
            prompts = len(set(map(tuple, answers.input_ids.tolist())))
            self.ledger.operations += (self.ledger.operations - before) * (prompts * self.templates - 1)
            self.state_bytes = max(self.state_bytes, states[0].nbytes)
            states = [state.clone() for state in states for _ in answers.examples]
            hidden = [lm.answer_hidden(states, answers.answer_ids, mask) for _ in range(self.templates)]
            mixed, mean_head = head.mixed(hidden)
            values = mean_head.map(token_scores, mixed, answers.answer_ids[mask])
            signal = _signal(*(unpack(value, mask) for value in values))
            kept = HeadOverStates(unpack(mixed, mask), mean_head)
            found.append(replace(signal, distribution=kept) if distribution else signal)
        return found[0]

    def ending(self, answers: Answers) -> TeacherSignal:
        return _signal(*(torch.zeros(len(answers.examples), 1) for _ in range(5)))

    def _answers(self, rows: int, prompts: int) -> Answers:
        """Rows of the greatest length, evenly of so many prompts; every second is shorter by a token."""
        args = self.training
        texts = _prompts(args.max_input_tokens, prompts)
        input_ids, input_mask = pad_rows([texts[i * prompts // rows] for i in range(rows)], 0)
        lengths = [max(args.max_new_tokens - i % 2, 1) for i in range(rows)]
        answer_ids, answer_mask = pad_rows([[FIRST] * length for length in lengths], 0)
        examples = [Example("", "", ("",))] * rows
        rl = isinstance(args, OnPolicyArguments)
        logps = torch.zeros(answer_mask.shape) if rl else None
        finished = torch.ones(rows, dtype=torch.bool) if rl else None
        return Answers(examples, input_ids, input_mask, answer_ids, answer_mask, logps, finished)


def fill_gradients(model: Any) -> None:
    """Gradients as an earlier micro-batch leaves them."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def optimizer_bytes(args: Any, model: Any, ledger: Ledger) -> tuple[int, int]:
    """Bytes of the optimizer's state, and what its second step takes for a while."""
    trained = [p for p in model.parameters() if p.requires_grad]
    kind, options = StudentTrainer.get_optimizer_cls_and_kwargs(args)
    fill_gradients(model)
    before, optimizer = ledger.now, kind(trained, **options)
    optimizer.step()
    state = ledger.now - before
    ledger.start()
    optimizer.step()
    peak = ledger.peak - before - state
    optimizer.zero_grad()
    return state, peak


def wrapped(model: Any, *, separate: bool) -> LanguageModel:
    """A model as training uses it; separate: with a head of its own where trained checkpoints have one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if separate:
        separate_head(base)
    name = getattr(base.config, "name_or_path", None) or type(base).__name__
    return architecture_of(base.config, "model", name).wrap(model, base.config.vocab_size)


def without_weights(spec: ModelSpec) -> LanguageModel:
    """A teacher without memory, frozen."""
    make: Callable[[], Any] = replace(spec, random_weights=True, device=None, quantization=None).load
    lm = wrapped(weightless(make), separate=not spec.random_weights)
    lm.model.eval().requires_grad_(False)  # type: ignore[attr-defined]
    return lm


def _prompts(tokens: int, count: int) -> list[list[int]]:
    """Different prompts of the greatest length, every second one shorter by a token."""
    return [[FIRST + i % 7] * 2 + [FIRST + i // 7 % 1000] * max(tokens - 2 - i % 2, 1) for i in range(count)]


def _signal(chosen: Tensor, largest: Tensor, logsumexp: Tensor, mean: Tensor, entropy: Tensor) -> TeacherSignal:
    return TeacherSignal(chosen=chosen, max=largest, logsumexp=logsumexp, mean=mean, entropy=entropy)
