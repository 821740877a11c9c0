"""The documentation site, as `make docs` builds it: links lead somewhere, and what is public is there."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import typer.main
from sphinx.application import Sphinx

import rlkd
from rlkd.cli.main import app as commands
from rlkd.jobs.training import TRAINING_JOBS

# Of Sphinx, in its own extensions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
DOCS = Path(__file__).parents[1] / "docs"


def build(source: Path, out: Path) -> tuple[Sphinx, str]:
    """The site without its pages written, and the warnings."""
    warnings = io.StringIO()
    site = Sphinx(source, source, out / "out", out / "trees", "dummy", status=None, warning=warnings)
    site.build()
    return site, warnings.getvalue()


def options(command, name=()):
    """(words of a command, one of its options), of all commands."""
    for word, inner in getattr(command, "commands", {}).items():
        yield from options(inner, (*name, word))
    if not hasattr(command, "commands"):
        yield from (((*name,), flag) for option in command.params for flag in (option.opts or [""]))


@pytest.mark.slow
def test_the_site_is_whole(tmp_path):
    site, warnings = build(DOCS, tmp_path)
    assert warnings == ""
    described = site.env.domaindata["py"]["objects"]
    assert {f"rlkd.{name}" for name in rlkd._PUBLIC} - set(described) == set()
    text = {page: site.env.get_doctree(page).astext() for page in ("cli", "settings", "api", "tutorial")}
    sections = {part.partition("\n")[0]: part for part in text["cli"].split("\nrlkd ")}
    missing = [(words, flag) for words, flag in options(typer.main.get_command(commands))
               if flag not in sections[" ".join(words)].split("\n\n", 1)[1]]  # fmt: skip
    assert missing == []
    kinds = {kind for job in TRAINING_JOBS.values() for kind in job.settings if kind.__module__.startswith("rlkd.")}
    assert [name for kind in kinds for name in kind.__annotations__ if f"\n{name}\n" not in text["settings"]] == []


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("[x](nowhere.md)", "nowhere.md"),
        ("[x](index.md#no-such-heading)", "no-such-heading"),
        ("[x](../no/such/file.py)", "no file no/such/file.py"),
    ],
)
def test_a_link_to_nowhere_is_a_warning(tmp_path, link, said):
    source = tmp_path / "docs"
    source.mkdir()
    shutil.copy(DOCS / "conf.py", source)
    (source / "index.md").write_text(f"# A page\n\n{link} and [this](index.md#a-page).\n")
    assert said in build(source, tmp_path)[1]
