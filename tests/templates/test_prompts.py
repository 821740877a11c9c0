import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rlkd.errors import DataError
from rlkd.templates.sources import PACKAGE_PROMPTS, PROMPTSOURCE_SHA256, Source, TemplatesFile
from rlkd.templates.template import Rendered, Template, load_templates

YAML = """\
dataset: toy
subset: null
templates:
  id-one: !Template
    answer_choices: no ||| yes
    id: id-one
    jinja: 'Is "{{ text }}" good? ||| {{ answer_choices[label] }}'
    metadata: !TemplateMetadata
      choices_in_prompt: null
      metrics: [Accuracy]
      original_task: true
    name: 'Good: or bad'
    reference: ''
    colour: red
  id-two: !Template
    jinja: '{{ text }}'
    metadata: !TemplateMetadata {}
    name: bare
"""


def template(source, choices=None, id="i"):
    return Template("t", source, choices, id)


@pytest.mark.parametrize(
    ("source", "choices", "row", "parts"),
    [
        ("Say: {{ a }} ||| {{ b }}", None, {"a": "x", "b": "y"}, ["Say: x", "y"]),
        ("  {{ a }}\n\n|||\n{{ b }}\n", None, {"a": " x ", "b": "y"}, ["x", "y"]),
        ("{{ a }}", None, {"a": "x"}, ["x"]),
        ("{{ a }} |||", None, {"a": "x"}, ["x", ""]),
        ("{{a}}|||{{a}}|||z", None, {"a": "x"}, ["x", "x", "z"]),
        ("{% if l == 1 %}A {{ a }} ||| B{% endif %}", None, {"a": "x", "l": 1}, ["A x", "B"]),
        ("{% if l == 1 %}A {{ a }} ||| B{% endif %}", None, {"a": "x", "l": 0}, [""]),
        ("{{ a }} ||| {{ answer_choices[l] }}", "no ||| yes", {"a": "x", "l": 1}, ["x", "yes"]),
        ("{{ answer_choices | join('/') }}", "{{ a }} ||| {{ b }}", {"a": "x", "b": "p|||q"}, ["x/p|||q"]),
        ("{{ a }} ||| t", None, {"a": "evil ||| target"}, ["evil ||| target", "t"]),
        ("{{ a[0].b }} ||| t", None, {"a": [{"b": "evil ||| target"}]}, ["evil ||| target", "t"]),
        ("{{ missing }}{{ a }}", None, {"a": "x"}, ["x"]),
        ("{{ xs | most_frequent | join(',') }}", None, {"xs": ["b", "a", "c", "a", "b"]}, ["b,a"]),
        ("{{ xs | most_frequent | choice }}", None, {"xs": ["b", "a", "a"]}, ["a"]),
        ("{% for x in xs %}{{ loop.index }}{{ x }} {% endfor %}", None, {"xs": ["a", "b"]}, ["1a 2b"]),
        ("{{ a | upper }} {{ n + 1 }}", None, {"a": "x", "n": 2}, ["X 3"]),
        ("{{ a }} <b>&</b>", None, {"a": "<i>"}, ["<i> <b>&</b>"]),
    ],
)
def test_rendering_byte_for_byte(source, choices, row, parts):
    assert template(source, choices).parts(row) == parts


@pytest.mark.parametrize(
    ("source", "choices", "row", "rendered"),
    [
        ("{{ a }} ||| {{ b }}", None, {"a": "x", "b": "y"}, Rendered("x", "y")),
        ("{{ a }} |||", None, {"a": "x"}, Rendered("x", reason="no target")),
        ("{{ a }}", None, {"a": "x"}, Rendered("x", reason="no target")),
        ("{{ a }}|||b|||c", None, {"a": "x"}, Rendered("x", reason="several targets")),
        ("{{ a }} ||| b", None, {"a": ""}, Rendered("", reason="not applicable")),
        ("{{ a }} ||| {{ b }}", None, {"a": "x", "b": None}, Rendered("x", reason="label missing")),
        ("{{ a }} ||| {{ b }}", None, {"a": "x"}, Rendered("x", reason="label missing")),
        ("{{ a }} ||| {{ b }}", None, {"a": "x", "b": -1}, Rendered("x", "-1")),
        ("{{ a }} ||| {{ ['n', 'y'][b] }}", None, {"a": "x", "b": -1}, Rendered("x", reason="label missing")),
        ("{{ a }} ||| {{ answer_choices[b] }}", "n ||| y", {"a": "x", "b": 1}, Rendered("x", "y", ("n", "y"))),
        (
            "{{ a }} ||| {{ answer_choices[b] }}",
            "n ||| y",
            {"a": "x", "b": -1},
            Rendered("x", None, ("n", "y"), "label missing"),
        ),
        (
            "{% set gold = answer_choices[b] %}{{ a }} ||| {{ gold }}",
            "n ||| y",
            {"a": "x", "b": -1},
            Rendered("x", None, ("n", "y"), "label missing"),
        ),
        (
            "{{ a }} ||| {% if b == 1 %}yes{% else %}no{% endif %}",
            "no ||| yes",
            {"a": "x", "b": -1},
            Rendered("x", None, ("no", "yes"), "label missing"),
        ),
    ],
)
def test_render_says_why_a_target_is_not_there(source, choices, row, rendered):
    assert template(source, choices).render(row) == rendered


