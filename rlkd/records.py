"""The records that travel between packages, one per arrow of the data flow. Shape legend: `rlkd.tensors`.

rows -> PromptedRow -> PseudoLabel (to disk) -> answers -> loss
     -> Example -> Answers -> TeacherSignal -> annotations (credit) -> loss
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Known = TypeVar("Known")


class Batched:
    """A record whose tensors and lists have one entry per row, in the first dimension; see `select_rows`."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Example:
    """One unlabeled input, as both models see it.

    id              stable name of the row
    student_input   text the student encodes
    teacher_inputs  the same input under each template, as the teacher encodes it (at least one)
    references      human answers, for evaluation only; may be empty
    """

    id: str
    student_input: str
    teacher_inputs: tuple[str, ...]
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row under one template, as the teacher reads it.

    text     None if there is none; status says why: `skipped` (the template does not apply, or the student has no
             input) or `failed` (the template raised), with the reason in `error`
    choices  the template's answers, to rank; None without
    missing  columns whose missing values it prints as words such as "None"
    unknown  (column, piece of text) that the tokenizer does not know
    """

    text: str | None
    status: str = "ok"
    error: str | None = None
    choices: tuple[str, ...] | None = None
    missing: tuple[str, ...] = ()
    unknown: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptedRow:
    """A row as both models see it, whether or not every template applies to it; `number` counts usable rows from 0.

    student: the student's input with its flaws, None if they are not known; second, the second text of a pair.
    """

    number: int
    id: str
    student_input: str
    references: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    student: Prompt | None = None
    second: str | None = None


@dataclass(frozen=True, slots=True)
class PseudoLabel:
    """One row of the label files: an answer of the teacher, or why there is none.

    row              number of the input row, counted from 0; id is its name
    template         its name; template_id its id
    status           ok; skipped (the template does not apply, no input, too long) or failed (the template raised)
    error            the reason, None if ok; what an answer would give is then None
    label            the answer as text; token_ids the exact tokens, end-of-sequence included
    sample           0 .. labels_per_input - 1
    n_in, n_out      tokens the teacher read, and wrote
    truncated        True if the prompt was cut to max_input_tokens
    finish_reason    eos; length (cut at max_new_tokens); ranked
    sum_logprob      natural log-probability of token_ids under the teacher, given teacher_input
    choices          answers that were ranked; choice_logprobs the sums they were ranked by
    top_ids          [n_out][k] most probable tokens at each step, if asked for; top_logps their log-probabilities
    model, revision  the teacher: name or folder, and commit or digest of the weights
    generation       hash of all that decides labels: equal hashes, equal labels
    """

    id: str
    row: int
    template: str
    template_id: str
    status: str
    error: str | None
    student_input: str
    references: list[str]
    sample: int
    model: str
    revision: str | None
    generation: str
    teacher_input: str | None = None
    label: str | None = None
    token_ids: list[int] | None = None
    n_in: int | None = None
    n_out: int | None = None
    truncated: bool | None = None
    finish_reason: str | None = None
    sum_logprob: float | None = None
    choices: list[str] | None = None
    choice_logprobs: list[float] | None = None
    top_ids: list[list[int]] | None = None
    top_logps: list[list[float]] | None = None


@dataclass(frozen=True, slots=True)
class Answers(Batched):
    """Answers to learn from, sampled from the behaviour policy or read from labels; rows of one prompt are adjacent.

    examples         the B inputs, one per row (repeated for several rollouts of a prompt)
    input_ids        [B, P] student prompt, right-padded;  input_mask [B, P] bool
    answer_ids       [B, R] tokens, end-of-sequence included;  answer_mask [B, R] bool
    behaviour_logps  [B, R] log mu, natural log-probability of each sampled token under the distribution that it was
                     drawn from; None for labels
    policy_logps     [B, R] that under the policy which sampled, at temperature 1; None where it is behaviour_logps: a
                     temperature, top_p or the teacher's share makes the difference
    cut_mass         [B, R] probability of the tokens that top_p left out; None without
    weights          [B] what the loss of each answer is multiplied by; None: 1
    finished         [B] bool, False where max_new_tokens cut the answer (not a terminal state); None for labels
    """

    examples: list[Example]
    input_ids: Tensor
    input_mask: Tensor
    answer_ids: Tensor
    answer_mask: Tensor
    behaviour_logps: Tensor | None = None
    finished: Tensor | None = None
    policy_logps: Tensor | None = None
    cut_mass: Tensor | None = None
    weights: Tensor | None = None

    @property
    def own_logps(self) -> Tensor | None:
        """[B, R] log-probability of each token under the policy that sampled; None for labels."""
        return self.behaviour_logps if self.policy_logps is None else self.policy_logps

    @property
    def ids(self) -> list[str]:
        """Name of each row."""
        return [example.id for example in self.examples]

    @property
    def policy_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a policy's forward reads: input_ids, input_mask, answer_ids, answer_mask."""
        return self.input_ids, self.input_mask, self.answer_ids, self.answer_mask


