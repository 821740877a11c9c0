"""Shared by the notebooks: the quickstart's task on short notes, and a teacher of it that trains in seconds."""

from __future__ import annotations

import random
import sys
from itertools import islice
from pathlib import Path

import torch
from transformers.utils import logging

from rlkd import (
    Example,
    SupervisedArguments,
    SupervisedTrainer,
    Teacher,
    language_model,
    load_model,
    load_tokenizer,
)

sys.path.append(str(Path(__file__).parents[1]))
import quickstart_task as task
from quickstart import ADAFACTOR, build_model, settings, train

RUN = Path(__file__).parents[2] / "runs" / "notebooks"
logging.disable_progress_bar()
torch.set_num_threads(1)  # models this small gain nothing from more


def short_notes(count: int, seed: int) -> list[Example]:
    """Notes of at most four instructions, as the quickstart's examples."""
    notes = task.make_examples(5 * count, seed)
    return list(islice((note for note in notes if note.student_input.count(" ; ") < 4), count))


def packed(note: Example) -> frozenset[int]:
    """The things that get packed, for the checker."""
    return frozenset(map(int, note.references))


def trained_teacher(run: Path = RUN, steps: int = 200) -> Teacher:
    """The teacher of a run; trained on gold answers in random order and wording if it is missing."""
    folder = run / "teacher"
    if not (folder / "model.safetensors").exists():
        rng, tokenizer = random.Random(0), task.make_tokenizer()
        rows = [
            {"student_input": note.teacher_inputs[0], "label": task.write_answer(packed(note), rng)}
            for note in short_notes(64 * steps, seed=1)
        ]
        arguments = SupervisedArguments(**settings(folder, max_steps=steps, learning_rate=2e-2, **ADAFACTOR))
        model = build_model(tokenizer, width=64, seed=0)
        train(SupervisedTrainer(model, arguments, tokenizer=tokenizer, train_dataset=rows), "teacher")
    tokenizer = load_tokenizer(str(folder), "teacher")
    return Teacher(language_model(load_model(str(folder), "teacher"), tokenizer), tokenizer)
