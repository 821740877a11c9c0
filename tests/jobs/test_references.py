"""`rlkd train teacher`: what is learned and held out, against the rows; the weights, against plain PyTorch; the model
as a teacher of the other commands.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from models.chat_templates import chat_model, chat_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.optimization import Adafactor

from rlkd import TRAINING_JOBS, DataError, Examples, load_pseudolabels, load_templates, parse_config
from rlkd.cli.main import main
from rlkd.data.rows import load_rows
from rlkd.data.splits import held_out_inputs
from rlkd.jobs.references import ReferenceArguments, ReferenceTrainingArguments, load_references
from rlkd.models.chat import chat_of
from rlkd.trainers.supervised import ReferenceTrainer
from tiny import save_pretrained, tiny_t5, tiny_tokenizer

TEMPLATES = """\
templates:
  x: !Template
    id: x
    name: copied
    jinja: 'copy {{ note }} ||| {{ note }}'
    metadata: !TemplateMetadata {}
  y: !Template
    id: y
    name: starts with a
    jinja: '{% if note[0] == "a" %}answer of {{ note }} ||| {{ gold }}{% endif %}'
    metadata: !TemplateMetadata {}
"""
NOTES = [f"{a} {b} {c}" for a in "abc" for b in "def" for c in "gh"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_pretrained(tmp_path / "t5", tiny_t5(tied=False, width=16))
    rows = [{"note": note, "gold": note[0], "answers": [note[0], note[2:]]} for note in NOTES]
    for name in ("rows", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.yaml").write_text(TEMPLATES)
    return tmp_path


def run(capsys, *words):
    code = 0
    try:
        main(list(words))
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


BASIC = {
    "model_name_or_path": "t5", "dataset": "rows.jsonl", "input_column": "note", "output_dir": "out",
    "max_input_tokens": 16, "max_new_tokens": 5, "use_cpu": "true", "report_to": "none", "logging_steps": 1,
    "per_device_train_batch_size": 4, "disable_tqdm": "true",
}  # fmt: skip


def train(capsys, **settings):
    words = [word for name, value in (BASIC | settings).items() for word in (f"--{name}", str(value))]
    return run(capsys, "train", "teacher", *words)


def data(**settings) -> ReferenceArguments:
    return ReferenceArguments(dataset="rows.jsonl", input_column="note", **settings)


def test_every_template_and_its_targets_and_the_split_of_the_other_jobs(folder, caplog):
    pairs, held_out, note = load_references(data(templates=["t.yaml"], eval_fraction=0.25), tiny_tokenizer())
    examples = Examples(load_rows("rows.jsonl"), load_templates("t.yaml:copied"), student_column="note")
    out = {text for (text,) in held_out_inputs(examples.inputs(), 0.25, "rows")}
    wanted = [(f"copy {n}", n) for n in NOTES] + [(f"answer of {n}", "a") for n in NOTES if n[0] == "a"]
    assert sorted((p["student_input"], p["label"]) for p in pairs) == sorted(p for p in wanted if p[0][-5:] not in out)
    assert sorted((e.student_input, *e.references) for e in held_out) == sorted(p for p in wanted if p[0][-5:] in out)
    assert len(out) == 4
    assert "held out: " in note
    assert "left out 12 of 36 prompts (template does not apply: 12)" in caplog.text


def test_every_reference_of_a_column_is_learned(folder):
    pairs, held_out, _ = load_references(data(reference_column="answers"), tiny_tokenizer())
    assert len(pairs) == 2 * (len(NOTES) - len(held_out))
    assert {(p["student_input"], p["label"]) for p in pairs} | {
        (e.student_input, text) for e in held_out for text in e.references
    } == {(note, text) for note in NOTES for text in (note[0], note[2:])}
    assert all(e.references == (e.student_input[0], e.student_input[2:]) for e in held_out)


def test_answers_that_cannot_be_learned_are_counted_or_left_out(folder, caplog):
    rows = [
        {"note": "a b", "gold": "c z"},
        {"note": "b", "gold": "c"},
        {"note": "c", "gold": ""},
        {"note": "d", "gold": "d"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, held_out, _ = load_references(data(reference_column="gold"), tiny_tokenizer())
    assert len(pairs) + len(held_out) == 3
    assert "1 answers have characters that the tokenizer does not know" in caplog.text
    assert "left out 1 of 4 prompts (no reference: 1)" in caplog.text
    pairs, held_out, _ = load_references(data(reference_column="gold", skip_unknown=True), tiny_tokenizer())
    assert len(pairs) + len(held_out) == 2
    assert "1 answers have characters that the tokenizer does not know: they are left out" in caplog.text


def test_weights_are_those_of_plain_training(folder, capsys):
    """One step of T5's Adafactor on the mean cross-entropy of all answer tokens."""
    code, out, err = train(
        capsys, reference_column="gold", eval_dataset="dev.jsonl", max_steps=1, learning_rate=0.02, max_new_tokens=2,
        lr_scheduler_type="constant", optim="adafactor", optim_args="scale_parameter=True", max_grad_norm=0,
        per_device_train_batch_size=9, gradient_accumulation_steps=2,
    )  # fmt: skip
    assert code == 0, err
    assert "to learn: 18 answers; held out: 18 prompts of dev.jsonl" in out
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained("t5"), tiny_tokenizer()
    optimizer = Adafactor(model.parameters(), lr=0.02, scale_parameter=True, relative_step=False)
    asked, told = (tokenizer(texts, return_tensors="pt", padding=True) for texts in (NOTES, [n[0] for n in NOTES]))
    logits = model(**asked, labels=told["input_ids"]).logits[..., : len(tokenizer)]
    logits.log_softmax(-1).gather(-1, told["input_ids"][..., None]).mean().neg().backward()
    optimizer.step()
    trained = AutoModelForSeq2SeqLM.from_pretrained("out")
    for (name, one), (_, other) in zip(model.named_parameters(), trained.named_parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), name
    card = (folder / "out/README.md").read_text()
    assert "supervised training on the references of its training data" in card
    assert "answers that it learned: column gold" in card
    assert "| train | rows.jsonl | 18 |" in card
    assert "teacher" not in card.split("## Command")[0].replace("trained without a teacher", "")


