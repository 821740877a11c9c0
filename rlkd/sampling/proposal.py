"""What answers are drawn from: the policy itself, or a proposal that is corrected for by importance weights.

    mu(a|s) = (1 - alpha) top_p(softmax(f(s, .) / T))(a) + alpha p(a|s)

for the policy's logits f and the teacher's distribution p. The mixture is that of MiniLLM (Gu et al. 2024, arXiv
2306.08543, eq. 4): it keeps rollouts where the teacher can say something.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.generation import next_limits, restrict, rules_of
from ..models.teacher import Teacher
from ..records import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """temperature T and top_p of the policy's share; alpha = teacher_mix, the share of `teacher`, in [0, 1)."""

    temperature: float = 1.0
    top_p: float = 1.0
    teacher_mix: float = 0.0
    teacher: Teacher | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the policy itself."""
        return self.temperature == 1 and self.top_p == 1 and self.teacher_mix == 0

    def own_share(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """log top_p(softmax(f / T)) [n, V] of the policy's logits f [n, V], and the probability [n] that was cut."""
        softened = logits if self.temperature == 1 else logits / self.temperature
        return truncate(softened.log_softmax(-1), self.top_p)

    def guide(self, examples: Sequence[Example]) -> TeacherGuide | None:
        """The teacher beside the answers to `examples`; None if it has no share."""
        if self.teacher_mix == 0:
            return None
        assert self.teacher is not None
        return TeacherGuide(self.teacher, [example.teacher_inputs for example in examples], self.teacher_mix)


PLAIN = Proposal()


def truncate(log_probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The smallest set of most probable tokens whose probability reaches `top_p` (Holtzman et al. 2020, arXiv
    1904.09751), renormalised: log-probabilities [n, V], -inf outside the set; and the probability [n] outside.
    """
    if top_p == 1:
        return log_probs, torch.zeros_like(log_probs[:, 0])
    ordered, index = log_probs.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.double().exp()
    # By what comes before it: the token that crosses top_p is kept, the most probable one always.
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    kept = log_probs.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), -torch.inf)
    log_mass = kept.logsumexp(-1, keepdim=True)
    return kept - log_mass, (1 - log_mass.exp()).squeeze(-1).clamp(min=0)


def mix(log_probs: Tensor, teacher_log_probs: Tensor, share: float) -> Tensor:
    """log((1 - share) pi + share p), [n, V], from log pi and log p, [n, V]."""
    return torch.logaddexp(math.log1p(-share) + log_probs, math.log(share) + teacher_log_probs)


class TeacherGuide:
    """The teacher's next token beside n answers that a student decodes, each under its own prompt.

    With several templates it is the renormalised mean log-probability, as in the exact one-step term; each costs a
    decoding step of the teacher. A prompt that several answers share is encoded once.
    """

    def __init__(self, teacher: Teacher, teacher_inputs: list[tuple[str, ...]], share: float):
        self.share, self.lm, self.head = share, teacher.lm, teacher.lm.head()
        self.answers = rules_of(self.lm).begin(len(teacher_inputs))
        with self._own_precision():
            per_template = [teacher.prompt_states(list(texts)) for texts in zip(*teacher_inputs, strict=True)]
            self.states = [self.lm.start(states) for states in per_template]

    def logits(self, tokens: Tensor | None) -> Tensor:
        """[n, V] of the next token after `tokens` [n]; None at the first step. The teacher's own `AnswerRules` hold."""
        if self.answers and tokens is not None:
            for answer, token in zip(self.answers, tokens.tolist(), strict=True):
                answer.append(token)
        with self._own_precision():
            hidden, head = self.head.mixed([state.step(tokens) for state in self.states])
            logits = head.logits(hidden)
        return restrict(logits, next_limits(self.answers, logits.device) if self.answers else None)

    def keep(self, rows: Tensor) -> None:
        """Continue with the answers `rows` [m] only."""
        for state in self.states:
            state.keep(rows)
        self.answers = [self.answers[i] for i in rows.tolist()] if self.answers else []

    def _own_precision(self) -> torch.autocast:
        # As where the teacher scores: its prompt states are cached, and must not depend on who asked first.
        return torch.autocast(self.lm.device.type, enabled=False)
