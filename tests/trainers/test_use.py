"""What the card says of using a saved student is true: the snippet runs, and gives the answers that were evaluated."""

import re
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from test_tkd import make as make_tkd
from test_tkd import rows as labelled_rows
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from rlkd.models.adapters import add_adapter
from rlkd.models.encoders.bilstm import BiLSTMConfig, BiLSTMForSequenceClassification
from rlkd.models.spec import ModelSpec
from tiny import CLASSIFIER_WORDS, save_pretrained, tiny_bart, tiny_tokenizer
from tiny_runs import PADDED, VALID, WORDS, examples, make, student

NEW = 7


def trained(folder, model, **options):
    trainer = make(
        "supervised", folder, model=model, max_steps=2, max_new_tokens=NEW, eval_examples=examples(8), **options
    )
    trainer.run()
    return trainer


def evaluated(trainer):
    """The greedy answers of rlkd's own evaluation, by input."""
    return {e.student_input: row["student"] for e, row in zip(examples(8), trainer.evaluate_policy(8), strict=True)}


def snippet(folder):
    (code,) = re.findall(r"## Use\n\n```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code.replace("path/to/this/folder", str(folder))


def loud_padding(model):
    """The rows beyond the tokenizer, which training never touches, would win every argmax."""
    with torch.no_grad():
        model.get_input_embeddings().weight[VALID:] = 30.0 * model.get_input_embeddings().weight[VALID - 1]
        model.get_output_embeddings().weight[VALID:] = model.get_input_embeddings().weight[VALID:]
    return model


def with_defaults_of_its_own(model):
    """As bart-large-cnn has them: how to search, and a length of its own."""
    model.generation_config.update(
        num_beams=4, max_length=4, early_stopping=True, length_penalty=2.0, do_sample=True, temperature=0.3
    )
    return model


def with_rules(model):
    """Tokens forced, forbidden and repeated, as checkpoints of summarisers and translators have them."""
    model.generation_config.update(forced_bos_token_id=3, no_repeat_ngram_size=2, suppress_tokens=[6], min_new_tokens=4)
    return model


MODELS = {
    "t5": student,
    "untied": lambda: student(tied=False),
    "bart": lambda: tiny_bart(vocab=PADDED),
    "padded": lambda: loud_padding(student(tied=False)),
    "defaults": lambda: with_defaults_of_its_own(tiny_bart(vocab=PADDED)),
    "rules": lambda: with_rules(student()),
}


@pytest.mark.parametrize("kind", MODELS)
def test_plain_generate_gives_the_evaluated_answers(tmp_path, kind):
    trainer = trained(tmp_path, MODELS[kind]())
    expected = evaluated(trainer)
    assert len(set(expected.values())) > 1 or kind in ("padded", "bart", "defaults")
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert model.generation_config.max_new_tokens == NEW
    for text, answer in expected.items():
        ids = model.generate(input_ids=tokenizer([text], return_tensors="pt").input_ids)
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == answer
    # The next stage reads its own suppressed ids, which are no tokens, as what they are.
    banned = ModelSpec(str(tmp_path), "student").rules.banned
    assert banned == ((6,) if kind == "rules" else ())
    # The model in memory keeps its own defaults.
    assert trainer.policy.student.generation_config.max_new_tokens is None


def run_in_process(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["t5", "adapter"])
def test_the_snippet_of_a_generating_student(tmp_path, capsys, kind):
    model = student()
    if kind == "adapter":
        base = save_pretrained(tmp_path / "base", student(), tiny_tokenizer(WORDS))
        model = ModelSpec(base, "student").load()
        model = add_adapter(model, LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM"))
    folder = tmp_path / "run"
    trainer = trained(folder, model)
    code = snippet(folder)
    text, answer = max(evaluated(trainer).items(), key=lambda pair: len(pair[1]))
    assert ("AutoPeftModelForSeq2SeqLM" in code) == (kind == "adapter")
    assert run_in_process(code.replace("A text.", text), capsys) == str([answer])
    assert GenerationConfig.from_pretrained(folder).max_new_tokens == NEW


@pytest.mark.parametrize("kind", ["bert", "bilstm"])
def test_the_snippet_of_a_classifier(tmp_path, capsys, kind):
    options = {}
    if kind == "bilstm":
        config = BiLSTMConfig(vocab_size=len(CLASSIFIER_WORDS), embedding_size=8, hidden_size=4, classifier_size=4)
        options["model"] = BiLSTMForSequenceClassification(config)
    trainer = make_tkd(tmp_path, preset="kd", dev=labelled_rows(4), **options)
    trainer.save_model()
    code = snippet(tmp_path)
    assert ("trust_remote_code" in code) == (kind == "bilstm")
    assert "'label': 'LABEL_" in run_in_process(code.replace("A text.", "a b c"), capsys)


@pytest.mark.slow
def test_the_snippet_needs_no_rlkd(tmp_path):
    trained(tmp_path, student())
    code = "import sys\nsys.modules['rlkd'] = None\n" + snippet(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:1]) == (0, "["), done.stderr
