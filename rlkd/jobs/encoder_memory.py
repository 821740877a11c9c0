"""As `memory`, for an encoder that becomes a classifier: its teacher's fine-tuning, then its own training."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from ..models.encoders.classifiers import labelled_config, student_config
from ..models.footprint import count_parameters
from ..models.loading import load_config
from ..models.weightless import Ledger, size_of, weightless, without_memory
from ..trainers.encoders.arguments import TKDArguments
from .memory import Phase, fill_gradients, optimizer_bytes

SOME_LABELS = 2  # where the rows say how many


@dataclass
class EncoderRehearsal:
    """A training of `rlkd train tkd` without memory. teacher: its configuration, None for recorded logits; finetuned,
    whether it is trained, too.
    """

    student: Any
    teacher: Any
    finetuned: bool
    training: TKDArguments
    ledger: Ledger = field(default_factory=Ledger)
    operations: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Any, teacher: Any, student: Any, training: TKDArguments) -> EncoderRehearsal:
        """The models that settings name. Raises ConfigError or ModelError."""
        if data.pseudo_labels is not None:
            names = data.labels or [str(i) for i in range(SOME_LABELS)]
            config = labelled_config(str(student.student_pretrained), student.student_layers, names)
            return cls(config, None, False, training)
        config = load_config(teacher.teacher, "teacher", teacher.teacher_revision)
        if data.labels and not teacher.teacher_finetuned:
            config.num_labels = len(data.labels)
        options = student.options(config, training.layer_map)
        return cls(student_config(config, **options), config, not teacher.teacher_finetuned, training)

    @cached_property
    def models(self) -> dict[str, Any]:
        configs = {"teacher": self.teacher, "student": self.student}
        make = AutoModelForSequenceClassification.from_config
        return {role: weightless(partial(make, config)) for role, config in configs.items() if config is not None}

    def parameters(self) -> dict[str, int]:
        return {role: count_parameters(model) for role, model in self.models.items()}

    def phases(self) -> list[Phase]:
        """The phases in their order."""
        with without_memory():
            _ = self.models
            with self.ledger:
                found = []
                if self.teacher is not None and self.finetuned:
                    found.append(self._update("fine-tuning", "teacher", {}))
                held = {} if self.teacher is None else {"teacher": size_of(self.models["teacher"])}
                found.append(self._update("update", "student", held))
        return found

    def saved(self) -> tuple[int, int]:
        """Bytes of the saved student, and of a checkpoint."""
        student = size_of(self.models["student"])
        return student, student + self.state

    def _update(self, name: str, role: str, held: dict[str, int]) -> Phase:
        """A micro-batch of one of the models; the other one teaches it, if it is held."""
        args, ledger, model = self.training, self.ledger, self.models[role]
        self.state = optimizer_bytes(args, model, ledger)[0]
        model.train()
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
        before, own = ledger.now, size_of(model, trained=True)
        bf16 = args.mixed_precision == "bf16"
        ids = torch.full((args.per_device_train_batch_size, args.max_length), 5)
        mask = torch.ones_like(ids)
        mask[::2, -1] = 0
        if args.gradient_accumulation_steps > 1:
            fill_gradients(model)
        ledger.start()
        operations = ledger.operations
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            if held:
                with torch.no_grad():
                    states = bool(args.teacher_needs - {"logits"})
                    above = self.models["teacher"].eval()(ids, mask, output_hidden_states=states)
                del above
        out.logits.float().sum().backward()
        self.operations[name] = ledger.operations - operations
        del out
        peak = ledger.peak - before
        parts = {**held, role: size_of(model), "optimizer state": self.state, "gradients": own}
        model.zero_grad()
        return Phase(name, {**parts, "activations": max(peak - own, 0)})