def test_random_filters_depend_on_seed_template_and_row_only():
    source = "{{ [1, 2, 3, 4, 5, 6, 7, 8, 9] | choice }}{{ answer_choices | random }}"
    rows = [{"n": i} for i in range(40)]

    def draw(seed=0, id="i", rows=rows):
        return [template(source, "a ||| b ||| c", id).parts(row, seed=seed)[0] for row in rows]

    first = draw()
    assert draw() == first
    assert draw(rows=rows[::-1]) == first[::-1]
    assert set("".join(first)) == set("123456789abc")
    assert draw(seed=1) != first != draw(id="j")


def test_rows_are_not_changed_by_a_template():
    row = {"xs": ["a"]}
    assert template("{{ xs.append('b') or xs | join }}").parts(row) == ["ab"]
    assert row == {"xs": ["a"]}


def test_templates_cannot_reach_python():
    with pytest.raises(DataError, match="reads '__class__' of a str, which is not allowed"):
        template("{{ a.__class__.__mro__[1].__subclasses__() }}").parts({"a": "x"})


def test_rendering_errors_name_template_and_row():
    with pytest.raises(DataError) as error:
        Template("T", "{{ a.b.c }}", origin="f.yaml").parts({"a": "value"})
    for text in ("template 'T' of f.yaml", "UndefinedError", "{'a': 'value'}", "types the template expects"):
        assert text in str(error.value)
    with pytest.raises(DataError, match="a column is named 'answer_choices'"):
        template("{{ a }}").parts({"answer_choices": ["x"]})


@pytest.mark.parametrize(
    ("source", "choices", "of_input", "of_both"),
    [
        ("{{ a }} ||| {{ b }}", None, {"a"}, {"a", "b"}),
        ("{% if l %}{{ a }} ||| {{ b }}{% endif %}", None, {"a", "l"}, {"a", "b", "l"}),
        ("{{ a }}", None, {"a"}, {"a"}),
        ("{% for x in xs %}{{ x.y }}{{ loop.index }}{% endfor %}{{ range(2) }}", None, {"xs"}, {"xs"}),
        ("{% if q %}{% set w = 1 %}{% endif %}{{ w }}", None, {"q"}, {"q"}),
        ("{% if z is defined %}{{ z }}{% endif %}{{ a }}", None, {"a"}, {"a"}),
        ("{{ answer_choices }} ||| {{ l }}", "{{ c }} ||| no", {"c"}, {"c", "l"}),
        ("{{ a }} ||| {{ answer_choices[l] }}", "{{ c }} ||| no", {"a"}, {"a", "c", "l"}),
    ],
)
def test_columns(source, choices, of_input, of_both):
    assert template(source, choices).columns(target=False) == of_input
    assert template(source, choices).columns(target=True) == of_both


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "own" / "toy" / "templates.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(YAML, encoding="utf-8-sig")
    return path


def test_all_fields_of_a_template_are_read(file):
    good, bare = load_templates(str(file), all_templates=True, gold_input=True)
    assert good == Template(
        "Good: or bad",
        'Is "{{ text }}" good? ||| {{ answer_choices[label] }}',
        "no ||| yes",
        "id-one",
        True,
        str(file),
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        metrics=("Accuracy",),
        trusted=False,
    )
    assert (bare.answer_choices, bare.id, bare.original_task) == (None, "id-two", None)
    assert good.render({"text": "x", "label": 1}) == Rendered('Is "x" good?', "yes", ("no", "yes"))


def test_specs(file, monkeypatch):
    folder = file.parents[1]
    names = ["Good: or bad", "bare"]
    for spec in (str(file), "toy"):
        assert [t.name for t in load_templates(spec, folder=folder)] == names
        assert [t.name for t in load_templates(f"{spec}:Good: or bad", folder=folder)] == ["Good: or bad"]
        assert [t.name for t in load_templates(f"{spec}:id-two", folder=folder)] == ["bare"]
    sub = folder / "toy" / "sub" / "templates.yaml"
    sub.parent.mkdir()
    sub.write_text(YAML.replace("bare", "deep"))
    assert [t.name for t in load_templates("toy/sub:deep", folder=folder)] == ["deep"]
    assert list(Source(folder).files) == ["toy/sub", "toy"]
    # Without a folder: ./prompts first, then those next to the package.
    folder.rename(folder.with_name("prompts"))
    monkeypatch.chdir(folder.parent)
    assert len(load_templates("toy")) == 2
    assert len(load_templates("quora_para")) == 4


