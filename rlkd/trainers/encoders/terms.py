"""The terms of the loss in one dictionary, and the methods of the literature as lists of them.

    L = sum over terms of weight x term

A term says what it needs of teacher and student: the models then give just that, and the cache keeps just that. Its
formula is in `objectives.encoder` (TKD and its ablations) or `objectives.neighbours` (other papers).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...evaluation.problems import Problem
from ...models.encoders.attention import comparable_maps
from ...models.encoders.outputs import EncoderOutputs, Need
from ...objectives.attention_tree import all_tokens, attention_tree, cls_token, random_tokens
from ...objectives.encoder import token_distance
from ...objectives.neighbours import (
    activation_boundaries,
    gradient_distance,
    gram_loss,
    input_gradient,
    logit_mse,
    minilm_relation,
    noisy_logits,
    tinybert_attention,
    tinybert_hidden,
)

if TYPE_CHECKING:
    from .arguments import TKDArguments


@dataclass(frozen=True)
class Batch:
    """What the terms of one micro-batch are computed from.

    student, teacher  outputs of both; the teacher's are those of the matched layers; logits of words are [words, C]
    problem           what the logits are
    labels            as in `evaluation.problems`; of words [words]
    ids [B, L], valid [B, L] (False for padding)
    heads             attention heads of student and teacher
    special           token ids of `cls` and `sep`
    """

    args: TKDArguments
    student: EncoderOutputs
    teacher: EncoderOutputs
    problem: Problem
    labels: Tensor
    ids: Tensor
    valid: Tensor
    heads: Mapping[str, int]
    special: Mapping[str, int | None]

    @cached_property
    def student_tree(self) -> list[Tensor]:
        """Counts [B, H, L] of each layer, of the tree grown in the student's attention."""
        return self.tree("student")

    def tree(self, role: str) -> list[Tensor]:
        """Counts [B, H, L] of each layer, of the tree grown in one model's attention, as the settings have it."""
        args, choosable = self.args, self.valid
        for name in set(args.tree_exclude) & self.special.keys():
            choosable = choosable & (self.ids != self.special[name])
        return attention_tree(
            [layer.rows for layer in (self.student if role == "student" else self.teacher).attention],
            choosable,
            self.heads[role],
            args.tree_m,
            variant=args.tree_variant,
            with_multiplicity=args.tree_multiplicity,
            exclude_self="self" in args.tree_exclude,
        )

    def distance(self, counts: list[Tensor]) -> Tensor:
        """Distance of the states of selected tokens; counts of [CLS] alone have length 1."""
        own, theirs = (
            [h[:, : counts[0].shape[-1]].float() for h in out.hidden[: len(counts)]]
            for out in (self.student, self.teacher)
        )
        options = {"normalise": self.args.normalise, "reduction": self.args.distance_reduction}
        return token_distance(own, theirs, counts, **options)  # type: ignore[arg-type]


def _patience(b: Batch) -> Tensor:
    layers = len(b.student.hidden) - (not b.args.patience_last_layer)
    return b.distance([cls_token(b.valid[:, :1])] * layers)


def _noisy(b: Batch) -> Tensor:
    noisy = noisy_logits(b.teacher.logits, b.args.noise_probability, b.args.noise_deviation)
    return logit_mse(b.student.logits, noisy)


