"""Transformer distillation of encoder-decoder students (TinyBERT, Jiao et al. 2020, arXiv 1909.10351, eqs 7 and 8).

    hidden      mean over rows and layers of the mean over tokens t and dimensions of (W h_s[t] - h_t[t])^2
    attention   mean over rows and layers of the mean over heads and pairs (t, u), u visible from t, of (a_s - a_t)^2

teacher-forced on the labels: layer k of the student's decoder against layer I(k) of the teacher's, and the same of the
encoders where both models read the same prompts, which is added. h are the layers' outputs, W a learned projection
where widths differ, a the scores of self-attention before softmax. The teacher carries no gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from ..errors import ConfigError
from ..models.encoder_decoder import T5GEMMA, EncoderDecoder, Layers
from ..models.encoders.attention import score_attention
from ..models.encoders.classifiers import matched_layers
from ..models.encoders.outputs import PROJECTIONS_FILE
from ..models.language_model import LanguageModel
from ..models.policy import LayerProjections, Policy
from ..models.teacher import Teacher
from ..models.vocabulary import encode_prompts
from ..objectives.neighbours import tinybert_attention, tinybert_hidden
from ..records import Answers
from ..tensors import pad_rows
from .supervised_arguments import SupervisedArguments

logger = logging.getLogger(__name__)


class LayerTerms:
    """The terms of `SupervisedArguments` whose weight is above 0; adds the projections that they need to `policy`.

    Raises ConfigError for a teacher or student whose layers cannot be compared, or a map that does not fit; ModelError
    if attention cannot be read. Says whether the encoders are compared.
    """

    def __init__(self, args: SupervisedArguments, policy: Policy, teacher: Any, rows: Any):
        if not isinstance(teacher, Teacher):
            raise ConfigError(
                f"{args.layer_setting} compares layers with a teacher's: give a local Teacher, or set it to 0"
            )
        self.args, self.teacher = args, teacher
        student, self.lm = (_layered(args, role, lm) for role, lm in (("student", policy.lm), ("teacher", teacher.lm)))
        own, theirs = student.depths, self.lm.depths
        maps = {"encoder": args.encoder_layer_map, "decoder": args.decoder_layer_map}
        self.maps = [matched_layers(own[part], theirs[part], maps[part]) for part in maps]
        if difference := reads_otherwise(teacher, rows, args.max_input_tokens):
            logger.warning(
                f"{args.layer_setting}: decoders are compared, encoders are not: {difference}, so that the tokens "
                "of prompts do not match."
            )
            self.maps[0] = []
        if args.attention_coef > 0:
            for role, lm in (("student", student), ("teacher", self.lm)):
                score_attention(lm.model, role)
            _check_heads(args, student, self.lm)
        width = self.lm.width if args.hidden_coef > 0 else student.width
        self.projections = policy.projections = LayerProjections(
            student.width, width, [len(found) for found in self.maps], scores=args.attention_coef > 0, seed=args.seed
        ).to(student.device)

    def of(self, answers: Answers, student: Sequence[Layers]) -> dict[str, Tensor]:
        """The sum over the rows of every term, by its name in the log; student, the layers of encoder and decoder."""
        found = {name: torch.zeros((), device=answers.answer_ids.device) for name in self.args.layer_weights}
        for own, theirs, layers in zip(student, self.layers(answers), self.maps, strict=True):
            if not layers:
                continue
            chosen = [k - 1 for k in layers]
            for row, mask in enumerate(own.mask):
                at, count = slice(row, row + 1), mask[None]
                for k, layer in enumerate(chosen):
                    if "hidden_loss" in found:
                        pair = own.hidden[k][at].float(), theirs.hidden[layer][at].float()
                        found["hidden_loss"] += tinybert_hidden(*pair, count) / len(layers)
                    if "attention_loss" in found:
                        maps = own.scores[k][at], theirs.scores[layer][at]
                        found["attention_loss"] += tinybert_attention(*maps, count) / len(layers)
        return found

    @torch.no_grad()
    def layers(self, answers: Answers) -> tuple[Layers, Layers]:
        """The teacher's, on the labels under its own prompts, in its own precision."""
        teacher, lm = self.teacher, self.lm
        texts = [example.teacher_inputs[0] for example in answers.examples]
        ids = encode_prompts(teacher.tokenizer, texts, teacher.max_input_tokens, append_eos=teacher.append_eos)
        prompts = pad_rows(ids, lm.pad_id, lm.device)
        with torch.autocast(lm.device.type, enabled=False):
            return lm.layers(*prompts, answers.answer_ids, answers.answer_mask, scores=self.args.attention_coef > 0)

    def save(self, folder: Path) -> None:
        """Write the projections next to a checkpoint's student, if there are any."""
        if self.projections.learned:
            save_model(self.projections, str(folder / PROJECTIONS_FILE))

    def load(self, folder: Path) -> None:
        """Load in place what `save` wrote."""
        if self.projections.learned:
            load_model(self.projections, folder / PROJECTIONS_FILE)


def _layered(args: SupervisedArguments, role: str, lm: LanguageModel) -> EncoderDecoder:
    if isinstance(lm, EncoderDecoder) and lm.config.model_type != T5GEMMA:
        return lm
    raise ConfigError(
        f"{args.layer_setting} compares the layers of T5- and BART-like models, and the {role} is a "
        f"'{lm.model.config.model_type}' model: set it to 0"
    )


def _heads(lm: EncoderDecoder) -> tuple[int, int]:
    """Attention heads of encoder and decoder."""
    heads = lm.config.num_attention_heads
    return heads, getattr(lm.config, "decoder_attention_heads", heads)


def _check_heads(args: SupervisedArguments, student: EncoderDecoder, teacher: EncoderDecoder) -> None:
    for own, theirs in zip(_heads(student), _heads(teacher), strict=True):
        if own != theirs:
            raise ConfigError(
                f"attention_coef = {args.attention_coef}: the student has {own} attention heads and the teacher "
                f"{theirs}, but they are compared head by head: set it to 0, or choose a student with {theirs}"
            )


def reads_otherwise(teacher: Teacher, rows: Any, max_input_tokens: int) -> str | None:
    """How the teacher's prompts differ from the student's, if they do."""
    if not teacher.append_eos:
        return "the teacher reads its prompts without end-of-sequence"
    if teacher.max_input_tokens != max_input_tokens:
        return (
            f"the teacher's prompts are cut to {teacher.max_input_tokens} tokens, the student's to {max_input_tokens}"
        )
    names = ("student_input", "teacher_input")
    columns = [rows[name] if hasattr(rows, "column_names") else [row[name] for row in rows] for name in names]
    differing = sum(own != theirs for own, theirs in zip(*columns, strict=True))
    return f"the teacher's prompt is not the student's input in {differing} of {len(rows)} rows" if differing else None
