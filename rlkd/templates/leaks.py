"""Templates whose input contains the answer."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .template import Template


def leaks(templates: list[Template]) -> dict[str, frozenset[str]]:
    """Id of each template whose input prints gold columns -> those columns.

    A column is gold if more original-task templates of the file read it only in their target than print it in their
    input. A column from which the answer choices are made is not a leak in a template that prints the choices.
    """
    originals = [t for t in templates if t.original_task is not False]
    target_only = Counter(name for t in originals for name in t.gold_columns)
    printed = Counter(name for t in originals for name in t.shown_columns)
    gold = {name for name, count in target_only.items() if count > printed[name]}
    found = {}
    for template in templates:
        of_choices = template.choice_columns if template.choices_in_prompt is not False else frozenset()
        if shown := (template.shown_columns & gold) - of_choices:
            found[template.id] = shown
    return found
