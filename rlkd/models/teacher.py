"""The frozen teacher: it generates labels and scores the students' answers.

Scoring is one teacher-forced forward per answer. The states of prompts are cached, answers are batched by length, only
valid tokens reach the head, and the head runs in chunks: logits [B, R, V] never exist.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from accelerate.utils.memory import find_executable_batch_size, should_reduce_batch_size
from torch import Tensor

from ..checks import check_settings
from ..errors import DivergenceError, ModelError
from ..objectives.rewards import average_templates, token_scores
from ..records import TeacherSignal, given
from ..tensors import unpack
from .generation import AnswerRules, rules_of
from .heads import Head, HeadOverStates
from .language_model import LanguageModel
from .signals import SIGNAL, LocalSource, Write
from .vocabulary import encode_prompts, end_of_prompts

TemplateCombination = Literal["average", "pool"]
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class PromptCache:
    """`LanguageModel.prompt_states` by prompt, least recently used out first, bounded by `max_bytes`."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._states: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def get(self, key: tuple[int, ...]) -> Tensor | None:
        state = self._states.get(key)
        if state is None:
            self.misses += 1
        else:
            self.hits += 1
            self._states.move_to_end(key)
        return state

    def put(self, key: tuple[int, ...], state: Tensor) -> None:
        size = state.numel() * state.element_size()
        if size > self.max_bytes or key in self._states:
            return
        # A slice of a larger tensor would keep all of it alive.
        self._states[key] = state.clone()
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, old = self._states.popitem(last=False)
            self.bytes -= old.numel() * old.element_size()


