import re

import pytest

from rlkd.errors import ConfigError, DataError
from rlkd.templates.leaks import leaks
from rlkd.templates.lint import lint
from rlkd.templates.parsing import parse
from rlkd.templates.sources import read_file
from rlkd.templates.template import Template, load_templates

GOOD = """\
dataset: toy
subset: None
templates:
  id-one: !Template
    answer_choices: no ||| yes
    id: id-one
    jinja: |-
      Is "{{ text }}" good?
      |||
      {{ answer_choices[label] }}
    metadata: !TemplateMetadata
      choices_in_prompt: false
      languages: [en]
      metrics: [Accuracy]
      original_task: true
    name: one
    reference: ''
  id-two: !Template
    jinja: 'Write about {{ answer_choices[label] }}. ||| {{ text }}'
    answer_choices: no ||| yes
    metadata: !TemplateMetadata {original_task: false}
    name: two
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "templates.yaml"
    path.write_text(GOOD)
    return path


def problems(file, text=GOOD, columns=None):
    file.write_text(text)
    return [(p.line, p.level, p.message) for p in lint(read_file(file), columns)]


def test_metadata_and_lines():
    parsed = parse(GOOD.encode())
    assert (parsed.dataset, parsed.problems) == ("toy", [])
    one, two = parsed.entries.values()
    assert one["metadata"]["languages"] == ["en"]
    assert (one.line, one.line_of("jinja"), two.line_of("name")) == (4, 7, 22)


@pytest.mark.parametrize(
    ("old", "new", "line", "wanted"),
    [
        ("answer_choices: no ||| yes\n    id", "answer_choices: 3\n    id", 5, "'answer_choices' is 3; allowed is str"),
        ("metrics: [Accuracy]", "metrics: Accuracy", 14, "field 'metrics' is 'Accuracy'; allowed is list"),
        ("metrics: [Accuracy]", "metrics: [3]", 14, "field 'metrics' must be a list of strings, found [3]"),
        ("choices_in_prompt: false", "choices_in_prompt: 'no'", 12, "'choices_in_prompt' is 'no'; allowed is bool"),
        ("original_task: true", "original_task: sure", 15, "field 'original_task' is 'sure'; allowed is bool"),
        ("    name: two\n", "", 18, "field 'name' is None; allowed is str"),
        ("id-two:", "id-one:", 18, "key 'id-one' is already used in line 4"),
        ("id-two: !Template", "id-two: !!python/object:os.system", 18, "could not determine a constructor for the tag"),
        ("id-two: !Template", "id-two: !Other", 18, "could not determine a constructor for the tag '!Other'"),
        ("dataset: toy", "dataset: !!python/name:os.system toy", 1, "could not determine a constructor"),
        ("  id-two: !Template\n", "  id-two: !Template x\n  id-three: !Template\n", 18, "!Template must be a mapping"),
        ("  id-two: !Template\n", "  id-two: text\n  id-three: !Template\n", 18, "a template is a mapping with name"),
        ("dataset: toy", "dataset: 'toy", 18, "is not valid YAML"),
        ("    name: two\n", "    name: two\n    name: three\n", 23, "key 'name' is already used in line 22"),
        ("{original_task: false}", "{original_task: false, original_task: true}", 21, "key 'original_task' is already"),
        ("name: two", 'name: "two\\e[2J"', 18, "its name must be one line of at most 200 characters"),
        ("name: two", 'name: "two\\nthree"', 18, "its name must be one line of at most 200 characters"),
        ("name: two", "name: " + "x" * 201, 18, "its name must be one line of at most 200 characters"),
        ("id-two:", '"id\\a":', 18, "its id must be one line of at most 200 characters"),
        ("id-two:", "1: {name: a, jinja: b}\n  '1':", 19, "id '1' is also given as a str"),
        ("metrics: [Accuracy]", "metrics: [&a [" + "x" * 999 + "], *a, *a]", 14, "a list of strings, found [['xxx"),
    ],
)
def test_errors_have_their_line(file, old, new, line, wanted):
    assert old in GOOD
    file.write_text(GOOD.replace(old, new, 1))
    if line == 18 and wanted == "is not valid YAML":
        line = int(re.search(r":(\d+)", _raised(file)).group(1))
    message = _raised(file)
    assert message.startswith(f"{file}:{line}")
    assert wanted in message


def _raised(file):
    with pytest.raises(DataError) as error:
        load_templates(str(file))
    return str(error.value)


def test_bytes_that_are_not_utf8_are_placed(file):
    file.write_bytes(GOOD.encode() + b"# \xff")
    assert f"{file}:23 is not UTF-8" in _raised(file)


def test_a_good_file_has_one_thing_to_know(file):
    # `two` is the reverse task: it prints the label.
    assert problems(file) == [(19, "warning", "'two': the input shows the gold columns label.")]


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("      |||\n", "", (7, "warning", "'one': no target: the jinja has no '|||'.")),
        (
            "\n    answer_choices: no ||| yes\n    metadata",
            "\n    metadata",
            (19, "error", "reads answer_choices, but"),
        ),
        ("name: two", "name: one", (22, "error", "'one': the name is already used in line 16.")),
        ("name: two", "name: 'two '", (22, "warning", "'two ': the name starts or ends with white space.")),
        ("no ||| yes\n    id", "no ||| \n    id", (5, "error", "'one': an answer choice is empty.")),
        ("no ||| yes\n    id", "no ||| no\n    id", (5, "warning", "'one': the answer choice 'no' occurs twice.")),
        ("good?\n", "good? \n", (7, "note", "'one': white space at the end of a line")),
        ("    reference: ''\n", "    colour: red\n", (17, "note", "template id-one: ignored unknown fields colour")),
        ("    id: id-one\n", "    id: other\n", (6, "warning", "field 'id' is 'other'; the key is used")),
        ('{{ text }}" good', '{{ text | nofilter }}" good', (7, "error", "nofilter")),
        ('{{ text }}" good', '{{ text " good', (7, "error", "is not valid jinja")),
    ],
)
def test_lint(file, old, new, wanted):
    assert old in GOOD
    found = problems(file, GOOD.replace(old, new, 1))
    assert any((line, level) == wanted[:2] and wanted[2] in message for line, level, message in found), found


def test_a_leak_in_a_template_of_the_original_task_is_an_error(file):
    third = "  id-3: !Template {name: three, jinja: '{{ text }} ||| {{ label }}', metadata: {original_task: true}}\n"
    found = problems(file, GOOD.replace("original_task: false", "original_task: true") + third)
    assert (19, "error", "'two': the input shows the gold columns label.") in found


def test_lint_against_rows(file):
    found = problems(file, columns=["text", "extra"])
    assert (1, "note", "no template reads the columns extra.") in found
    assert (7, "error", "'one': the rows lack label.") in found


def test_lint_for_a_tokenizer(file):
    """Fixed choices are compared as the teacher reads them, once; those that depend on the row are not known."""
    from functools import partial

    from rlkd.sampling.ranking import choice_problem
    from tiny import tiny_tokenizer

    def found(choices):
        file.write_text(GOOD.replace("no ||| yes\n    id", f"{choices}\n    id", 1))
        problems = lint(read_file(file), None, partial(choice_problem, tiny_tokenizer()))
        return [(p.line, p.level, p.message) for p in problems if p.line == 5]

    assert found("'{ ||| <'") == [(5, "error", "'one': the tokenizer has no tokens for the answer choice '{'.")]
    assert found("a {  ||| a <") == [(5, "error", "'one': the answer choices 'a {' and 'a <' have the same tokens.")]
    assert found("a |||") == [(5, "error", "'one': an answer choice is empty.")]
    assert found("a ||| b") == found("'{{ text }} ||| <'") == []


def test_official_problems_are_logged(file, caplog):
    text = GOOD.replace("id-one", "b808b05e-0d2a-459e-b345-2d83cdb20216")
    assert any("asks about the gold answer in every row" in message for _, _, message in problems(file, text))
    load_templates(f"{file}:one")
    assert "asks about the gold answer in every row" in caplog.text


def test_original_task_by_default_and_others_when_asked(file):
    def names(spec="", **options):
        return [t.name for t in load_templates(f"{file}{spec}", **options)]

    assert names() == ["one"]
    assert names(all_templates=True) == ["one"]  # `two` shows the label
    assert names(all_templates=True, gold_input=True) == ["one", "two"]
    assert names(":two", gold_input=True) == ["two"]
    with pytest.raises(DataError, match=r"the input shows gold columns \(two: label\).*allow it with --gold-input"):
        names(":two")
    file.write_text(GOOD.replace("original_task: true", "original_task: false"))
    with pytest.raises(DataError, match=r"none of its 2 templates is for the original task\. Name one \(one, two\)"):
        names()
    file.write_text(GOOD.replace("name: one", "name: ' one '"))
    assert names(":one") == [" one "]
    with pytest.raises(ConfigError, match="truncation = 't5': allowed are 'none', 't0'"):
        names(truncation="t5")


def made(name, source, original=True, choices=None, in_prompt=None):
    return Template(name, source, choices, name, original, choices_in_prompt=in_prompt)


def test_leaks():
    summary = made("s", "{{ document }} ||| {{ summary }}")
    reverse = made("r", "{{ summary }} ||| {{ document }}", False)
    loop = made("l", "{% for x in summary %}{{ x }}{% endfor %} ||| {{ document }}", False)
    variable = made("v", "{% set x = summary | upper %}{{ x }} ||| {{ document }}", False)
    branch = made("b", "{% if document %}{{ document }} ||| a{% else %}{{ summary }} ||| b{% endif %}", False)
    condition = made("c", "{% if summary %}{{ document }} ||| {{ summary }}{% endif %}", False)
    found = leaks([summary, reverse, loop, variable, branch, condition])
    assert set(found) == {"r", "l", "v", "b"}
    assert set(found.values()) == {frozenset({"summary"})}
    # The right answer is among the choices: that is the task.
    multiple = made("m", "{{ q }} {{ right }} {{ wrong }} ||| {{ right }}", True, "{{ right }} ||| {{ wrong }}", True)
    free = made("f", "{{ q }} ||| {{ right }}")
    also = made("g", "Answer: {{ q }} ||| {{ right }}")
    assert leaks([multiple, free, also]) == {}
    assert set(leaks([made("x", "{{ q }} {{ right }} ||| yes", False), free, also])) == {"x"}


def test_truncation_and_compatibility():
    long = "word " * 900
    whole = Template("t", "{{ a }} ||| {{ a }}", id="i")
    from dataclasses import replace

    cut = replace(whole, truncation="t0")
    first, second = cut.parts({"a": long})
    assert first == second == "word " * 408 + "word..."  # jinja's truncate: whole words within 2,048 characters
    assert whole.parts({"a": long})[0] == long.strip()
    compatible = replace(whole, source="{{ a[0] }} ||| t", strict_compat=True)
    assert compatible.parts({"a": ["x ||| y"]}) == ["x", "y", "t"]
    assert replace(compatible, strict_compat=False).parts({"a": ["x ||| y"]}) == ["x ||| y", "t"]
    prints = {
        t.fingerprint for t in (whole, cut, compatible, replace(whole, id="j"), replace(whole, answer_choices="a"))
    }
    assert len(prints) == 5
    assert replace(whole, name="other", origin="elsewhere").fingerprint == whole.fingerprint
    assert replace(whole, answer_choices="{{ a }} ||| b", trusted=False).render({"a": "x"}).choices == ("x", "b")
