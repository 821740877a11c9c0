"""The quickstart's task: what gets packed? Synthetic text with many right answers for every input.

A note tells what happens to things, often more than once. The answer lists what gets packed, each thing once, in any
order, and may call a thing by either of its two names:

    take cup ; bring book ; skip hat ; ann likes rope ; pack tent ; take book
    -> "cup and book and tent", or "tent and novel and mug", or ...
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from rlkd import Example, RowMean

THINGS = [
    ("cup", "mug"), ("bag", "sack"), ("coat", "jacket"), ("shoe", "boot"), ("hat", "cap"), ("pan", "skillet"),
    ("rug", "mat"), ("lamp", "light"), ("book", "novel"), ("pen", "biro"), ("phone", "mobile"), ("rope", "cord"),
    ("tent", "shelter"), ("map", "chart"), ("knife", "blade"), ("towel", "cloth"),
]  # fmt: skip
TAKE, LEAVE, LIKE = ("take", "pack", "bring"), ("leave", "drop", "skip"), ("ann likes", "bob owns", "eve sees")
TEMPLATES = (
    "what gets packed ? note : {note}",
    "{note} . so which things go along ?",
    "read the note and list the things to pack : {note}",
)
CONCEPT = {name: i for i, names in enumerate(THINGS) for name in names}
HELD_OUT = {"validation": 2, "test": 3}  # split -> seed of its notes
PIECES = ["<pad>", "</s>", "<unk>", "and", "nothing", ";", *CONCEPT]


def make_note(rng: random.Random) -> tuple[str, frozenset[int]]:
    """A note of 3 to 6 instructions (one in five: 7 to 10, the hard tail) and the things that get packed."""
    clauses = rng.randint(7, 10) if rng.random() < 0.2 else rng.randint(3, 6)
    things = rng.sample(range(len(THINGS)), -(-3 * clauses // 4))
    fate = {thing: rng.choices((TAKE, LEAVE, LIKE), weights=(5, 2, 1))[0] for thing in things}
    mentions = things + rng.choices(things, k=clauses - len(things))
    rng.shuffle(mentions)
    note = " ; ".join(f"{rng.choice(fate[thing])} {THINGS[thing][0]}" for thing in mentions)
    return note, frozenset(thing for thing in things if fate[thing] is TAKE)


def write_answer(packed: frozenset[int], rng: random.Random) -> str:
    """One right answer, in a random order and wording."""
    things = rng.sample(sorted(packed), len(packed))
    return " and ".join(rng.choice(THINGS[thing]) for thing in things) or "nothing"


def is_right(answer: str, packed: frozenset[int]) -> bool:
    """Whether an answer names each thing that gets packed exactly once, by either name, in any order."""
    names = [] if answer.strip() == "nothing" else answer.strip().split(" and ")
    things = [CONCEPT.get(name.strip(), -1) for name in names]
    return len(things) == len(set(things)) and frozenset(things) == packed


def notes(seed: int) -> Iterator[tuple[str, frozenset[int]]]:
    """Endless distinct notes."""
    rng, seen = random.Random(seed), set()
    while True:
        note, packed = make_note(rng)
        if note not in seen:
            seen.add(note)
            yield note, packed


def make_examples(count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[Example]:
    """Distinct notes, none of `exclude`; `references` hold the indices of the things packed, for the checker alone."""
    fresh = ((note, packed) for note, packed in notes(seed) if note not in exclude)
    return [
        Example(f"{seed}-{i}", note, (TEMPLATES[0].format(note=note),), tuple(map(str, sorted(packed))))
        for i, (note, packed) in zip(range(count), fresh, strict=False)
    ]


def held_out_notes(count: int, split: str) -> list[Example]:
    return make_examples(count, HELD_OUT[split])


def reserved_notes(count: int) -> frozenset[str]:
    """Notes of every held-out split: nothing trains on them."""
    return frozenset(example.student_input for split in HELD_OUT for example in held_out_notes(count, split))


def task_metric(predictions: list[str], examples: list[Example]) -> dict[str, float]:
    """accuracy: share of answers the checker accepts."""
    right = [is_right(p, frozenset(map(int, e.references))) for p, e in zip(predictions, examples, strict=True)]
    return {"accuracy": RowMean(right)}


def teacher_rows(count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """Gold rows for the teacher: every template, random order and wording of the answer."""
    rng = random.Random(seed)
    rows = []
    for i, example in enumerate(make_examples(count, seed, exclude)):
        packed = frozenset(map(int, example.references))
        prompt = TEMPLATES[i % len(TEMPLATES)].format(note=example.student_input)
        rows.append({"student_input": prompt, "label": write_answer(packed, rng)})
    return rows


def make_tokenizer():
    """A word-level tokenizer of the task's words, ids laid out as T5's: <pad> 0, </s> 1, <unk> 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {w for template in TEMPLATES for w in template.replace("{note}", "").split()}
    words |= {w for phrase in (*TAKE, *LEAVE, *LIKE) for w in phrase.split()}
    pieces = [*PIECES, *sorted(words - set(PIECES))]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def build_model(tokenizer: Any, *, width: int, seed: int) -> Any:
    """A T5 v1.1-shaped model with random weights; embedding rows padded to a multiple of 8, as T5 pads its own."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)
