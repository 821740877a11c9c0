"""A label folder as the teacher of a classifier: scores of answer choices become logits over its labels."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, nearest
from ..labels.store import load_pseudolabels

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


def read_label_folder(
    folder: str,
    labels: Sequence[str] = (),
    choice_labels: dict[str, str] | None = None,
    content_free: str | None = None,
    limit: int | None = None,
) -> tuple[Rows, tuple[str, ...], str]:
    """Rows {text, text_pair, label, logits}, label names, and a note, of labels made with `--strategy rank`.

        p_k[c] = softmax over choices of choice_logprobs of template k, the teacher's own at temperature 1
        p_k[c] proportional to p_k[c] / q_k[c] with `content_free`, whose labels give q_k, the mean of its rows
        logits[c] = log of the mean over templates of p_k[c]

    A choice is the label of the same name, up to case and spaces, or the one that `choice_labels` names; without
    `labels` the choices are the labels. label is the gold label (the row's reference), None where there is none. The
    correction is that of Zhao et al. 2021 (arXiv 2102.09690), renormalised. limit: of the first rows.
    Raises DataError or ConfigError if choices differ between rows, or labels are not those of the student.
    """
    found = _ranked(folder)
    templates = _choices(found, folder)
    names = tuple(labels) or _named_by_choices(templates, choice_labels, folder)
    columns = {
        template: _columns(choices, names, choice_labels, f"'{folder}', template '{template}'")
        for template, choices in templates.items()
    }
    prior = {} if content_free is None else _content_free(content_free, found, templates)
    rows: dict[int, list[dict[str, Any]]] = {}
    for label in found:
        rows.setdefault(label["row"], []).append(label)
    numbers = sorted(rows)[:limit]
    made = []
    for number in numbers:
        own = rows[number]
        scores = [_probabilities(label["choice_logprobs"], prior.get(label["template"])) for label in own]
        mean = np.mean([p[columns[label["template"]]] for p, label in zip(scores, own, strict=True)], axis=0)
        made.append(
            {
                "text": own[0]["student_input"],
                "text_pair": None,
                "label": _gold(own[0], names, choice_labels, folder),
                "logits": np.log(np.maximum(mean, np.finfo(np.float32).tiny)).tolist(),
            }
        )
    if few := sum(len(rows[number]) < len(templates) for number in numbers):
        logger.warning(
            "'%s': %d of %d rows lack some of the %d templates: the mean is of those they have",
            folder, few, len(numbers), len(templates),
        )  # fmt: skip
    gold = sum(row["label"] is not None for row in made)
    first = next(iter(templates))
    shown = ", ".join(f"{templates[first][k]} = {name}" for k, name in zip(columns[first], names, strict=True))
    note = f"{len(made)} rows of '{folder}', {len(templates)} templates, {gold} with a gold label; choices: {shown}"
    return made, names, note


def _ranked(folder: str) -> list[dict[str, Any]]:
    """The rows that have scores of choices. Raises DataError if none has, or some have not."""
    found = load_pseudolabels(folder).to_list()
    without = sum(not label["choice_logprobs"] for label in found)
    if without or not found:
        raise DataError(
            f"'{folder}': {without or 'none'} of {len(found)} labels have no scores of answer choices. Make them with "
            "rlkd generate-pseudolabels --strategy rank."
        )
    return found


def _choices(found: Iterable[dict[str, Any]], folder: str) -> dict[str, list[str]]:
    """The answer choices of each template. Raises DataError if they differ between its rows."""
    templates: dict[str, tuple[str, list[str]]] = {}
    for label in found:
        first, choices = templates.setdefault(label["template"], (label["id"], label["choices"]))
        if choices != label["choices"]:
            raise DataError(
                f"'{folder}', template '{label['template']}': row {label['id']} has the choices "
                f"{', '.join(label['choices'])}, row {first} {', '.join(choices)}. A classifier needs the same choices "
                "in every row: use a template with fixed ones."
            )
    return {template: choices for template, (_, choices) in templates.items()}


def _plain(name: str) -> str:
    return " ".join(name.split()).casefold()


def _label_of(name: str, choice_labels: dict[str, str] | None) -> str:
    """The label that a choice or a reference stands for, as `choice_labels` has it, else itself."""
    named = {_plain(choice): label for choice, label in (choice_labels or {}).items()}
    return _plain(named.get(_plain(name), name))


def _named_by_choices(
    templates: dict[str, list[str]], choice_labels: dict[str, str] | None, folder: str
) -> tuple[str, ...]:
    """The labels as the first template's choices name them."""
    first, *_ = templates.values()
    given = {_plain(choice): label for choice, label in (choice_labels or {}).items()}
    names = tuple(dict.fromkeys(given.get(_plain(choice), choice.strip()) for choice in first))
    if len(names) < 2:
        raise DataError(f"'{folder}': the choices stand for one label only, {', '.join(names)}. Two are needed.")
    return names


def _columns(
    choices: Sequence[str], names: Sequence[str], choice_labels: dict[str, str] | None, where: str
) -> list[int]:
    """The position among the choices of each label. Raises DataError unless choices and labels match one to one."""
    found = [_label_of(choice, choice_labels) for choice in choices]
    known = [_plain(name) for name in names]
    unknown = [choice for choice, label in zip(choices, found, strict=True) if label not in known]
    if unknown:
        raise DataError(
            f"{where}: the choices {', '.join(unknown)} are not labels of the student ({', '.join(names)})."
            f"{nearest(unknown[0], list(names))} Say which labels they stand for: choice_labels: "
            f"{{{unknown[0]}: {names[0]}, ...}}"
        )
    if lacking := [name for name in names if found.count(_plain(name)) != 1]:
        raise DataError(
            f"{where}: {found.count(_plain(lacking[0]))} of the choices {', '.join(choices)} stand for the label "
            f"'{lacking[0]}', and each label needs one. Correct choice_labels or labels."
        )
    return [found.index(label) for label in known]


def _probabilities(logprobs: Sequence[float], prior: np.ndarray | None) -> np.ndarray:
    scores = np.asarray(logprobs, dtype=np.float64)
    if prior is not None:
        scores = scores - np.log(prior)
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def _content_free(
    folder: str, found: Sequence[dict[str, Any]], templates: dict[str, list[str]]
) -> dict[str, np.ndarray]:
    """Each template's mean probabilities of its choices for inputs without content. Raises DataError."""
    free = _ranked(folder)
    whose = {(label["model"], label["revision"], label["template_id"]) for label in free}
    others = {(label["model"], label["revision"], label["template_id"]) for label in found}
    own = _choices(free, folder)
    if not others <= whose or any(own.get(template) != choices for template, choices in templates.items()):
        raise DataError(
            f"content_free_labels = '{folder}': its labels are of another teacher, or lack templates of the training "
            f"labels ({', '.join(templates)}). Label content-free inputs ('N/A', '[MASK]') with the same command."
        )
    return {
        template: np.mean([_probabilities(label["choice_logprobs"], None) for label in free
                           if label["template"] == template], axis=0)
        for template in templates
    }  # fmt: skip


def _gold(label: dict[str, Any], names: Sequence[str], choice_labels: dict[str, str] | None, folder: str) -> int | None:
    """The index of the reference among the labels, None without one. Raises DataError for an unknown one."""
    references = [reference for reference in label["references"] or () if reference.strip()]
    if not references:
        return None
    known = [_plain(name) for name in names]
    wanted = _label_of(references[0], choice_labels)
    if wanted not in known:
        raise DataError(
            f"'{folder}', row {label['id']}: the reference '{references[0][:60]}' is not a label of the student "
            f"({', '.join(names)}). Name it in choice_labels, or label the texts without --reference-column."
        )
    return known.index(wanted)


def agreement(rows: Rows) -> tuple[float, int] | None:
    """Accuracy of the teacher's most probable label on the rows with a gold label, and their number."""
    pairs = [(int(np.argmax(row["logits"])), row["label"]) for row in rows if row["label"] is not None]
    return (sum(guess == gold for guess, gold in pairs) / len(pairs), len(pairs)) if pairs else None


def commonest_guess(rows: Rows) -> int:
    """The label that the teacher gives most rows; of equally frequent ones the smallest index."""
    counts = Counter(int(np.argmax(row["logits"])) for row in rows)
    return max(sorted(counts), key=lambda label: counts[label])


def parse_choice_labels(value: dict[str, Any] | str | None) -> dict[str, str] | None:
    """`choice_labels` as a mapping of texts, from YAML or a flag in JSON. Raises ConfigError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = {}
    if value is None:
        return None
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"choice_labels = {value!r}: must be a mapping such as {{great: positive}}")
    return {str(choice): str(label) for choice, label in value.items()}
