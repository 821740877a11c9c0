"""Engines other than PyTorch: one from outside the package labels without PyTorch weights; which are made, and when."""

import json

import pytest

import stub
from rlkd import Decoding, EngineSettings, Example, ModelSpec, TeacherSpec, generate_pseudolabels, load_pseudolabels
from rlkd.errors import ConfigError, LockedError, ModelError
from rlkd.io.lock import writer_lock
from rlkd.labels.options import RunOptions
from rlkd.models import loading
from rlkd.sampling.engines.protocol import Answer
from rlkd.sampling.engines.registry import ENGINES
from tiny import EOS, save_pretrained, tiny_t5

EXAMPLES = [Example(str(i), text, (f"copy {text}",)) for i, text in enumerate(["a b", "c", "d e f g"])]
GREEDY = Decoding("greedy", 4)


class Echo:
    """Answers with the prompt's second token. It knows the teacher by name and revision only."""

    name, exact = "echo", True

    def __init__(self, model):
        self.model = model

    @staticmethod
    def objection(model, decoding, settings):
        return "it does not sample." if decoding.strategy == "sample" else None

    @staticmethod
    def reservation(decoding):
        return "it only echoes."

    @classmethod
    def of(cls, model, settings):
        return cls(model)

    def identity(self):
        return {"teacher": self.model.name, "revision": "r7", "dtype": self.model.dtype}

    def answer(self, prompts, seeds, decoding):
        return [[Answer([prompt[1], EOS], [-0.5, -0.25], True)] for prompt in prompts]

    def score(self, prompts, answers):
        raise AssertionError("nothing is ranked")


@pytest.fixture
def teacher(tmp_path):
    return TeacherSpec(ModelSpec(save_pretrained(tmp_path / "teacher", tiny_t5(tied=False)), "teacher"), 16)


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("PyTorch weights were loaded")

    monkeypatch.setattr(loading, "load_model", refuse)


def generate(teacher, out, engine=None, decoding=GREEDY):
    return generate_pseudolabels(teacher, EXAMPLES, out=out, template_names=["copy"], decoding=decoding, engine=engine)


def test_an_engine_from_outside_labels_without_pytorch_weights(teacher, tmp_path, monkeypatch, no_weights):
    monkeypatch.setitem(ENGINES, "echo", Echo)
    generate(teacher, tmp_path / "out", EngineSettings("echo"))
    rows = load_pseudolabels(tmp_path / "out").to_list()
    assert [row["label"] for row in rows] == ["a", "c", "d"]
    assert {(row["model"], row["revision"], row["sum_logprob"]) for row in rows} == {(teacher.model.name, "r7", -0.75)}
    header = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[0])
    assert header["settings"]["engine"] == "echo"
    assert "agreement" not in header


def test_what_an_engine_from_outside_cannot_do_is_refused(teacher, tmp_path, monkeypatch, no_weights):
    monkeypatch.setitem(ENGINES, "echo", Echo)
    with pytest.raises(ConfigError, match=r"engine = 'echo': it does not sample\. Use --engine torch\."):
        generate(teacher, tmp_path / "out", EngineSettings("echo"), Decoding("sample", 4))
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_cannot_take_its_role_is_refused(tmp_path, no_weights):
    wrong = save_pretrained(tmp_path / "wrong", tiny_t5(vocab=20))
    with pytest.raises(ModelError, match="do not match"):
        generate(TeacherSpec(ModelSpec(wrong, "teacher")), tmp_path / "out")


def test_an_entry_may_name_where_the_class_is(teacher, tmp_path, monkeypatch, no_weights):
    monkeypatch.setitem(ENGINES, "echo", f"{Echo.__module__}:Echo")
    assert generate(teacher, tmp_path / "out", EngineSettings("echo"))["rows"] == 3


@pytest.mark.parametrize("engine", ["torch", "ctranslate2"])
def test_a_teacher_by_name_gives_the_labels_of_one_in_memory(teacher, tmp_path, monkeypatch, engine):
    if engine == "ctranslate2":
        pytest.importorskip(engine)
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))
    generate(teacher, tmp_path / "name", EngineSettings(engine))
    generate(teacher.load(), tmp_path / "memory", EngineSettings(engine))
    for file in ("labels-00000.parquet", "manifest.jsonl", "README.md"):
        assert (tmp_path / "name" / file).read_bytes() == (tmp_path / "memory" / file).read_bytes()
    if engine == "torch":  # which is the default
        generate(teacher.load(), tmp_path / "default")
        assert stub.shards(tmp_path / "default") == stub.shards(tmp_path / "name")


def test_an_approximate_engine_is_compared_with_the_full_precision_teacher(teacher, tmp_path, monkeypatch):
    """By name, in memory, and given as an object: the same measurement, by the same reference."""
    pytest.importorskip("ctranslate2")
    from rlkd.sampling.engines.ctranslate2_engine import CTranslate2Engine

    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))
    int8, loaded = EngineSettings("ctranslate2", compute_type="int8"), teacher.load()
    generate(teacher, tmp_path / "name", int8)
    generate(loaded, tmp_path / "memory", int8)
    generate(loaded, tmp_path / "object", CTranslate2Engine(loaded.lm, "int8"))
    headers = [
        (tmp_path / name / "manifest.jsonl").read_text().splitlines()[0] for name in ("name", "memory", "object")
    ]
    assert headers[0] == headers[1] == headers[2]
    measured = json.loads(headers[0])["agreement"]
    assert measured["prompts"] == 3
    assert 0 < measured["mean_abs_delta_logprob"] < 0.5


def test_a_second_writer_is_refused_before_it_loads_weights(teacher, tmp_path, no_weights):
    out = tmp_path / "out"
    with writer_lock(out / "manifest.jsonl"), pytest.raises(LockedError):
        generate(teacher, out)


def test_options_that_do_not_exist():
    with pytest.raises(ConfigError, match="on_long = 'cut': allowed are 'truncate', 'error', 'skip'"):
        RunOptions(on_long="cut")
