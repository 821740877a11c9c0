"""A teacher on a server: its signal, from the log-probabilities that the server gives of prompt and answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ModelError
from ..objectives.rewards import average_templates
from ..records import TeacherSignal
from ..tensors import pad_stack
from .digests import tokenizer_digest
from .generation import AnswerRules
from .server import Server, ServerSettings
from .spec import TeacherSpec
from .vocabulary import encode_prompts


@dataclass
class ServerTeacher:
    """A decoder-only teacher on a server, of which only configuration and tokenizer are here.

    name              of the teacher: the folder or hub id with its configuration and tokenizer
    server, tokenizer
    rules             what its checkpoint says of answers: those that change probabilities are refused (`check_rules`)
    max_input_tokens  prompts are cut to this;  append_eos: whether they end with end-of-sequence
    normalises        whether the server's probabilities are over the tokenizer's ids alone, without spare rows of the
                      embedding; then log-probabilities are exact, too, not only their differences
    The signal is in the log-probability gauge. Several templates are averaged.
    """

    model: ClassVar[None] = None

    name: str
    server: Server
    tokenizer: Any
    rules: AnswerRules
    max_input_tokens: int = 512
    append_eos: bool = False
    normalises: bool = True

    @classmethod
    def of(cls, spec: TeacherSpec, settings: ServerSettings) -> ServerTeacher:
        """The teacher that `spec` describes, served as `settings` say. Raises ModelError if a server cannot score it
        exactly; nothing is asked.
        """
        check_served(spec.model)
        return cls(
            spec.model.name,
            Server(settings, spec.model.valid_vocab, spec.tokenizer),
            spec.tokenizer,
            spec.rules,
            spec.max_input_tokens,
            spec.append_eos,
            normalises(spec.model),
        )

    @property
    def gives(self) -> frozenset[str]:
        """The chosen and the best token; also the normaliser, which is 0, if it is over the tokenizer's ids alone."""
        return frozenset({"chosen", "max", "logsumexp"} if self.normalises else {"chosen", "max"})

    def identity(self) -> dict[str, str]:
        """What a resumed run must find again, as far as a server tells it: not its weights."""
        return {
            "teacher's model on the server": self.server.model,
            "teacher's reading": f"{self.max_input_tokens} tokens, append_eos {self.append_eos}",
            "teacher's tokenizer": tokenizer_digest(self.tokenizer),
        }

    def score(
        self,
        teacher_inputs: list[tuple[str, ...]],
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        distribution: bool = False,
        ids: list[str] | None = None,
    ) -> TeacherSignal:
        """As in `SignalSource`: chosen and max are the server's, one log-probability for each token (`prompt_logprobs`
        1). Raises as `Server.score`.
        """
        templates, answers = len(teacher_inputs[0]), _rows(answer_ids, answer_mask)
        prompts = [self.prompt_ids([texts[k] for texts in teacher_inputs]) for k in range(templates)]
        scores = self.server.score([ids for of_k in prompts for ids in of_k], answers * templates)
        signals = []
        for first in range(0, len(scores), len(answers)):
            rows = scores[first : first + len(answers)]

            def grid(number: Callable[[Any], float], rows: list[Any] = rows) -> Tensor:
                return _grid([[number(token) for token in row] for row in rows], answer_ids)

            chosen, best = grid(lambda token: token.chosen), grid(lambda token: token.best[0][1])
            logsumexp = torch.zeros_like(chosen) if self.normalises else None
            signals.append(TeacherSignal(chosen=chosen, max=best, logsumexp=logsumexp))
        return average_templates(signals) if templates > 1 else signals[0]

    def greedy(self, texts: list[str], max_new_tokens: int) -> list[list[int]]:
        """The token ids of its greedy answers. Raises as `Server.generate`."""
        return self.server.generate(self.prompt_ids(texts), self.rules, max_new_tokens)

    def prompt_ids(self, texts: list[str]) -> list[list[int]]:
        """Prompts as the model reads them."""
        return encode_prompts(self.tokenizer, texts, self.max_input_tokens, append_eos=self.append_eos)


def _rows(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def _grid(rows: list[list[float]], like: Tensor) -> Tensor:
    """Numbers of the tokens of answers [B, R] in their places, zeros at padding."""
    grid = pad_stack([torch.tensor(row, dtype=torch.float32) for row in rows], 0.0)
    return torch.nn.functional.pad(grid, (0, like.shape[1] - grid.shape[1])).to(like.device)


def normalises(model: Any) -> bool:
    """Whether the model (a `ModelSource`) has no rows for ids beyond its tokenizer's, which servers give a share."""
    return bool(model.config.vocab_size == model.valid_vocab)


def unservable(model: Any) -> str | None:
    """Why a server's numbers are not those of this model (a `ModelSource`), as a sentence; None if they are."""
    rules = model.rules
    if rules.end_of_prompts:
        return "servers score prompt and answer as one sequence, as decoder-only models read them, which it is not."
    changed = {**rules.moving, "forced_bos_token_id": rules.first, "forced_eos_token_id": rules.last,
               "suppress_tokens": rules.banned}  # fmt: skip
    if named := [name for name, value in changed.items() if value not in (None, ())]:
        return f"its generation_config has {', '.join(named)}, which servers do not apply to the prompts they score."
    return None


def check_served(model: Any) -> None:
    """Raise ModelError if a server cannot score with this model exactly."""
    if reason := unservable(model):
        raise ModelError(f"teacher '{model.name}' cannot be asked on a server: {reason} Set teacher_signal to model.")
