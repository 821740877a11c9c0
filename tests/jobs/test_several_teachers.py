"""Several teachers from a file of settings: averaged, one per template, one per value of a column."""

import json

import pytest
import torch
import yaml

from rlkd import DataArguments, ReinforceArguments, ReinforceTrainer, TeacherArguments, parse_config, prepare
from rlkd.errors import ConfigError, DataError, ModelError
from rlkd.models.several import AveragedTeachers, RoutedTeachers
from rlkd.settings.trl_compat import ModelConfig
from tiny import VALID, save_pretrained, tiny_t5

TEMPLATES = """dataset: mine
templates:
  1: !Template {answer_choices: null, id: '1', jinja: "copy : {{text}} ||| x", name: copy, reference: '', metadata: &m
      !TemplateMetadata {original_task: true, choices_in_prompt: false, metrics: []}}
  2: !Template {answer_choices: null, id: '2', jinja: "reverse : {{text}} ||| x", name: turn, reference: '',
      metadata: *m}
"""
SORTS = {
    "teacher_column": "sort",
    "teachers": [{"teacher": "one", "values": ["x"]}, {"teacher": "two", "values": [1, "y"]}],
}
MORE = [{"teacher": "one", "teacher_append_eos": False, "weight": 3}, {"teacher": "two", "weight": 1}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("several")
    for seed, name in enumerate(("one", "two", "student")):
        save_pretrained(made / name, tiny_t5(tied=False, seed=seed, vocab=VALID + 4))
    rows = [{"text": " ".join(["abcdefgh"[i % 8], *str(i)]), "sort": ["x", 1, "y"][i % 3]} for i in range(24)]
    for row in rows:
        row["sort"] = str(row["sort"])
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "templates.yaml").write_text(TEMPLATES)
    return made


@pytest.fixture
def read(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)

    def read(out="run", **settings):
        settings = {
            "teacher_dtype": "float32", "model_name_or_path": "student", "dataset": "rows.jsonl",
            "input_column": "text", "output_dir": str(tmp_path / out), "use_cpu": True,
            "disable_tqdm": True, "max_new_tokens": 4,
            "per_device_train_batch_size": 8, "logging_steps": 1, "report_to": "none", **settings,
        }  # fmt: skip
        path = tmp_path / f"{out}.yaml"
        path.write_text(yaml.safe_dump(settings))
        types = (DataArguments, TeacherArguments, ModelConfig, ReinforceArguments)
        return parse_config(types, ["--config", str(path)])

    return read


def test_rewards_are_averaged_as_the_file_says(read):
    setup = prepare(*read(teachers=MORE))
    assert isinstance(setup.teacher, AveragedTeachers)
    assert setup.teacher.weights == [0.75, 0.25]
    one, two = setup.teacher.sources.values()
    assert (one.append_eos, two.append_eos) == (False, True)
    assert one.lm is not two.lm


def test_each_template_has_its_teacher(read):
    several = [{"teacher": "one", "templates": ["turn"]}, {"teacher": "two", "templates": ["copy"]}]
    setup = prepare(*read(teachers=several, templates=["templates.yaml"]))
    assert setup.teacher.reads == [(1,), (0,)]
    several[0]["templates"] = ["turm"]
    with pytest.raises(ConfigError, match=r"no template 'turm': allowed are 'copy', 'turn'\. Did you mean 'turn'"):
        prepare(*read(teachers=several, templates=["templates.yaml"]))
    several[0]["templates"] = ["copy"]
    with pytest.raises(ConfigError, match="template 'copy' must have exactly one teacher"):
        prepare(*read(teachers=several, templates=["templates.yaml"]))
    several[0]["templates"] = ["turn"]
    with pytest.raises(ConfigError, match="template_combination = 'pool': each teacher reads one template"):
        prepare(*read(teachers=several, templates=["templates.yaml"], template_combination="pool"))


