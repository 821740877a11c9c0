"""Data and metrics of the study: E2E restaurants (data to text) and Quora paraphrases, split so that no stage sees
another's rows; and the models.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from rlkd import TASK_METRICS, ConfigError, Example, RowMean, load_rows

FILES = {
    "e2e": ["e2e/devset.jsonl", "e2e/testset.jsonl"],
    "quora": ["quora_para/train.jsonl", "quora_para/test.jsonl"],
}

Representation = tuple[tuple[str, str], ...]  # of a restaurant: (attribute, value) in the order of ATTRIBUTES


@dataclass(frozen=True)
class Splits:
    """pairs: the teacher's inputs and answers. unlabeled: inputs of the students. The rest is held out."""

    pairs: list[tuple[str, str]]
    unlabeled: list[Example]
    validation: list[Example]
    test: list[Example]


def load_splits(task: str, folder: Path, sizes: dict[str, Any]) -> Splits:
    """The parts of `task`, the same in every run; sizes: rows of the parts, and limits."""
    if not folder.is_dir():
        raise ConfigError(f"data = {str(folder)!r} is not a folder: pass --data FOLDER that holds e2e and quora_para")
    first, second = ([dict(row) for row in load_rows(str(folder / name)).to_list()] for name in FILES[task])
    return split_e2e([*first, *second], sizes) if task == "e2e" else split_quora(first, second, sizes)


def example(name: str, text: str, references: Iterable[str] = ()) -> Example:
    """Teacher and student read the same text."""
    return Example(name, text, (text,), tuple(references))


# E2E: a restaurant's attributes in, a sentence or two out

ATTRIBUTES = ("name", "eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near")
HIDDEN = {"name": "NAME", "near": "NEAR"}  # proper names, of which a small vocabulary and few rows teach nothing


def parse(text: str) -> dict[str, str]:
    """`name[The Mill], area[riverside]` -> {"name": "The Mill", "area": "riverside"}."""
    return {name.strip(): value for name, value in re.findall(r"([^,\[\]]+)\[([^\]]*)\]", text)}


def delexicalised(text: str, reference: str) -> tuple[Representation, str]:
    """The representation and a reference with the proper names replaced by NAME and NEAR, the longer one first."""
    values = parse(text)
    for attribute in sorted(HIDDEN, key=lambda name: -len(values.get(name, ""))):
        if attribute in values:
            reference = reference.replace(values[attribute], HIDDEN[attribute])
    known = {**values, **{name: hidden for name, hidden in HIDDEN.items() if name in values}}
    return tuple((name, known[name]) for name in ATTRIBUTES if name in known), reference


def written(representation: Representation) -> str:
    """The text that the models read."""
    return ", ".join(f"{name}[{value}]" for name, value in representation)


def composed(
    known: Sequence[Representation], excluded: set[Representation], count: int, seed: int = 0
) -> list[Representation]:
    """`count` new representations: the attributes of a known one, each with a value that a known one has.

    Distinct, and none of `excluded`. Raises ConfigError if there are not so many.
    """
    values: dict[str, set[str]] = {}
    for representation in known:
        for name, value in representation:
            values.setdefault(name, set()).add(value)
    choices = {name: sorted(found) for name, found in values.items()}
    generator, taken = random.Random(seed), set(excluded)
    found: list[Representation] = []
    for _ in range(200 * count):
        if len(found) == count:
            break
        attributes = generator.choice(known)
        new = tuple((name, generator.choice(choices[name])) for name, _ in attributes)
        if new not in taken:
            taken.add(new)
            found.append(new)
    if len(found) < count:
        raise ConfigError(f"rows.unlabeled = {count}: the attributes give only about {len(found)} new representations.")
    return found


def split_e2e(rows: list[dict[str, str]], sizes: dict[str, Any]) -> Splits:
    """Rows of both files, split by what they say once the names are hidden; unlabeled inputs are composed."""
    references: dict[Representation, list[str]] = {}
    for row in rows:
        representation, reference = delexicalised(row["mr"], row["ref"])
        references.setdefault(representation, []).append(reference)
    order = sorted(references)
    random.Random(0).shuffle(order)
    cuts = sizes["test"], sizes["test"] + sizes["validation"]
    test, validation, teacher = order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]
    new = composed(teacher, set(order), sizes["unlabeled"])

    def examples(part: str, chosen: list[Representation]) -> list[Example]:
        return [example(f"{part}-{i}", written(r), references.get(r, ())) for i, r in enumerate(chosen)]

    return Splits(
        pairs=[(written(r), reference) for r in teacher for reference in references[r]],
        unlabeled=examples("e2e-unlabeled", new),
        validation=examples("e2e-validation", validation),
        test=examples("e2e-test", test),
    )