@dataclass
class Teacher(LocalSource):
    """A frozen language model with its tokenizer, which says whether prompts stand in a chat template
    (`chat.with_chat`).

    max_input_tokens  prompts are cut to this
    append_eos        end inputs with end-of-sequence (T5, Flan-T5: yes; T0: no); None: as the model reads them
    combination       several templates of one input: average their rewards, or pool their log-probs
    batch_tokens      padded tokens per forward; less uses less memory and changes no result
                      (halved when memory runs out)
    cache_bytes       memory for the states of prompts seen before
    Raises ConfigError for another combination, and for an end of prompts that answers continue.
    """

    gives: ClassVar[frozenset[str]] = SIGNAL  # type: ignore[misc]

    lm: LanguageModel
    tokenizer: Any
    max_input_tokens: int = 512
    append_eos: bool = None  # type: ignore[assignment]  # a bool from here on
    combination: TemplateCombination = "average"
    batch_tokens: int = 4096
    cache_bytes: int = 512 * 2**20
    cache: PromptCache = field(init=False)

    def __post_init__(self) -> None:
        self.append_eos = end_of_prompts(self.append_eos, self.rules, self.tokenizer)
        check_settings(self)
        self.lm.model.eval().requires_grad_(False)
        self.cache = PromptCache(self.cache_bytes)

    @property
    def rules(self) -> AnswerRules:
        """What its checkpoint says of answers."""
        return rules_of(self.lm)

    @property
    def longest_answer(self) -> int | None:
        """Tokens of the longest answer that the model has positions for; None: any length."""
        return self.lm.positions.longest_answer(self.max_input_tokens)

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.lm.model

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def teachers(self) -> dict[str, Teacher]:
        return {"teacher": self}

    def prompt_states(self, texts: list[str]) -> list[Tensor]:
        """The state of each text as a prompt; only those that are not in the cache are computed.

        Each is computed alone. In a batch its last bits would depend on the other prompts and their padding, so on
        what the cache held: a resumed run, whose cache is empty, would not be the run that it continues.
        """
        rows = encode_prompts(self.tokenizer, texts, self.max_input_tokens, append_eos=self.append_eos)
        keys = [tuple(ids) for ids in rows]
        states = {key: self._prompt_state(key) for key in dict.fromkeys(keys)}
        return [states[key] for key in keys]

    @torch.no_grad()
    def _prompt_state(self, prompt: tuple[int, ...]) -> Tensor:
        state = self.cache.get(prompt)
        if state is None:
            (state,) = self._in_memory(lambda tokens: self.lm.prompt_states([list(prompt)], tokens))
            self.cache.put(prompt, state)
        return state

    @torch.no_grad()
    def score(
        self,
        teacher_inputs: list[tuple[str, ...]],
        answer_ids: Tensor,
        answer_mask: Tensor,
        *,
        distribution: bool = False,
        ids: list[str] | None = None,
    ) -> TeacherSignal:
        """Score each answer under each of its templates.

        Args: teacher_inputs, B tuples of the same number K of texts; answer_ids, answer_mask [B, R]; distribution,
        whether to give access to the next-token distributions; ids name the rows in errors.
        Returns: the signal, zeros at padding. Raises DivergenceError if a teacher logit is not finite, ModelError
        if not even one row at a time fits in memory.
        """
        per_template = []
        for k in range(len(teacher_inputs[0])):
            states = self.prompt_states([texts[k] for texts in teacher_inputs])
            per_template.append(self._answer_hidden(states, answer_ids, answer_mask))
        head = self.lm.head()
        mixed = head.mixed(per_template)
        parts = [mixed] if self.combination == "pool" else [(hidden, head) for hidden in per_template]
        signals = [self._signal(*part, answer_ids, answer_mask) for part in parts]
        combined = average_templates(signals) if len(signals) > 1 else signals[0]
        self._check_finite(combined, ids)
        if not distribution:
            return combined
        hidden, head = mixed
        limits = head.rules.limits(answer_ids, answer_mask)
        given_limits = None if limits is None else unpack(limits, answer_mask)
        return replace(combined, distribution=HeadOverStates(unpack(hidden, answer_mask), head, given_limits))

    @torch.no_grad()
    def score_ends(
        self,
        teacher_inputs: list[tuple[str, ...]],
        answer_ids: Tensor,
        answer_mask: Tensor,
        ids: list[str] | None = None,
    ) -> tuple[TeacherSignal, Tensor]:
        """As in `LocalSource`."""
        signal = self.score(teacher_inputs, answer_ids, answer_mask, distribution=True, ids=ids)
        assert isinstance(signal.distribution, HeadOverStates)
        states, ends = signal.distribution.states[answer_mask], list(self.rules.eos_ids)
        # Of several tokens that end an answer, the most probable.
        (of_end,) = signal.distribution.head.map(lambda logits: (logits[:, ends].amax(-1),), states)
        going_on = ~torch.isin(answer_ids[answer_mask], torch.tensor(ends, device=self.device))
        cost = (given(signal.max)[answer_mask] - of_end)[going_on]
        return signal, torch.stack([cost.double().sum(), going_on.double().sum()])

    def answer(self, teacher_inputs: list[tuple[str, ...]], write: Write, max_new_tokens: int) -> list[list[int]]:
        """As in `LocalSource`."""
        return write(self.lm, self.prompt_states([texts[0] for texts in teacher_inputs]))

    @torch.no_grad()
    def alternatives(self, distribution: HeadOverStates, answer_mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k most probable next tokens at each position, best first, and their log-probabilities, both [B, R, k].

        Args: distribution, from `score(distribution=True)`; with several templates it is the renormalised mean
        log-probability.
        """

        def best(logits: Tensor) -> tuple[Tensor, ...]:
            values, ids = logits.log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
            return (*ids.unbind(-1), *values.unbind(-1))

        limits = None if distribution.limits is None else distribution.limits[answer_mask]
        outputs = distribution.head.map(best, distribution.states[answer_mask], limits=limits)
        columns = [unpack(column, answer_mask) for column in outputs]
        half = len(columns) // 2
        return torch.stack(columns[:half], -1), torch.stack(columns[half:], -1)

    def _answer_hidden(self, states: list[Tensor], answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
        return self._in_memory(lambda tokens: self.lm.answer_hidden(states, answer_ids, answer_mask, tokens))

    def _in_memory(self, forward: Callable[[int], Result]) -> Result:
        """`forward(batch_tokens)`; when memory runs out, it is repeated with half as many, which stay in use."""
        try:
            return forward(self.batch_tokens)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise

        def halve() -> int:
            self.batch_tokens //= 2
            logger.warning(f"out of memory in the teacher: retrying with {self.batch_tokens} tokens per batch")
            return self.batch_tokens

        asked = self.batch_tokens
        try:
            return find_executable_batch_size(forward, halve(), halve)()
        except RuntimeError as error:
            if self.batch_tokens:
                raise
            self.batch_tokens = asked
            raise ModelError(
                "the teacher does not fit in memory, not even one row at a time: lower max_input_tokens or "
                "max_new_tokens, load it in bfloat16 (teacher_dtype), or use a smaller teacher"
            ) from error

    def _signal(self, hidden: Tensor, head: Head, answer_ids: Tensor, mask: Tensor) -> TeacherSignal:
        values = head.map(token_scores, hidden, answer_ids[mask], limits=head.rules.limits(answer_ids, mask))
        chosen, largest, logsumexp, mean, entropy = (unpack(value, mask) for value in values)
        return TeacherSignal(chosen=chosen, max=largest, logsumexp=logsumexp, mean=mean, entropy=entropy)

    def _check_finite(self, signal: TeacherSignal, ids: list[str] | None) -> None:
        numbers = (signal.chosen, given(signal.logsumexp), given(signal.entropy))
        good = torch.stack([torch.isfinite(x) for x in numbers]).all(0)
        bad = (~good).any(1).nonzero().squeeze(-1).tolist()
        if not bad:
            return
        names = [ids[i] if ids else f"row {i}" for i in bad[:5]]
        raise DivergenceError(
            f"the teacher's logits are not finite for {len(bad)} of {len(good)} answers: {', '.join(names)}. "
            f"Its weights are {self.lm.model.dtype}: use bfloat16 or float32 for T5 models, and check that the "
            "checkpoint loads without missing weights."
        )