def test_rows_are_routed_recorded_and_resumed_exactly(read, tmp_path, capsys):
    run = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4, "weak_start": "ignore", **SORTS}

    def trained(out, **more):
        data, teacher, student, training = read(out, **run, **more)
        setup = prepare(data, teacher, student, training)
        assert isinstance(setup.teacher, RoutedTeachers)
        rows = zip(setup.train_examples, setup.train_examples.column("sort"), strict=True)
        for example, value in rows:
            assert setup.teacher.route(example.teacher_inputs) == ("one" if value == "x" else "two")
        made = ReinforceTrainer(setup.student, training, train_examples=setup.train_examples, **setup.trainer_inputs())
        made.run(setup.settings)
        return made

    straight = trained("straight")
    record = json.loads((tmp_path / "straight" / "run.json").read_text())
    assert record["models"] == {"teacher one": "one", "teacher two": "two", "student": "student"}
    assert record["inputs"]["teacher one's weights"] != record["inputs"]["teacher two's weights"]
    assert record["inputs"]["teachers"].startswith("each input has one of one, two, by column sort (digest ")
    assert "distilled from" in (tmp_path / "straight" / "README.md").read_text()
    held_out = [json.loads(line) for line in (tmp_path / "straight" / "held_out.jsonl").read_text().splitlines()]
    assert {row["teacher_name"] for row in held_out} <= {"one", "two"}
    again = trained("again", resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    for key, tensor in straight.policy.state_dict().items():
        assert torch.equal(tensor, again.policy.state_dict()[key]), key
    # Another route is another run.
    run["teachers"] = [{"teacher": "one", "values": ["y", "x"]}, {"teacher": "two", "values": [1]}]
    with pytest.raises(ConfigError, match="teachers: "):
        prepare(*read("other", **run, resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2")))


@pytest.mark.parametrize(
    ("settings", "error", "wanted"),
    [
        ({"teachers": MORE, "teacher": "one"}, ConfigError, "teacher = 'one': `teachers` name the teachers"),
        ({"teachers": MORE[:1]}, ConfigError, "name at least 2"),
        ({"teachers": [MORE[0], {"teacher": "two"}]}, ConfigError, "'two': has no weight, and others have"),
        ({"teachers": [MORE[0], {**MORE[1], "weight": -1}]}, ConfigError, "weight = -1: must be a number above 0"),
        ({"teachers": [MORE[0], {**MORE[1], "weigh": 1}]}, ConfigError, "Did you mean 'weight'"),
        ({"teachers": [MORE[0], {"weight": 1}]}, ConfigError, "number 2: names no teacher"),
        ({"teachers": [MORE[0], MORE[0]]}, ConfigError, "'one': is named twice"),
        ({"teachers": [MORE[0], {"teacher": "two", "values": ["x"]}]}, ConfigError, "give one of these"),
        ({**SORTS, "teacher_column": None}, ConfigError, "goes with `values`"),
        ({"teacher_column": "sort"}, ConfigError, "teacher_column = 'sort': there are no `teachers`"),
        ({"teachers": "one"}, ConfigError, "teachers = one: allowed are lists of mappings"),
        ({"teachers": MORE, "teacher_mix": 0.2}, ConfigError, "teacher_mix = 0.2: takes one teacher"),
        ({"teachers": MORE, "teacher_signal": "server", "server_url": "http://x/v1"}, ConfigError, "takes one teacher"),
        ({"teachers": [MORE[0], {"teacher": "nobody/here", "weight": 1}]}, ModelError, "nobody/here"),
        ({**SORTS, "teacher_column": "sorte"}, DataError, "Did you mean 'sort'"),
        ({**SORTS, "teachers": [SORTS["teachers"][0], {"teacher": "two", "values": ["y"]}]}, DataError,
         "rows have a sort that no teacher names, first '1': known are 'x', 'y'"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_weights_load(read, monkeypatch, settings, error, wanted):
    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("rlkd.models.loading.load_model", refuse)
    with pytest.raises(error, match=wanted):
        prepare(*read(**settings))


def test_the_same_prompts_with_two_teachers_are_refused(read, folder):
    rows = [{"text": "a b", "sort": "x"}, {"text": "a b", "sort": "y"}] * 8
    (folder / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="has the prompts of another row, but another teacher"):
        prepare(*read(dataset="same.jsonl", eval_dataset="rows.jsonl", **SORTS))


def test_labels_of_unknown_prompts_have_no_teacher(read):
    setup = prepare(*read(**SORTS))
    with pytest.raises(DataError, match="prompts of no training or held-out row"):
        setup.teacher.answers_by([("never seen",)])