def _over_layers(loss: Callable[..., Tensor], student: Collection[Tensor], teacher: Collection[Tensor], mask: Tensor,
                 ) -> Tensor:  # fmt: skip
    """The sum over pairs of layers, as TinyBERT's eq. 11 has it."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([loss(own.float(), theirs.float(), mask) for own, theirs in pairs]).sum()


def _attention(b: Batch) -> Tensor:
    maps = [comparable_maps(*pair) for pair in zip(b.student.attention, b.teacher.attention, strict=True)]
    return _over_layers(tinybert_attention, [own for own, _ in maps], [theirs for _, theirs in maps], b.valid)


def _relations(b: Batch) -> Tensor:
    heads = b.args.relation_heads or b.heads["teacher"]

    def relation(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        return minilm_relation(student, teacher, mask, heads)

    return _over_layers(relation, b.student.relations, b.teacher.relations, b.valid)


def _gradient(b: Batch) -> Tensor:
    label = b.teacher.logits.argmax(-1)
    own = input_gradient(b.student.logits.float(), label, b.student.inputs[0], differentiable=True)
    return gradient_distance(own, b.teacher.gradient[0])


@dataclass(frozen=True)
class Term:
    """One term of the loss.

    loss      its value, a scalar
    summary   what it compares, in few words
    teacher   what it needs of the teacher; empty: no teacher
    student   what it needs of the student, besides its logits
    setting   the setting with its weight; a term without one has weight 1, or that of `terms`
    late      waits for `tree_start_epoch`
    same_heads  whether both models must have equally many attention heads
    of_text     whether it reads one vector or one logit of the whole text, which classifiers of words do not have
    """

    loss: Callable[[Batch], Tensor]
    summary: str
    teacher: frozenset[Need] = frozenset()
    student: frozenset[Need] = frozenset()
    setting: str | None = None
    late: bool = False
    same_heads: bool = False
    of_text: bool = False

    @property
    def of_logits(self) -> bool:
        """Whether it reads logits and labels alone, so that the models may differ in everything else."""
        return self.teacher <= {"logits"}


def _needs(*names: Need) -> frozenset[Need]:
    return frozenset(names)


_STATES = _needs("hidden")
_GROWN = _needs("hidden", "tree")

TERMS: dict[str, Term] = {
    "ce": Term(lambda b: b.problem.loss(b.student.logits, b.labels), "labels", setting="w_ce"),
    "kd": Term(
        lambda b: b.problem.distillation(b.student.logits, b.teacher.logits, b.args.temperature),
        "logits, KL at the temperature", _needs("logits"), setting="w_kd",
    ),
    "mse": Term(
        lambda b: logit_mse(b.student.logits, b.teacher.logits), "logits, squared", _needs("logits"), setting="w_kd"
    ),
    "noisy": Term(_noisy, "logits with noise, squared", _needs("logits"), setting="w_kd"),
    "pt": Term(_patience, "[CLS] of every layer", _needs("cls"), _needs("cls"), setting="beta", of_text=True),
    "td_student": Term(
        lambda b: b.distance(b.student_tree), "tokens of the student's tree", _STATES, _GROWN, "gamma_s", late=True,
        of_text=True,
    ),
    "td_teacher": Term(
        lambda b: b.distance(b.tree("teacher")), "tokens of the teacher's tree", _GROWN, _STATES, "gamma_t", late=True,
        of_text=True,
    ),
    "td_random": Term(
        lambda b: b.distance([random_tokens(level, b.valid) for level in b.student_tree]),
        "random tokens, as many as in the student's tree", _STATES, _GROWN, "gamma_r", late=True, of_text=True,
    ),
    "all": Term(
        lambda b: b.distance([all_tokens(b.valid, b.heads["student"])] * len(b.student.hidden)),
        "all tokens", _STATES, _STATES, "eta", late=True,
    ),
    "embedding": Term(
        lambda b: _over_layers(tinybert_hidden, b.student.embeddings, b.teacher.embeddings, b.valid),
        "what the first layer reads", _needs("embeddings"), _needs("embeddings"),
    ),
    "hidden": Term(
        lambda b: _over_layers(tinybert_hidden, b.student.hidden, b.teacher.hidden, b.valid),
        "hidden states, not normalised", _STATES, _STATES,
    ),
    "attention": Term(
        _attention, "attention scores", _needs("attention"), _needs("attention"), same_heads=True
    ),
    "relations": Term(
        _relations, "relations of queries, keys, values in the last layer", _needs("relations"), _needs("relations")
    ),
    "gram": Term(
        lambda b: _over_layers(gram_loss, b.student.plain, b.teacher.plain, b.valid),
        "Gram matrices of hidden states", _STATES, _STATES,
    ),
    "boundaries": Term(
        lambda b: _over_layers(activation_boundaries, b.student.neurons, b.teacher.neurons, b.valid),
        "on or off, each feed-forward neuron", _needs("neurons"), _needs("neurons"),
    ),
    "gradient": Term(
        _gradient, "gradients by the word embeddings", _needs("gradient"), _needs("gradient"), of_text=True
    ),
}  # fmt: skip

# Methods by name: the terms that are on. The first eleven are the rows of Table 1 of the TKD paper.
PRESETS: dict[str, tuple[str, ...]] = {
    "ft": ("ce",),
    "kd": ("ce", "kd"),
    "pkd": ("ce", "kd", "pt"),
    "tkd": ("ce", "kd", "pt", "td_student"),
    "teacher-tkd": ("ce", "kd", "pt", "td_teacher"),
    "t-s-tkd": ("ce", "kd", "pt", "td_student", "td_teacher"),
    "rand": ("ce", "kd", "pt", "td_random"),
    "all": ("ce", "kd", "pt", "all"),
    "all-tkd": ("ce", "kd", "pt", "td_student", "all"),
    "all-t-tkd": ("ce", "kd", "pt", "td_teacher", "all"),
    "all-t-s-tkd": ("ce", "kd", "pt", "td_student", "td_teacher", "all"),
    "logit-mse": ("ce", "mse"),
    "noisy-logits": ("ce", "noisy"),
    "tinybert": ("kd", "embedding", "hidden", "attention"),
    "minilm": ("ce", "kd", "relations"),
    "nst": ("ce", "kd", "gram"),
    "boundaries": ("ce", "kd", "boundaries"),
    "derivatives": ("ce", "kd", "gradient"),
    "custom": (),  # those of `terms` alone
}


def needs_of(names: Collection[str], role: str) -> frozenset[Need]:
    """What these terms need of `teacher` or `student`, together. `hidden` includes `cls`."""
    found: set[Need] = set()
    for name in names:
        found |= TERMS[name].teacher if role == "teacher" else TERMS[name].student
    return frozenset(found - ({"cls"} if "hidden" in found else set()))


def compared_parts(names: Collection[str]) -> set[str]:
    """The outputs that these terms compare element by element, which takes equal widths or a projection."""
    parts = {"embedding": "embeddings", "boundaries": "neurons", "hidden": "hidden", "pt": "hidden"}
    return {parts.get(name, "hidden") for name in names if name in parts or TERMS[name].late}
