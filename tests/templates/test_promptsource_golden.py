"""All of promptsource's templates, read from its archive, against digests that promptsource itself made."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
from promptsource_differential import GOLDEN, ContentDraw, record

from rlkd.templates import rows
from rlkd.templates.meter import DEFAULT_LIMITS
from rlkd.templates.parsing import parse
from rlkd.templates.sources import PROMPTSOURCE_SHA256 as SHA256
from rlkd.templates.sources import Source, cached_archive
from rlkd.templates.template import to_template

ARCHIVE = Path(os.environ.get("RLKD_PROMPTSOURCE") or cached_archive())
# Four templates loop over a text of 5,000 characters, which the sandbox's usual limit refuses.
PATIENT = replace(DEFAULT_LIMITS, steps=10**9)


def test_the_digests_cover_every_template():
    lines = [line.split() for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len({id for id, *_ in lines}) == 2085
    assert sum(int(good) > 0 for *_, good, _ in lines) > 2000
    assert sum(int(good) for *_, good, _ in lines) > 55_000


@pytest.mark.slow
@pytest.mark.skipif(
    not ARCHIVE.is_file(), reason="no archive: `rlkd prompts download`, or name it in RLKD_PROMPTSOURCE"
)
def test_every_official_template_renders_as_promptsource_renders_it(monkeypatch):
    assert hashlib.sha256(ARCHIVE.read_bytes()).hexdigest() == SHA256
    monkeypatch.setattr(rows.RowRandom, "generator", ContentDraw())
    golden = dict(line.split(" ", 1) for line in GOLDEN.read_text(encoding="utf-8").splitlines())
    source, found = Source(ARCHIVE), {}
    for dataset in source.files:
        file = source.read(dataset)
        parsed = parse(file.content)
        assert not parsed.errors
        for key, entry in parsed.entries.items():
            found[key] = " ".join(map(str, ours(dataset, to_template(key, entry, file))))
    assert len(found) == 2085
    assert {key for key in golden if found.get(key) != golden[key]} == set()


def ours(dataset, template):
    by_cut = {
        cut: replace(template, strict_compat=True, truncation="t0" if cut else "none", limits=PATIENT)
        for cut in (False, True)
    }
    fields = {
        "dataset": dataset,
        "id": template.id,
        "name": template.name,
        "original_task": template.original_task,
        "choices_in_prompt": template.choices_in_prompt,
        "metrics": list(template.metrics),
    }
    return record(fields, template.source, template.answer_choices, lambda row, cut: by_cut[cut].parts(row))[:3]
