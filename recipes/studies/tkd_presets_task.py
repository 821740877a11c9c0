"""Data and trainings of the study of encoder students."""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from rlkd import (
    PRESETS,
    Cell,
    TableLayout,
    TKDArguments,
    TKDTrainer,
    build_student,
    classification_metrics,
    find_labels,
    load_labelled,
    load_rows,
    timed_training,
)


class Data:
    """The rows of a cell's task: none of `test` is in another part."""

    def __init__(self, plan: dict[str, Any]):
        folder, self.plan = Path(plan["data"]), plan
        train_file = str(folder / plan["train"])
        self.labels = find_labels(load_rows(train_file)["label"])
        layout = TableLayout(text=plan["text"])
        rows = load_labelled(train_file, layout, labels=self.labels)
        tests = [load_labelled(str(folder / file), layout, labels=self.labels) for file in plan["test"]]
        self.test = [row for rows in tests for row in rows]
        self.test = sorted(self.test[: plan["test_rows"]], key=lambda row: len(row["text"]))  # batches of like lengths
        tested = {row["text"] for row in self.test}
        rows = [row for row in rows if row["text"] not in tested]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        self.dev = [rows[i] for i in order[: plan["dev_rows"]]]
        self.train = [rows[i] for i in order[plan["dev_rows"] :][: plan["teacher"]["rows"]]]

    def subset(self, seed: int) -> list[dict[str, Any]]:
        """The training rows of a seed."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).tolist()
        return [self.train[i] for i in order[: self.plan["train_rows"]]]


class Runs:
    """Trainings on the data of one cell."""

    def __init__(self, cell: Cell):
        self.cell, self.plan = cell, cell.settings
        self.data, self.tokenizer = Data(self.plan), AutoTokenizer.from_pretrained(self.plan["model"])

    @cached_property
    def teacher(self) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(self.cell.inputs["teacher"].folder).eval()

    def fit(self, model: Any, rows: Any, held_out: Any, **settings: Any) -> dict[str, float]:
        """Train, then score once on `held_out`; and the CPU seconds of the training."""
        arguments = TKDArguments(
            output_dir=str(self.cell.folder),
            max_length=self.plan["max_length"],
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),  # bf16 on a CPU must be asked for
            **self.plan["training"] | settings,
        )
        trainer = TKDTrainer(
            model,
            arguments,
            teacher=None if arguments.preset == "ft" else self.teacher,
            tokenizer=self.tokenizer,
            train_rows=rows,
            eval_rows=held_out,
            compute_metrics=classification_metrics([self.plan["metric"]]),
        )
        seconds = timed_training(trainer, self.cell.name)["cpu_seconds"]
        return {"score": trainer.evaluate()[f"eval_{self.plan['metric']}"], "cpu_seconds": round(seconds, 1)}

    def student(self, init: str, preset: str, seed: int, learning_rate: float, held_out: Any) -> dict[str, float]:
        """Train and score one student, cut from the teacher."""
        # A tree in the teacher's attention cannot be kept; all else of the teacher is computed once.
        kept = "none" if preset == "ft" or "td_teacher" in PRESETS[preset] else "hidden"
        folder = self.cell.folder / "kept"
        set_seed(seed)
        record = self.fit(
            build_student(self.teacher, self.plan["layers"], init),
            self.data.subset(seed),
            held_out,
            preset=preset,
            seed=seed,
            learning_rate=learning_rate,
            teacher_cache=kept,
            teacher_cache_dir=None if kept == "none" else str(folder),
            **self.plan["student"],
        )
        shutil.rmtree(folder, ignore_errors=True)
        return record | {"learning_rate": learning_rate}
