"""A run whose teacher has another vocabulary than its student: chosen by itself, said, recorded, resumed."""

import json
import re

import pytest
import torch
from models.test_language_model import tiny_llama
from models.test_other_tokenizer import byte_level, words
from typer.testing import CliRunner

from rlkd import (
    DataArguments,
    GKDArguments,
    PPOArguments,
    PPOTrainer,
    ReinforceArguments,
    ReinforceTrainer,
    SupervisedArguments,
    SupervisedTrainer,
    TeacherArguments,
    prepare,
)
from rlkd.cli.main import app
from rlkd.errors import ConfigError
from rlkd.inspection.saved import from_run
from rlkd.models.other_tokenizer import OtherTokenizer
from rlkd.models.vocabulary import decode_texts, encode_answers
from rlkd.settings.trl_compat import ModelConfig
from rlkd.tensors import pad_rows
from tiny import save_pretrained, tiny_bart, tiny_t5

SAMPLED = {"one_step": "sampled", "rollouts_per_prompt": 2, "per_device_train_batch_size": 8}
RL = {"reinforce": (ReinforceArguments, ReinforceTrainer), "ppo": (PPOArguments, PPOTrainer)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("pair")
    save_pretrained(made / "teacher", tiny_t5(tied=False, seed=3, vocab=275), byte_level())
    save_pretrained(made / "student", tiny_bart(seed=4, vocab=8), words())
    rows = [{"text": " ".join(["hello", "there", "x"][: 1 + i % 3] * (1 + i % 2))} for i in range(12)]
    (made / "rows.jsonl").write_text("".join(json.dumps({**row, "n": i}) + "\n" for i, row in enumerate(rows)))
    return made


def parts(folder, kind, out, **options):
    settings = {
        "max_new_tokens": 6,
        "max_input_tokens": 60,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "report_to": [],
    }
    training = kind(str(out), **{**settings, **options})
    data = DataArguments(str(folder / "rows.jsonl"), "text", eval_dataset=str(folder / "rows.jsonl"))
    teacher = TeacherArguments(str(folder / "teacher"), teacher_dtype="float32")
    return data, teacher, ModelConfig(model_name_or_path=str(folder / "student")), training


def run(folder, name, out, **options):
    arguments, trainer = RL[name]
    options = {**SAMPLED, "max_steps": 8, "save_steps": 4, "eval_strategy": "steps", "eval_steps": 8, **options}
    setup = prepare(*parts(folder, arguments, out, **options))
    assert isinstance(setup.teacher, OtherTokenizer)
    made = trainer(
        setup.student, parts(folder, arguments, out, **options)[3], train_examples=setup.train_examples,
        **setup.trainer_inputs(),
    )  # fmt: skip
    made.run(setup.settings)
    return made


def logged(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["reinforce", pytest.param("ppo", marks=pytest.mark.slow)])
def test_it_trains_evaluates_is_recorded_and_resumes_exactly(folder, tmp_path, capsys, name):
    straight = run(folder, name, tmp_path / "straight")
    said = capsys.readouterr().out
    assert re.search(r"different vocabularies \(2\d\d and 6 tokens\): answers are scored as text", said)
    names = {key for line in logged(tmp_path / "straight") for key in line}
    assert {"start_regret", "start_eos_price", "regret", "eval_regret", "eval_match", "eval_sample_regret"} <= names
    record = json.loads((tmp_path / "straight" / "run.json").read_text())
    assert record["inputs"]["tokenizer"] != record["inputs"]["teacher's tokenizer"]
    assert record["inputs"]["teacher's vocabulary"] == "another: answers are scored as text"
    view = from_run(tmp_path / "straight")
    assert {sample.source for sample in view.samples} >= {"student", "student sampled", "teacher greedy", "rollout"}

    again = run(folder, name, tmp_path / "again", resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    for key, tensor in straight.policy.state_dict().items():
        assert torch.equal(tensor, again.policy.state_dict()[key]), key


@pytest.mark.parametrize(
    ("kind", "options", "wanted"),
    [
        (ReinforceArguments, {}, "one_step = 'exact' needs the teacher's distribution"),
        (ReinforceArguments, {**SAMPLED, "baseline": "closed_form"}, "needs the teacher's distribution"),
        (ReinforceArguments, {**SAMPLED, "baseline": "none"}, "needs the teacher's state_value"),
        (GKDArguments, {}, "needs the teacher's distribution"),
        (SupervisedArguments, {"objective": "reverse_kl"}, "'reverse_kl' needs the teacher's distribution"),
        (SupervisedArguments, {"hidden_coef": 1.0}, "hidden_coef = 1.0: needs a vocabulary that teacher"),
        (ReinforceArguments, {**SAMPLED, "teacher_mix": 0.2}, "teacher_mix = 0.2: needs a vocabulary that teacher"),
    ],
)
def test_what_needs_a_shared_vocabulary_is_refused_before_weights_load(
    folder, tmp_path, monkeypatch, kind, options, wanted
):
    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("rlkd.models.loading.load_model", refuse)
    data, *others = parts(folder, kind, tmp_path, **options)
    data.pseudo_labels = str(folder) if kind is SupervisedArguments else None
    with pytest.raises(ConfigError, match=wanted) as found:
        prepare(data, *others)
    assert "vocabulary" in str(found.value)


@pytest.mark.slow
def test_regret_falls_under_a_teacher_of_another_vocabulary(folder, tmp_path):
    options = {
        "max_steps": 30,
        "learning_rate": 3e-3,
        "eval_steps": 30,
        "save_strategy": "no",
        "lam": 0.0,
        "kl_coef": 0.0,
    }
    run(folder, "reinforce", tmp_path, eval_on_start=True, rollouts_per_prompt=8, weak_start="ignore",
        **{**options, "per_device_train_batch_size": 32})  # fmt: skip
    regrets = [
        line["eval_sample_regret"] / line["eval_sample_length"] for line in logged(tmp_path) if "eval_regret" in line
    ]
    assert regrets[-1] < 0.8 * regrets[0]


def test_a_student_of_another_vocabulary_is_inspected(folder):
    command = ["inspect-rewards", "--teacher", str(folder / "teacher"), "--student", str(folder / "student"),
               "--dataset", str(folder / "rows.jsonl"), "--input-column", "text", "--limit", "2", "--json",
               "--max-input-tokens", "60",
               "--max-new-tokens", "5", "--reference-column", "text"]  # fmt: skip
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    samples = json.loads(done.stdout)["samples"]
    assert {sample["source"] for sample in samples} == {"student", "teacher greedy", "reference"}
    (reference,) = [s for s in samples if s["source"] == "reference" and s["id"] == "1"]
    assert reference["tokens"] == ["hello", " there", " hello", " there", " </s>"]
    assert all(sample["student_logprobs"] is not None for sample in samples)


@pytest.mark.slow
def test_labels_of_the_teacher_are_learned_as_texts(folder, tmp_path, caplog):
    command = ["generate-pseudolabels", "--teacher", str(folder / "teacher"), "--dataset", str(folder / "rows.jsonl"),
               "--input-column", "text", "--max-new-tokens", "5", "--quiet",
               "--out", str(tmp_path / "labels")]  # fmt: skip
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    data, *others = parts(folder, SupervisedArguments, tmp_path / "run", max_steps=2)
    data.pseudo_labels = str(tmp_path / "labels")
    setup = prepare(data, *others)
    trainer = SupervisedTrainer(
        setup.student, others[-1], train_dataset=setup.pseudo_labels, **setup.trainer_inputs()
    )  # fmt: skip
    trainer.run(setup.settings)
    assert "their texts are tokenised anew with the student's tokenizer" in caplog.text
    assert "eval_regret" in {key for line in logged(tmp_path / "run") for key in line}


@pytest.mark.parametrize("decoder_only", ["teacher", "student"])
def test_an_encoder_decoder_and_a_decoder_only_model(folder, tmp_path, decoder_only):
    """Either way round: the student's regret is that of its text in the teacher's own tokens."""
    save_pretrained(tmp_path / "llama-words", tiny_llama(5, words=6), words())
    save_pretrained(tmp_path / "llama-bytes", tiny_llama(6, words=270), byte_level())
    names = {"teacher": folder / "teacher", "student": folder / "student"}
    names[decoder_only] = tmp_path / {"teacher": "llama-bytes", "student": "llama-words"}[decoder_only]
    data, _, _, training = parts(folder, ReinforceArguments, tmp_path / "run", max_steps=2, **SAMPLED)
    teacher = TeacherArguments(str(names["teacher"]), teacher_dtype="float32")
    setup = prepare(data, teacher, ModelConfig(model_name_or_path=str(names["student"])), training)
    trainer = ReinforceTrainer(
        setup.student, training, train_examples=setup.train_examples, **setup.trainer_inputs()
    )  # fmt: skip
    batch = trainer.annotate(trainer.sample(0))
    own, answers = setup.teacher.teacher, batch.answers
    ids = [row[mask].tolist() for row, mask in zip(answers.answer_ids, answers.answer_mask, strict=True)]
    texts = decode_texts(setup.tokenizer, ids)
    shown = [i for i, row in enumerate(ids) if 2 not in row and 0 not in row and texts[i]]  # no special tokens
    assert shown
    encoded = encode_answers(own.tokenizer, [texts[i] for i in shown], 200, own.rules)
    encoded = [row if answers.finished[i] else row[:-1] for i, row in zip(shown, encoded, strict=True)]
    signal = own.score([answers.examples[i].teacher_inputs for i in shown], *pad_rows(encoded, 0))
    want = (signal.chosen - signal.max).sum(1)
    torch.testing.assert_close(batch.annotations.rewards.sum(1)[shown], want, atol=1e-4, rtol=1e-4)
    trainer.train()
    assert trainer.state.global_step == 2


def test_characters_that_only_the_teacher_does_not_know_are_counted(folder, tmp_path, caplog):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"hello {i} there"}) + "\n" for i in range(9)))
    data, _, _, training = parts(folder, ReinforceArguments, tmp_path / "run", **SAMPLED)
    data.dataset = data.eval_dataset = str(tmp_path / "rows.jsonl")
    save_pretrained(tmp_path / "bytes", tiny_t5(vocab=275), byte_level())
    save_pretrained(tmp_path / "words", tiny_t5(vocab=8), words())
    teacher = TeacherArguments(str(tmp_path / "words"), teacher_dtype="float32")
    prepare(data, teacher, ModelConfig(model_name_or_path=str(tmp_path / "bytes")), training)
    assert "characters that the tokenizer does not know, by column: text 9" in caplog.text