class Distribution(Protocol):
    """Access to a teacher's next-token distributions without storing them: logits are made chunk by chunk.

    token_args  tensors [B, R, ...], one entry per answer token
    logits      the logits [n, V] of n tokens, from their slices [n, ...] of `token_args`
    """

    @property
    def token_args(self) -> tuple[Tensor, ...]: ...

    def logits(self, *token_args: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class TopTokens(Batched):
    """The K most probable next tokens at each token of answers, best first; zeros at padding.

    ids    [B, R, K] int64;  logps  [B, R, K] natural log-probabilities
    """

    ids: Tensor
    logps: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSignal(Batched):
    """A teacher's signal for given answers, in the raw-logit gauge, float32; None for what it cannot provide.

    With several templates every field is the mean over templates (`average`) or comes from the
    renormalised mean log-probability (`pool`); see `rlkd.objectives.rewards`.

    chosen        [B, R] logit of the given token
    max           [B, R] largest logit
    logsumexp     [B, R] log-normaliser
    mean          [B, R] mean logit over the valid vocabulary
    entropy       [B, R] entropy of the next-token distribution, nats
    distribution  the next-token distributions themselves, if asked for
    top_k         their most probable tokens, where those alone were recorded
    """

    chosen: Tensor
    max: Tensor | None = None
    logsumexp: Tensor | None = None
    mean: Tensor | None = None
    entropy: Tensor | None = None
    distribution: Distribution | None = None
    top_k: TopTokens | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Imitation:
    """Labels imitated in the same update: coef / tokens * sum -log pi(label) is added to the loss.

    labels  rows of their own;  tokens  of all labels of the update, over all processes and accumulation steps
    """

    labels: Answers
    tokens: float
    coef: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch(Batched):
    """Rows of one evaluation of the loss.

    answers      the answers learned from
    signal       the teacher's signal for them; None if the objective uses no teacher
    annotations  what the objective derived from them before the first update, a `Batched` record or None
    denominator  what the summed loss is divided by, over all processes and accumulation steps; None: this batch's own
    imitation    labels to learn in the same update; None without
    """

    answers: Answers
    signal: TeacherSignal | None = None
    annotations: Any = None
    denominator: float | None = None
    imitation: Imitation | None = None


def given(value: Known | None) -> Known:
    """A field of a record that the caller knows to be there."""
    assert value is not None
    return value


def select_rows(record: Any, index: Tensor) -> Any:
    """The rows `index` [n] (int64) of a `Batched` record, nested records included; what has no rows is kept."""
    import torch

    def pick(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[index.to(value.device)]
        if isinstance(value, list):
            return [value[i] for i in index.tolist()]
        return select_rows(value, index) if isinstance(value, Batched) else value

    return replace(record, **{f.name: pick(getattr(record, f.name)) for f in fields(record)})
