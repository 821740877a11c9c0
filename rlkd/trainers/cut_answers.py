"""Answers that max_new_tokens cut: what their missing end costs, or that they are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ..models.signals import SignalSource
from ..records import Answers, TeacherSignal


def cut_rows(answers: Answers) -> Tensor:
    """[B] bool: answers that max_new_tokens cut; labels, whose end is not known, never were."""
    rows, device = len(answers.answer_mask), answers.answer_mask.device
    return torch.zeros(rows, dtype=torch.bool, device=device) if answers.finished is None else ~answers.finished


def without_cut(answers: Answers) -> Answers:
    """The answers with no tokens left in those that were cut: they enter no loss and no mean."""
    return replace(answers, answer_mask=answers.answer_mask & ~cut_rows(answers)[:, None])


def last_tokens(mask: Tensor) -> Tensor:
    """[B, R] bool: the last True position of each row."""
    after = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return mask & ~after


def ending_signal(teacher: SignalSource, answers: Answers, ends: Sequence[int]) -> TeacherSignal | None:
    """The teacher's signal for end-of-sequence, of several `ends` the most probable, at the state after each answer
    that was cut, fields [B, 1], 0 for the other answers; None if none was cut. Costs one more forward of the teacher
    over those answers for each end.
    """
    rows = cut_rows(answers).nonzero().squeeze(-1)
    if not len(rows):
        return None
    mask, ids = answers.answer_mask[rows], answers.answer_ids[rows]
    lengths = mask.sum(1, keepdim=True)
    longer = torch.cat([mask, torch.zeros_like(mask[:, :1])], dim=1).scatter(1, lengths, True)
    examples = [answers.examples[i] for i in rows.tolist()]
    signals = []
    for end in ends:
        ended = torch.cat([ids, torch.zeros_like(ids[:, :1])], dim=1).scatter(1, lengths, end)
        signals.append(teacher.score([e.teacher_inputs for e in examples], ended, longer, ids=[e.id for e in examples]))
    # All but the chosen token is the state's alone.
    signal = replace(signals[0], chosen=torch.stack([signal.chosen for signal in signals]).amax(0))

    def placed(values: Tensor) -> Tensor:
        grid = values.new_zeros(len(answers.examples), 1)
        return grid.index_copy(0, rows, values.gather(1, lengths))

    named = ((f.name, getattr(signal, f.name)) for f in fields(signal))
    parts: dict[str, Any] = {name: placed(values) for name, values in named if values is not None}
    return TeacherSignal(**parts)


def end_price(reward_of_end: Tensor, answers: Answers) -> Tensor:
    """What the last token of each cut answer is charged, [B, R], nats: r(s_{T+1}, EOS), the reward of the end that the
    answer lacks, from reward_of_end [B, 1].

    To add nothing beyond the cut is to bootstrap with the teacher's V, as is right for a time limit that is no part of
    the task (Pardo et al. 2018, arXiv 1712.00378). With the price the limit is a part of it, as for a decoder that
    forces end-of-sequence there: going on until the cut is no longer free.
    """
    return reward_of_end * (last_tokens(answers.answer_mask) & cut_rows(answers)[:, None])
