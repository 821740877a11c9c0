"""Code that comes with a model never runs, whatever is typed at a prompt, and nothing prompts."""

import ast
import builtins
import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from rlkd import EncoderStudentArguments, EncoderTeacherArguments, LabelledDataArguments, TKDArguments
from rlkd.errors import ModelError
from rlkd.jobs.encoder_setup import prepare_encoders
from rlkd.models.encoders import onnx_export
from rlkd.models.encoders.representations import load_encoder, load_encoder_config
from rlkd.models.loading import load_config
from rlkd.models.spec import ModelSpec
from rlkd.models.vocabulary import load_tokenizer
from tiny import classifier_tokenizer, save_pretrained, tiny_classifier, tiny_t5

PACKAGE = Path(__file__).parents[2] / "rlkd"
PAYLOAD = "from pathlib import Path\nPath({marker!r}).touch()\nclass Mine: pass\n"
AUTO_MAP = {
    "AutoConfig": "code.Mine", "AutoModel": "code.Mine", "AutoModelForSeq2SeqLM": "code.Mine",
    "AutoModelForSequenceClassification": "code.Mine", "AutoTokenizer": ["code.Mine", "code.Mine"],
}  # fmt: skip


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that the payload makes; every question on stdin is answered with yes, and noted."""
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "y")
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()
    assert asked == []


def infected(folder, marker, *, config=(), tokenizer=()):
    (folder / "code.py").write_text(PAYLOAD.format(marker=str(marker)))
    for file, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        known = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(known | dict(changes)))
    return str(folder)


CASES = {
    "configuration": {"config": {"model_type": "mine", "auto_map": AUTO_MAP}},
    "model": {"config": {"auto_map": AUTO_MAP}},
    "tokenizer": {"tokenizer": {"tokenizer_class": "Mine", "auto_map": AUTO_MAP}},
    "all": {
        "config": {"model_type": "mine", "auto_map": AUTO_MAP},
        "tokenizer": {"tokenizer_class": "Mine", "auto_map": AUTO_MAP},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_code_of_a_model_never_runs(tmp_path, marker, case):
    """A model that transformers knows by itself loads without its code; another one is refused."""
    language = Path(save_pretrained(tmp_path / "language", tiny_t5()))
    encoder = Path(save_pretrained(tmp_path / "encoder", tiny_classifier(), classifier_tokenizer()))
    names = [infected(folder, marker, **CASES[case]) for folder in (language, encoder)]

    def tkd(name):
        rows = tmp_path / "rows.csv"
        rows.write_text("text,label\n" + "a,0\nb,1\n" * 3)
        data = LabelledDataArguments(train_file=str(rows), dev_file=str(rows), text_column="text", label_column="label")
        training = TKDArguments(str(tmp_path / "run"), use_cpu=True, max_length=16)
        prepare_encoders(data, EncoderTeacherArguments(name), EncoderStudentArguments(student_layers=2), training)

    readers = [
        (names[0], lambda name: ModelSpec(name, "teacher").language_model()),
        (names[0], lambda name: load_tokenizer(name, "student")),
        (names[1], lambda name: load_encoder(name, load_encoder_config(name))),
        (names[1], tkd),
        (names[1], lambda name: onnx_export._load(name, load_config(name, "model"), False)),
    ]
    for name, read in readers:
        if case in ("configuration", "all"):
            # Its tokenizer alone may be one that tokenizers knows.
            with suppress(ModelError) if read is readers[1][1] else pytest.raises(ModelError, match="code of its own"):
                read(name)
        else:
            read(name)


def test_pickled_models_are_named_before_anything_loads(tmp_path, marker):
    folder = Path(save_pretrained(tmp_path / "model", tiny_t5()))
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"which can run code when they load.*--allow-bin.*allow_bin: true"):
        ModelSpec(str(folder), "teacher").check()


def test_every_call_says_that_code_is_not_trusted():
    """`from_pretrained` and `load_dataset` of other libraries, wherever rlkd calls them."""
    calls = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                if node.func.attr in ("from_pretrained", "load_dataset"):
                    calls.append((path.relative_to(PACKAGE).as_posix(), called, ast.unparse(node)))
    # These read JSON and weights of PEFT or generation settings, and take no such argument.
    harmless = ("PeftConfig.", "PeftModel.", "GenerationConfig.")
    places = {place for place, called, text in calls if not called.startswith(harmless)}
    assert places == {"models/loading.py", "models/vocabulary.py", "data/hub.py"}
    for place, called, text in calls:
        source = (PACKAGE / place).read_text()
        if not called.startswith(harmless):
            assert "trust_remote_code=False" in text or '"trust_remote_code": False' in source, text
