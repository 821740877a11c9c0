"""Distillation of encoder-only classifiers: fine-tuning, KD, PKD, Tree Knowledge Distillation and its ablations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, set_seed

from ...checks import OUTSIDE
from ...data.labelled import EncodedTexts, labelled_rows, model_inputs
from ...data.words import (
    UNREAD,
    EncodedWords,
    by_word,
    encoded_rows,
    read_the_same_words,
    warn_of_unread,
    with_unread,
)
from ...errors import ConfigError
from ...evaluation.classes import in_words, one_class_warning, only_prediction
from ...evaluation.problems import PROBLEMS, classification_metrics, classified_rows, try_classification
from ...io.versions import describe_machine
from ...metrics import metric
from ...models.encoders.classifiers import check_length, matched_layers
from ...models.encoders.labels import name_head, problem_of, state_problem, stated_problem
from ...models.encoders.outputs import (
    EncoderOutputs,
    EncoderStudent,
    inner_width,
    matched_outputs,
    run_encoder,
    width_of,
)
from ...models.encoders.rehearsal import check_outputs
from ...models.encoders.teacher_outputs import TeacherOutputs, cache_key, cached_outputs
from ...objectives.encoder import weighted_terms
from ...objectives.neighbours import input_gradient
from ...runs.files import HELD_OUT, keep_first_and_last
from ..core import StudentTrainer
from ..environment import describe_environment
from .arguments import TKDArguments
from .checks import check_distillation, check_labels_and_vocabulary, check_recorded_teacher, check_settings_of
from .terms import TERMS, Batch, compared_parts, needs_of

logger = logging.getLogger(__name__)

NO_TEACHER = EncoderOutputs(torch.empty(0))
SMALLEST_TERM = 1e-4  # auto_scale: a smaller term joins later; its inverse would be a weight without meaning


class TKDTrainer(StudentTrainer):
    """L = sum of weight x term over the terms of a method (`terms.PRESETS`), on transformers' Trainer.

    Args: student, a sequence or token classifier (see `build_student`), whose problem_type or class decides what is
    learned from labels and logits (`evaluation.problems`); teacher, a fine-tuned one, None for preset ft and where
    train_rows bring `logits`; tokenizer, the student's; train_rows, eval_rows, rows {text, text_pair, label} (of words
    {words, label}, see `EncodedWords`), in train_rows with the logits of a teacher that is not here; teacher_tokenizer
    if it differs; compute_metrics as in Trainer, by default the scores that the problem always has. Callbacks are added
    by `add_callback`. What is saved is the bare student. Raises ConfigError, ModelError or DataError for invalid
    combinations.
    """

    args: TKDArguments

    def __init__(
        self,
        student: Any,
        args: TKDArguments,
        *,
        teacher: Any = None,
        tokenizer: Any,
        train_rows: Sequence[Mapping[str, Any]],
        eval_rows: Sequence[Mapping[str, Any]] | None = None,
        teacher_tokenizer: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    ):
        self.brings_logits = any(row.get("logits") is not None for row in train_rows)
        if self.brings_logits:
            check_recorded_teacher(args, given=teacher is not None)
        elif teacher is None and args.uses_teacher:
            raise ConfigError(f"preset = {args.preset!r} needs a teacher: give one, or preset: ft")
        if not any(TERMS[name].of_logits for name in args.weights):
            logger.warning(
                "no term of %s reads the logits: the classification head does not learn", sorted(args.weights)
            )
        check_length(args.max_length, student.config, "student")
        for model in (student, teacher):
            name_head(model)
        kind = problem_of(student.config)
        if kind == "regression" and stated_problem(student.config) is None:
            logger.warning("the student has one output and no problem_type: it is taken for a number (regression)")
        state_problem(student.config, kind)
        self.problem_type, self.problem = kind, PROBLEMS[kind]
        check_settings_of(kind, args)
        if teacher is not None:
            check_distillation(args, student.config, teacher.config, tokenizer, teacher_tokenizer)
            teacher.eval().requires_grad_(False).to(args.device)
        self.teacher, self.tokenizer = teacher, tokenizer
        set_seed(args.seed)  # projections are drawn before the Trainer does so
        self.trained = self._wrap(student, args)
        check_labels_and_vocabulary(student, "student", tokenizer)
        if teacher is not None:
            check_labels_and_vocabulary(teacher, "teacher", teacher_tokenizer or tokenizer)
        if args.weights.keys() == {"ce"}:
            train_rows = labelled_rows(train_rows, "train_rows")
        eval_rows = None if eval_rows is None else labelled_rows(eval_rows, "eval_rows")
        self.names = [str(student.config.id2label[k]) for k in range(student.config.num_labels)]
        data = self._data(args, train_rows, eval_rows, teacher_tokenizer)
        self.teacher_cache: TeacherOutputs | None = None
        self.scales: dict[str, float] = {}  # of auto_scale, once known
        self.one_class = False  # whether it was said that one label is predicted for every row
        super().__init__(
            args=args,
            compute_metrics=compute_metrics or classification_metrics(self.problem.always, kind, self.names),
            **data,
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean of the micro-batch: accumulation averages it

    def _data(
        self,
        args: TKDArguments,
        train_rows: Sequence[Mapping[str, Any]],
        eval_rows: Sequence[Mapping[str, Any]] | None,
        teacher_tokenizer: Any,
    ) -> dict[str, Any]:
        """The Trainer's data sets and collator; what the teacher reads of the training rows is kept beside."""

        def encoded(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> EncodedTexts:
            return encoded_rows(rows, tokenizer, args.max_length, len(self.names), self.problem_type)

        train = encoded(train_rows, self.tokenizer)
        held_out = None if eval_rows is None else encoded(eval_rows, self.tokenizer)
        self.teacher_tokenizer, self.teacher_texts = self.tokenizer, train
        if teacher_tokenizer is not None and teacher_tokenizer.get_vocab() != self.tokenizer.get_vocab():
            self.teacher_tokenizer = teacher_tokenizer
            self.teacher_texts = encoded(train_rows, teacher_tokenizer)
        if isinstance(train, EncodedWords):
            read_the_same_words(train, cast(EncodedWords, self.teacher_texts))
            warn_of_unread(train, "train_rows", args.max_length, "they carry no loss")
        if isinstance(held_out, EncodedWords):
            warn_of_unread(held_out, "eval_rows", args.max_length, f"{OUTSIDE} is predicted for them")
        return {"train_dataset": train, "eval_dataset": held_out, "data_collator": train.collate}

    def _wrap(self, student: Any, args: TKDArguments) -> EncoderStudent:
        own, asked = args.student_needs, (args.teacher_needs | args.cached) - {"logits"}
        if asked:
            self.layers = matched_layers(
                student.config.num_hidden_layers, self.teacher.config.num_hidden_layers, args.layer_map
            )
        self.teacher_attention = check_outputs(self.teacher, "teacher", asked) if asked else None
        attention = check_outputs(student, "student", own) if own else None
        widths = {}
        if parts := compared_parts(args.weights):
            config = self.teacher.config
            theirs = {"hidden": width_of(config), "embeddings": width_of(config), "neurons": inner_width(self.teacher)}
            widths = {part: theirs[part] for part in sorted(parts)}
        return EncoderStudent(student, widths=widths, attention=attention)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, after computing the teacher's outputs if they are cached."""
        with self.writing():
            self.open_teacher_cache()
            return super().train(*args, **kwargs)

    # The loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the terms that are on at this epoch; each is logged raw, and weighted as `weighted_*`."""
        weights = self.active_weights()
        student = self._at_words(model(model_inputs(inputs), needs_of(weights, "student")), inputs)
        asked = needs_of(weights, "teacher")
        teacher = self.teacher_outputs(inputs, asked) if asked else NO_TEACHER
        batch = self.batch(inputs, student, teacher)
        terms = {name: TERMS[name].loss(batch) for name in weights}
        weighted = weighted_terms(terms, self.scaled(weights, terms))
        loss = torch.stack(list(weighted.values())).sum()
        if not any(TERMS[name].of_logits for name in weights):
            loss = loss + 0.0 * student.logits.sum()  # DistributedDataParallel wants a gradient of the head, too
        watched = {"the loss": loss}
        if asked:
            watched = {"the teacher's logits": teacher.logits, **watched}
        self.finite.watch(watched, [str(i) for i in self._rows_of_logits(inputs)], inputs)
        self.record(**terms, **{f"weighted_{name}": value for name, value in weighted.items()})
        return (loss, {"logits": student.logits}) if return_outputs else loss

    def _at_words(self, out: EncoderOutputs, inputs: Mapping[str, Tensor]) -> EncoderOutputs:
        """Where words have labels, logits [words, C] in place of [B, L, C]."""
        return out._replace(logits=by_word(out.logits, inputs["words"])) if self.problem.of_words else out

    def _labels(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The labels of rows or, where words have labels, of the words that are read [words]."""
        return inputs["labels"][inputs["words"] != UNREAD] if self.problem.of_words else inputs["labels"]

    def _rows_of_logits(self, inputs: dict[str, Any]) -> list[int]:
        """The row that each line of the logits is of."""
        index: Tensor = inputs["index"]
        if self.problem.of_words:
            index = index.repeat_interleave((inputs["words"] != UNREAD).sum(1))
        return index.tolist()

    def batch(self, inputs: dict[str, Any], student: EncoderOutputs, teacher: EncoderOutputs) -> Batch:
        """What the terms are computed from."""
        models = {"student": self.trained, "teacher": self.teacher}
        return Batch(
            args=self.args,
            student=student,
            teacher=teacher,
            problem=self.problem,
            labels=self._labels(inputs),
            ids=inputs["input_ids"],
            valid=inputs["attention_mask"].bool(),
            heads={role: getattr(getattr(m, "config", None), "num_attention_heads", 0) for role, m in models.items()},
            special={"cls": self.tokenizer.cls_token_id, "sep": self.tokenizer.sep_token_id},
        )

    def active_weights(self) -> dict[str, float]:
        """Weights of the terms that are on now: those of the tree and of all tokens from `tree_start_epoch`."""
        started = (self.state.epoch or 0.0) >= self.args.tree_start_epoch
        return {name: weight for name, weight in self.args.weights.items() if started or not TERMS[name].late}

    def scaled(self, weights: dict[str, float], terms: dict[str, Tensor]) -> dict[str, float]:
        """The weights; under `auto_scale`, of terms beyond logits: (w_ce CE + w_kd KD) / term at its first step."""
        if not self.args.auto_scale:
            return weights
        of_logits = [name for name in terms if TERMS[name].of_logits]
        new = [name for name in terms if name not in of_logits and name not in self.scales]
        if new:
            base = torch.stack([weights[name] * terms[name].detach() for name in of_logits]).sum()
            first = torch.stack([base, *(terms[name].detach() for name in new)]).float()
            reference, *values = self.accelerator.reduce(first, reduction="mean").tolist()
            if reference > 0:  # not in a batch without labels, if CE is alone
                measured = {name: v for name, v in zip(new, values, strict=True) if v >= SMALLEST_TERM}
                self.scales |= {name: reference / v for name, v in measured.items()}
        # 0 until there is something to scale to.
        return {name: weights[name] if name in of_logits else self.scales.get(name, 0.0) for name in terms}

    # The teacher

    def teacher_outputs(self, inputs: dict[str, Any], needs: Collection[str]) -> EncoderOutputs:
        """Logits [B, C] and what else is needed, of the matched layers, cached or computed."""
        if self.brings_logits:
            return EncoderOutputs(inputs["teacher_logits"])
        index, own = inputs["index"].tolist(), inputs
        if self.teacher_texts is not self.train_dataset:
            own = self._teacher_batch(index)
        if self.teacher_cache is not None:
            out = self.teacher_cache.batch(index, inputs["input_ids"].shape[1], inputs["input_ids"].device)
        else:
            out = self._ask_teacher(model_inputs(own), needs)
        return self._at_words(out, own)

    def _teacher_batch(self, index: list[int]) -> dict[str, Tensor]:
        batch = self.teacher_texts.collate([self.teacher_texts[i] for i in index])
        return {name: tensor.to(self.args.device) for name, tensor in batch.items()}

    def _ask_teacher(self, inputs: dict[str, Tensor], needs: Collection[str]) -> EncoderOutputs:
        by_words = "gradient" in needs
        # The Trainer's autocast covers only the student's forward.
        with torch.set_grad_enabled(by_words), self.accelerator.autocast():
            out = run_encoder(self.teacher, inputs, needs, self.teacher_attention)
        if set(needs) - {"logits"}:
            out = matched_outputs(out, self.layers)
        logits = out.logits.float()  # float32 as in the cache: bf16 is too coarse for their softmax
        if by_words:
            out = out._replace(gradient=[input_gradient(logits, logits.argmax(-1), out.inputs[0])], inputs=[])
        return out._replace(logits=logits.detach())

    def open_teacher_cache(self) -> None:
        """Open the cache of teacher outputs, computing it first if it is missing (once for all processes)."""
        parts = self.args.cached
        if not parts or self.teacher_cache is not None:
            return

        def compute(index: list[int]) -> EncoderOutputs:
            return self._ask_teacher(model_inputs(self._teacher_batch(index)), parts)

        key = cache_key(
            self.teacher,
            self.teacher_tokenizer,
            self.teacher_texts.digest(),
            self.args.max_length,
            layers=self.layers if parts - {"logits"} else [],
            # They decide the last bits, and folders of outputs may be shared.
            batch_rows=self.args.per_device_eval_batch_size,
            torch=torch.__version__,
            environment=describe_environment(self.accelerator),
            machine=describe_machine(str(self.accelerator.device)),
        )
        root = Path(self.args.teacher_cache_dir or self.run_folder / "teacher_cache")
        with self.args.main_process_first(desc="teacher outputs"):
            self.teacher_cache = cached_outputs(
                root, key, parts, self.teacher_texts.lengths, compute, self.args.per_device_eval_batch_size
            )

    # Evaluation and saving

    def held_out_names(self) -> list[str] | None:
        """As in `StudentTrainer`. Raises ConfigError if `compute_metrics` fails on right predictions."""
        if self.eval_dataset is None:
            return None
        labels = cast(EncodedTexts, self.eval_dataset).true
        return ["loss", *try_classification(self.compute_metrics, labels, len(self.names), self.problem_type)]

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss on the labels, logits [B, C] (of words [B, W, C]) and labels of held-out rows, without the teacher."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(model_inputs(inputs)).logits.float()
            loss = self.problem.loss(self._at_words(EncoderOutputs(logits), inputs).logits, self._labels(inputs))
        if self.problem.of_words:
            logits = with_unread(logits, inputs["words"], self.names.index(OUTSIDE))
        return (loss, None, None) if prediction_loss_only else (loss, logits, inputs["labels"])

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """As in Trainer; what each labelled row was given and scores goes to held_out.jsonl."""
        out = super().evaluation_loop(*args, **options)
        rows: Any = self.eval_dataset
        logits, labels = cast(Any, out.predictions), cast(Any, out.label_ids)
        # Rows sorted by length come in another order and cannot be matched to their ids.
        given = labels is not None and np.array_equal(labels, rows.true.astype(labels.dtype))
        if options.get("metric_key_prefix", "eval") != "eval" or not given:
            return out
        texts = [" / ".join(filter(None, pair)) for pair in rows.texts]
        evaluated = classified_rows(self.problem.predict(logits), labels, texts, self.problem_type, self.names)
        if self.is_world_process_zero():
            keep_first_and_last(self.run_folder / HELD_OUT, self.last.step, evaluated)
            self._warn_of_one_class([row["predicted"] for row in evaluated])
        self.per_row = self._scores_by_row(evaluated, out.metrics or ())
        return out

    def _scores_by_row(self, evaluated: list[dict[str, Any]], names: Collection[str]) -> dict[str, list[float]]:
        """A value per row for each task score; those that have none (F1, ...) are compared by the problem's."""
        own, _ = self.problem.by_row
        falls = metric(f"eval_{own}").lower_is_better
        values = [row[own] for row in evaluated]
        turned = [-value for value in values]
        tasks = {name: metric(name).lower_is_better for name in names if metric(name).task}
        return {name.removeprefix("eval_"): values if lower == falls else turned for name, lower in tasks.items()}

    def refresh_held_out(self) -> None:
        """As in `StudentTrainer`."""
        self.evaluation_loop(self.get_eval_dataloader(), description="held-out rows")
        self.per_row = {}

    def _warn_of_one_class(self, predicted: list[Any]) -> None:
        """Once, after training began: such scores look like those of a model that has learned something."""
        if self.problem.of_words:
            predicted = [tag for tags in predicted for tag in tags]
        only = only_prediction(predicted)
        if only is not None and self.state.global_step > 0 and not self.one_class:
            self.one_class = True
            what = "words" if self.problem.of_words else "rows"
            said = one_class_warning("it", in_words(only, self.names), len(predicted), what)
            logger.warning("step %d: %s", self.state.global_step, said)

    def save_extras(self, folder: Path) -> dict[str, Any]:
        """As in `StudentTrainer`; the projections are saved next to the student."""
        self.trained.save_projections(folder)
        return {**super().save_extras(folder), "scales": self.scales}

    def load_extras(self, extras: dict[str, Any], folder: Path) -> None:
        """Restore the scales; the projections were loaded with the student."""
        super().load_extras(extras, folder)
        self.scales = extras["scales"]