def test_a_chat_model_learns_in_its_chat_template(folder, capsys, monkeypatch):
    made = {}

    class Trainer:
        def __init__(self, model, args, **inputs):
            made.update(inputs)

        def run(self, settings):
            pass

    save_pretrained(folder / "chat", chat_model(), chat_tokenizer())
    monkeypatch.setattr("rlkd.jobs.references.ReferenceTrainer", Trainer)
    settings = {"model_name_or_path": "chat", "reference_column": "gold", "max_input_tokens": 128, "max_new_tokens": 8}
    for asked in ("true", "false"):
        code, _, err = train(capsys, **settings, student_chat=asked)
        assert code == 0, err
        assert (chat_of(made["tokenizer"]) is not None) == (asked == "true")


def signalled(stop):
    """A `training_step` in which the process gets SIGTERM, after `stop` updates; None: never."""
    compute = ReferenceTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == stop:
            signal.raise_signal(signal.SIGTERM)
        return compute(self, *args, **kwargs)

    return step


@pytest.mark.slow
def test_killed_by_signals_and_continued_it_has_the_same_weights_and_then_labels(folder, capsys, monkeypatch):
    """Random weights, decoder-only too: two epochs at once or stopped twice; the labels are the model's own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    save_pretrained(folder / "llama", LlamaForCausalLM(config))
    for name, kind in (("t5", AutoModelForSeq2SeqLM), ("llama", AutoModelForCausalLM)):
        (folder / name / "model.safetensors").unlink()
        settings = {
            "model_name_or_path": name, "templates": "t.yaml:copied", "random_weights": "true", "save_steps": 100,
            "learning_rate": 0.03, "num_train_epochs": 2, "lr_scheduler_type": "constant", "eval_strategy": "epoch",
            "resume_from_checkpoint": "auto", "optim": "adafactor", "optim_args": "scale_parameter=True",
        }  # fmt: skip
        for out, stops in (("whole", (None,)), ("cut", (2, 5, None))):  # of the cut run, the steps that a signal ends
            for stop in stops:
                with monkeypatch.context() as patch:
                    patch.setattr(ReferenceTrainer, "training_step", signalled(stop))
                    code, _, err = train(capsys, **settings, output_dir=f"{name}-{out}", max_steps=8)
                assert (code, "stopped by SIGTERM" in err) == ((0, False) if stop is None else (143, True)), err
        one, other = (kind.from_pretrained(f"{name}-{out}").state_dict() for out in ("whole", "cut"))
        assert all(torch.equal(one[key], other[key]) for key in one)
        words = ("--dataset", "rows.jsonl", "--input-column", "note", "--templates", "t.yaml:copied")
        words += (
            "--strategy",
            "sample",
            "--max-new-tokens",
            "5",
            "--max-input-tokens",
            "16",
            "--quiet",
            "--out",
            f"{name}-labels",
        )
        code, _, err = run(capsys, "generate-pseudolabels", "--teacher", f"{name}-whole", *words)
        assert code in (0, 4), err
        assert len(load_pseudolabels(f"{name}-labels", statuses=None)) == len(NOTES)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "reference_column and templates are both unset"),
        ({"reference_column": "golt"}, "Did you mean 'gold'"),
        ({"templates": "u.yaml"}, "none of 18 prompts has an answer to learn (no target: 18)"),
        ({"templates": "w.yaml"}, "none of 18 prompts has an answer to learn (template does not apply: 18)"),
        ({"templates": "v.yaml"}, "missing in template 'v' of v.yaml: 'missing'.\n  found    note, gold"),
        ({"reference_column": "gold", "pseudo_labels": "rows.jsonl"}, "--pseudo_labels"),
        ({"reference_column": "gold", "objective": "reverse_kl"}, "--objective"),
        ({"reference_column": "gold", "metric_for_best_model": "regret"}, "takes a teacher, and there is none"),
        (
            {"reference_column": "gold", "save_strategy": "best", "eval_strategy": "epoch"},
            "takes a teacher, and there is",
        ),
        ({"reference_column": "gold", "task_metric": "exact"}, "'exact' is unknown"),
        ({"reference_column": "gold", "random_weights": "true", "use_peft": "true"}, "use_peft = True: the weights"),
        ({"reference_column": "gold", "random_weights": "true", "allow_bin": "true"}, "random_weights reads no"),
        ({"reference_column": "gold", "model_name_or_path": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_named_before_weights_load(folder, capsys, monkeypatch, settings, said):
    def weights(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("rlkd.models.loading.load_model", weights)
    monkeypatch.setattr("rlkd.models.loading.random_model", weights)
    for name, jinja in (
        ("u", "copy {{ note }}"), ("v", "copy {{ note }} ||| {{ missing }}"), ("w", "{% if false %}x{% endif %} ||| a"),
    ):  # fmt: skip
        text = TEMPLATES.split("  y:")[0].replace("copy {{ note }} ||| {{ note }}", jinja).replace("copied", name)
        (folder / f"{name}.yaml").write_text(text.replace("'{%", '"{%').replace("||| a'", '||| a"'))
    code, _, err = train(capsys, **settings)
    assert code in (2, 3)
    assert said in err


@pytest.mark.parametrize("size", ["", ".tiny"])
def test_the_recipe_is_valid(size):
    path = Path(__file__).parents[2] / f"recipes/teacher_t5{size}.yaml"
    parsed = parse_config(TRAINING_JOBS["teacher"].settings, ["--config", str(path), "--bf16", "false"])
    values = {name: value for part in parsed for name, value in vars(part).items()}
    for name, value in yaml.safe_load(path.read_text()).items():
        if name not in ("bf16", "report_to"):
            assert values[name] == value, name


def test_settings_of_distillation_are_none(tmp_path):
    with pytest.raises(TypeError, match="until_ready"):
        ReferenceTrainingArguments(output_dir=str(tmp_path), until_ready=True)


def test_a_template_that_fails_on_a_row(folder, caplog):
    text = TEMPLATES.split("  y:")[0].replace("copy {{ note }} ||| {{ note }}", "{{ 1 // (note|length - 5) }} ||| a")
    (folder / "f.yaml").write_text(text)
    rows = [{"note": note} for note in ("a b c", "a b", "c", "d e d e")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="ZeroDivisionError"):
        load_references(data(templates=["f.yaml"]), tiny_tokenizer())
    pairs, held_out, _ = load_references(data(templates=["f.yaml"], on_bad_row="skip"), tiny_tokenizer())
    assert len(pairs) + len(held_out) == 3
