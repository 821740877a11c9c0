"""The teacher's reward as a reward function of TRL's own GRPOTrainer and RLOOTrainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from ..checks import check_choice
from ..errors import ConfigError
from ..models.generation import AnswerRules
from ..models.other_tokenizer import OtherTokenizer
from ..models.signals import LocalSource
from ..models.teacher import Teacher
from ..models.vocabulary import same_vocabulary
from ..objectives.rewards import REWARDS, RewardName, induced_advantage
from ..tensors import pad_rows

CutAnswers = Literal["keep", "end_price"]
RewardFunction = Callable[..., list[float]]


def teacher_reward_func(
    teacher: LocalSource,
    tokenizer: Any,
    *,
    reward_value: RewardName = "max",
    cut_answers: CutAnswers = "keep",
    teacher_input: str | None = None,
) -> RewardFunction:
    """R(y) = sum_t r(s_t, a_t) of each completion y, in nats: the undiscounted return of the reward that the teacher
    induces, less V(s_0), which is the same for all completions of a prompt.

        GRPOTrainer("student", reward_funcs=teacher_reward_func(teacher, tokenizer), train_dataset=prompts, ...)

    Args:
        tokenizer: the student's; of another vocabulary than the teacher's, the completions are scored as text.
        reward_value: as in `RLArguments`. `max` prefers no length.
        cut_answers: of completions without an end: keep adds nothing beyond the cut; end_price adds the reward of the
            end that is missing, so that going on until the limit is not free. To leave them out of the loss use TRL's
            `mask_truncated_completions`: a missing reward would count as 0 there, more than any other of `max`.
        teacher_input: column of the data set with what the teacher reads, a text or one for each template; None: the
            prompt itself, which must then be a text.
    Raises ConfigError for another value, ModelError if the vocabularies differ and the teacher cannot be asked by text;
    when called, ConfigError for prompts that the teacher cannot read.
    """
    check_choice("reward_value", reward_value, REWARDS)
    check_choice("cut_answers", cut_answers, CutAnswers)
    source = _for_student(teacher, tokenizer)

    def teacher_reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        inputs = _inputs(prompts, columns, teacher_input)
        ends = source.rules.eos_ids
        answers = [list(ids) for ids in completion_ids]
        if cut_answers == "end_price":
            answers = [ids if ids[-1:] and ids[-1] in ends else [*ids, ends[0]] for ids in answers]
        scored = [i for i, ids in enumerate(answers) if ids]
        rewards = torch.zeros(len(answers), dtype=torch.float64)
        if scored:
            ids, mask = pad_rows([answers[i] for i in scored], source.rules.pad_id, source.device)
            signal = source.score([inputs[i] for i in scored], ids, mask)
            rewards[scored] = (induced_advantage(signal, reward_value) * mask).sum(1).double().cpu()
        return rewards.tolist()

    return teacher_reward


def _for_student(teacher: LocalSource, tokenizer: Any) -> LocalSource:
    """The teacher as a decoder-only student with this tokenizer sees it."""
    if same_vocabulary(teacher.tokenizer, tokenizer):
        return teacher
    if not isinstance(teacher, Teacher):
        raise ConfigError(
            "teacher_reward_func: the tokenizer has another vocabulary than the teacher answers in: give a Teacher, or "
            "several that are in the student's vocabulary"
        )
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return OtherTokenizer(teacher, tokenizer, AnswerRules(start_id=None, eos_ids=(end,), pad_id=pad))


def _inputs(prompts: Sequence[Any], columns: dict[str, Any], name: str | None) -> list[tuple[str, ...]]:
    """What the teacher reads of each completion's prompt."""
    if name is not None and name not in columns:
        raise ConfigError(f"teacher_input = {name!r}: the data set has no such column")
    found = prompts if name is None else columns[name]
    inputs = [(texts,) if isinstance(texts, str) else tuple(texts) for texts in found]
    if any(not texts or not all(isinstance(text, str) for text in texts) for texts in inputs):
        what = "prompts are messages" if name is None else f"teacher_input = {name!r}: holds no texts"
        raise ConfigError(f"{what}: name a column of texts, what the teacher reads, as teacher_input")
    return inputs