def test_unknown_templates_list_what_there_is(file):
    folder = file.parents[1]
    with pytest.raises(DataError) as error:
        load_templates("toy:bara", folder=folder)
    assert str(error.value) == (
        f"{file}: template 'bara' does not exist. Available: Good: or bad, bare. Did you mean 'bare'?"
    )
    with pytest.raises(DataError, match=r"no templates for 'toi' in .*own\. Available: toy\. Did you mean 'toy'\?"):
        load_templates("toi", folder=folder)
    with pytest.raises(DataError, match=r"none\.yaml cannot be read: No such file"):
        load_templates(str(folder / "none.yaml"))
    file.write_text(YAML.replace("bare", "'Good: or bad'"))
    with pytest.raises(DataError, match=re.escape("names several templates: use one of their ids (id-one, id-two)")):
        load_templates("toy:Good: or bad", folder=folder)


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("name: bare", "name: 3", "template id-two: field 'name' is 3; allowed is str"),
        ("    jinja: '{{ text }}'\n", "", "template id-two: field 'jinja' is None"),
        ("answer_choices: no ||| yes", "answer_choices: [no, yes]", "field 'answer_choices' is [False, True]; allowed"),
        ("original_task: true", "original_task: sure", "field 'original_task' is 'sure'; allowed is bool"),
        ("!TemplateMetadata {}", "!!python/object/apply:os.system ['true']", "templates.yaml:17 is not valid YAML"),
        ("templates:", "prompts:", "has no 'templates' mapping"),
        ("'{{ text }}'", "'{{ text '", "template 'bare' of"),
        ("'{{ text }}'", "'{{ text | nofilter }}'", "nofilter"),
        ("no ||| yes", "'{% if %}'", "its answer_choices, line 1 is not valid jinja"),
        ("name: bare", "name: 'bare", "is not valid YAML"),
    ],
)
def test_broken_files_name_file_and_field(file, old, new, wanted):
    assert old in YAML
    file.write_text(YAML.replace(old, new))
    with pytest.raises(DataError) as error:
        load_templates(str(file))
    assert wanted in str(error.value)
    assert str(file) in str(error.value)


OURS = {
    "quora_para": ({"source": "Q?", "target": "T?"}, "T?"),
    "agnews_names": ({"text": "N.", "label": "Sci/Tech"}, "Sci/Tech"),
    "dailydialog": ({"source": "Hi .", "target": "Hello ."}, "Hello ."),
    "dialogsum": ({"dialogue": "#Person1#: Hi.", "summary": "They greet."}, "They greet."),
    "asset": ({"source": "Complex.", "target": "Simple."}, "Simple."),
    "e2e": ({"mr": "name[X]", "ref": "X is it."}, "X is it."),
}


@pytest.mark.parametrize("dataset", OURS)
def test_our_templates_put_the_source_in_and_keep_the_target_out(dataset):
    row, gold = OURS[dataset]
    first = next(iter(row))
    templates = load_templates(dataset, folder=PACKAGE_PROMPTS)
    assert len({t.id for t in templates}) == len({t.name for t in templates}) == 4
    for t in templates:
        assert t.columns(target=False) == {first}
        assert t.columns(target=True) == set(row)
        rendered = t.render(row)
        prompt = rendered.input
        assert rendered.target == gold
        assert prompt.count(row[first]) == 1
        assert dataset == "agnews_names" or gold not in prompt
        assert t.original_task is True


def test_our_template_files_are_all_covered_and_two_are_exact():
    assert set(Source(PACKAGE_PROMPTS).files) == set(OURS)
    (reply,) = load_templates("dailydialog:The dialogue response is", folder=PACKAGE_PROMPTS)
    assert reply.render({"source": "Hi .", "target": "Yo ."}) == Rendered("The dialogue response of Hi . is:", "Yo .")
    (topic,) = load_templates("agnews_names:Choose the topic", folder=PACKAGE_PROMPTS)
    assert topic.render({"text": "A\\B won.", "label": "Sports"}) == Rendered(
        "Choose the topic of the news text from World, Sports, Business, Sci/Tech.\n\nText: A\\B won.\nTopic:",
        "Sports",
        ("World", "Sports", "Business", "Sci/Tech"),
    )


def test_only_our_own_and_promptsource_s_templates_are_trusted(file, tmp_path, monkeypatch):
    assert all(t.trusted for t in load_templates("quora_para", all_templates=True))
    assert not any(t.trusted for t in load_templates(str(file), gold_input=True, all_templates=True))
    package = tmp_path / "site" / "promptsource"
    (package / "templates" / "toy").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "templates" / "toy" / "templates.yaml").write_text(YAML)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    # Nothing says that what is installed under promptsource's name is what was published.
    assert not any(t.trusted for t in load_templates("toy", all_templates=True, gold_input=True))
    archive = TemplatesFile("a.tar.gz!toy/templates.yaml", YAML.encode(), PROMPTSOURCE_SHA256, "a.tar.gz")
    assert archive.trusted
    assert not replace(archive, sha256="0" * 64).trusted