RATINGS = {
    "low": r"\blow|poor|\bbad|\b(1|one)\b",
    "average": r"average|moderate|decent|mediocre|\b(3|three)\b",
    "high": r"\bhigh|excellent|great|\b(5|five)[ -]*(out|of|/|star)",
}
SLOTS = {
    "food": {"English": r"english|british", "Fast food": r"fast[ -]?food"},
    "eatType": {"coffee shop": r"coffee|caf[eé]"},
    "priceRange": {
        "cheap": r"cheap|\blow|inexpensive|affordable|budget",
        "moderate": r"moderate|mid|average|reasonabl|medium",
        "high": r"\bhigh|expensive|pric[e]?y",
        "less than £20": r"20|cheap|\blow|inexpensive|affordable",
        "£20-25": r"20.{0,10}25|moderate|mid|average|reasonabl",
        "more than £30": r"30|\bhigh|expensive|pric[e]?y",
    },
    "customer rating": {
        **RATINGS,
        "1 out of 5": RATINGS["low"],
        "3 out of 5": RATINGS["average"],
        "5 out of 5": RATINGS["high"],
    },
    "area": {"riverside": r"river", "city centre": r"cent(re|er)|\bcity"},
}
FAMILY = r"famil|kid|child"
NOT = r"\bno\b|\bnon|\bnot\b|n't\b|\bisnt|never|without|unsuitable|unfriendly"
NO_FAMILY = rf"({NOT})[^.]{{0,40}}({FAMILY})|adult|({FAMILY})[\w -]{{0,12}}(\bnot\b|unfriendly)"


def says(text: str, attribute: str, value: str) -> bool:
    """Whether a sentence states the value of an attribute, by the words that the references use for it."""
    lowered = text.lower()
    if attribute in HIDDEN:
        return HIDDEN[attribute] in text
    if attribute == "familyFriendly":
        denied = re.search(NO_FAMILY, lowered) is not None
        return denied if value == "no" else not denied and re.search(FAMILY, lowered) is not None
    pattern = SLOTS[attribute].get(value, re.escape(value.lower()))
    return re.search(pattern, lowered) is not None


def slots(predictions: list[str], examples: list[Example]) -> RowMean:
    """Share (x 100) of each input's attributes that its answer states."""
    rows = []
    for text, asked in zip(predictions, examples, strict=True):
        stated = [says(text, *slot) for slot in parse(asked.student_input).items()]
        rows.append(100 * sum(stated) / len(stated))
    return RowMean(rows)


# Quora: a question in, the same question in other words out


def split_quora(train: list[dict[str, str]], test: list[dict[str, str]], sizes: dict[str, Any]) -> Splits:
    """Pairs of short questions; train is split by question. A test pair goes if train has either of its questions."""
    known = {row[side] for row in train for side in ("source", "target")}
    clean = [row for row in test if not {row["source"], row["target"]} & known]
    most = sizes["question_words"]
    train, clean = (
        [row for row in rows if max(len(row[side].split()) for side in ("source", "target")) <= most]
        for rows in (train, clean)
    )
    answers, held_out = _by_question(train), _by_question(clean)
    # The targets of one part are not the questions of another: questions that share a pair stay together.
    groups = _connected(train)
    random.Random(0).shuffle(groups)
    parts: dict[str, list[str]] = {"validation": [], "unlabeled": []}
    for part, questions in parts.items():
        while len(questions) < sizes[part] and groups:
            questions += [question for question in groups.pop() if question in answers]
        del questions[sizes[part] :]
    return Splits(
        pairs=[(q, target) for group in groups for q in group if q in answers for target in answers[q]],
        unlabeled=[example(f"quora-unlabeled-{i}", q) for i, q in enumerate(parts["unlabeled"])],
        validation=[example(f"quora-validation-{i}", q, answers[q]) for i, q in enumerate(parts["validation"])],
        test=[example(f"quora-test-{i}", q, r) for i, (q, r) in enumerate(list(held_out.items())[: sizes["test"]])],
    )


def _by_question(rows: list[dict[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["source"], []).append(row["target"])
    return found


def _connected(rows: list[dict[str, str]]) -> list[list[str]]:
    """Questions in groups, such that both questions of every pair are in one; in the order of their first pair."""
    group: dict[str, list[str]] = {}
    for row in rows:
        first, second = (group.setdefault(row[side], [row[side]]) for side in ("source", "target"))
        if first is not second:
            small, large = sorted((first, second), key=len)
            large += small
            group.update(dict.fromkeys(small, large))
    return list({id(members): members for members in group.values()}.values())


# Metrics


def distinct_2(texts: Iterable[str]) -> float:
    """Distinct pairs of neighbouring words per pair (x 100), over all answers (Li et al. 2016)."""
    pairs = [pair for text in texts for words in [text.split()] for pair in pairwise(words)]
    return 100 * len(set(pairs)) / max(len(pairs), 1)


def task_metric(predictions: list[str], examples: list[Example]) -> dict[str, float]:
    """BLEU with all references and distinct-2; of restaurants the slots, of paraphrases BLEU against the question and
    the share that equals it (x 100).
    """
    scores: dict[str, float] = {**TASK_METRICS["bleu"](predictions, examples), "distinct_2": distinct_2(predictions)}
    if examples[0].id.startswith("e2e"):
        return {**scores, "slots": slots(predictions, examples)}
    sources = [example(e.id, e.student_input, (e.student_input,)) for e in examples]
    copies = TASK_METRICS["exact_match"](predictions, sources)["exact_match"]
    return {**scores, "self_bleu": float(TASK_METRICS["bleu"](predictions, sources)["bleu"]), "copies": 100 * copies}


# Models


def train_tokenizer(texts: Iterable[str], pieces: int) -> PreTrainedTokenizerFast:
    """A byte-pair vocabulary of the texts, ids laid out as T5's: <pad> 0, </s> 1, <unk> 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=pieces, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def build_model(tokenizer: Any, width: int, layers: int, seed: int) -> Any:
    """A T5 v1.1-shaped model with random weights and a tied embedding, its rows padded to a multiple of 8."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)
