"""Write golden/promptsource-0.2.3.txt: digests of what promptsource itself makes of its templates.

Run by hand, where promptsource can be imported (Python 3.9, `pip install "setuptools<82" jinja2 pyyaml "datasets<2.15"
pandas requests`, then promptsource==0.2.3 with --no-deps):

    python tests/data/promptsource_differential.py                # writes the digests
    python tests/data/promptsource_differential.py --dump f.json  # the texts themselves, to look at a difference

A line is `template id, digest, renderings that succeed, all renderings`. A draw takes the item that its list decides,
for promptsource draws constants while it compiles: the global generator is in no order that a reader can follow.
"""

import copy
import hashlib
import json
import random
import sys
import zlib
from pathlib import Path

from synthetic_rows import rows

GOLDEN = Path(__file__).parent / "golden" / "promptsource-0.2.3.txt"


class ContentDraw:
    """Draws by the content of the list, in whatever order."""

    @staticmethod
    def choice(items):
        if not len(items):
            raise IndexError("nothing to choose from")
        return items[zlib.crc32(repr(items).encode()) % len(items)]


def outcome(apply, row):
    """The parts of a row, or None if it cannot be rendered."""
    try:
        return apply(copy.deepcopy(row))
    except Exception:
        return None


def record(fields, jinja, answer_choices, apply):
    """(digest, successes, count) of a template: its fields, and its renderings without and with truncation."""
    made = rows(fields["id"], jinja, answer_choices)
    outcomes = [outcome(lambda row, cut=cut: apply(row, cut), row) for cut in (False, True) for row in made]
    text = json.dumps([fields, outcomes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20], sum(o is not None for o in outcomes), len(outcomes), outcomes


def official():
    """(fields, jinja, answer_choices, apply) of every template, by promptsource itself."""
    from promptsource.templates import TemplateCollection

    random.choice = ContentDraw.choice
    for (dataset, subset), group in TemplateCollection().datasets_templates.items():
        for template in group.templates.values():
            fields = {
                "dataset": dataset + ("/" + subset if subset else ""),
                "id": template.id,
                "name": template.name,
                "original_task": template.metadata.original_task,
                "choices_in_prompt": template.metadata.choices_in_prompt,
                "metrics": list(template.metadata.metrics or []),
            }
            yield (
                fields,
                template.jinja,
                template.answer_choices,
                lambda row, cut, t=template: t.apply(row, truncate=cut),
            )


def main():
    lines, texts = [], {}
    for fields, jinja, answer_choices, apply in official():
        digest, good, count, outcomes = record(fields, jinja, answer_choices, apply)
        lines.append(f"{fields['id']} {digest} {good} {count}")
        texts[fields["id"]] = outcomes
    if sys.argv[1:2] == ["--dump"]:
        Path(sys.argv[2]).write_text(json.dumps(texts), encoding="utf-8")
    else:
        GOLDEN.write_text("\n".join(sorted(lines)) + "\n", encoding="utf-8")
    good, count = (sum(int(line.split()[i]) for line in lines) for i in (2, 3))
    print(f"{len(lines)} templates, {good} of {count} renderings succeed")


if __name__ == "__main__":
    main()
