"""Whatever a run is made from, it is resumed with the same, to the last weight; other versions are named."""

import logging
from dataclasses import replace

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_tkd import make as make_tkd
from tokenizers.normalizers import Lowercase

from rlkd.data.examples import Examples
from rlkd.errors import ConfigError
from rlkd.models.digests import configuration_digest, tokenizer_digest, weights_digest
from rlkd.runs.record import RUN_FILE, RunRecord
from rlkd.templates.template import Template
from rlkd.trainers.inputs import describe_inputs
from tiny import KINDS, classifier_tokenizer, tiny_classifier, tiny_model, tiny_tokenizer
from tiny_runs import WORDS, make, student, tiny_teacher

COPY = Template("copy", "copy : {{note}} ||| {{note}}", id="1")


def rows(texts=("a b", "b", "c a", "a", "c c b"), template=COPY, **options):
    table = datasets.Dataset.from_dict({"note": list(texts), "answer": list(texts)})
    return Examples(table, [template], student_column="note", **options)


def adapted(seed=3):
    torch.manual_seed(seed)
    return get_peft_model(student(), LoraConfig(target_modules=["q"], r=2, init_lora_weights=False))


def build(folder, *, model=None, teacher=None, train=None, held_out=None, tokenizer=None, **options):
    trainer = make(
        "reinforce", folder, model=model or adapted(), teacher=teacher, data=train or rows(), max_steps=1,
        eval_examples=held_out or rows(reference_column="answer"), save_strategy="steps", save_steps=1,
        per_device_train_batch_size=4, **options,
    )  # fmt: skip
    if tokenizer is not None:
        trainer.tokenizer = tokenizer
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    build(folder).train()
    return folder


def changed_weight(model, name=None, by=1e-6, index=1):
    """One value of one weight, which is not among the few that a sample would look at."""
    weight = dict(model.named_parameters())[name] if name else max(model.parameters(), key=torch.Tensor.numel)
    with torch.no_grad():
        weight.view(-1)[index] += by
    return model


def changed_teacher(change):
    teacher = tiny_teacher()
    change(teacher)
    return teacher


def one_and_a_half(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1.5
    return model


def lora_weight(model):
    return changed_weight(model, next(name for name, _ in model.named_parameters() if "lora_B" in name))


def with_generation(model, **values):
    model.generation_config.update(**values)
    return model


def rescaled(model):
    model.peft_config["default"].lora_alpha = 64
    return model


def lower_cased(tokenizer):
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    return tokenizer


OTHER_WORDS = [*WORDS[:-2], ":", "copy"]
CHANGES = {
    "one weight of the student": (lambda: {"model": changed_weight(adapted())}, ["initial student's weights"]),
    "the student times 1.5": (lambda: {"model": one_and_a_half(adapted())}, ["initial student's weights"]),
    "one weight of the adapter": (lambda: {"model": lora_weight(adapted())}, ["initial student's weights"]),
    "the adapter's scale": (lambda: {"model": rescaled(adapted())}, ["initial student's configuration"]),
    "generation of the student": (
        lambda: {"model": with_generation(adapted(), forced_bos_token_id=4)}, ["initial student's configuration"]
    ),
    "one weight of the teacher": (
        lambda: {"teacher": changed_teacher(lambda t: changed_weight(t.model))}, ["teacher's weights"]
    ),
    "the teacher's precision": (
        lambda: {"teacher": changed_teacher(lambda t: t.model.bfloat16())},
        ["teacher's weights"],
    ),
    "the teacher's start token": (
        lambda: {"teacher": changed_teacher(lambda t: setattr(t.model.config, "decoder_start_token_id", 1))},
        ["teacher's configuration"],
    ),
    "the end of prompts": (lambda: {"teacher": tiny_teacher(append_eos=False)}, ["teacher's reading"]),
    "the teacher's tokenizer": (
        lambda: {"teacher": changed_teacher(lambda t: setattr(t, "tokenizer", lower_cased(tiny_tokenizer(WORDS))))},
        ["teacher's tokenizer"],
    ),
    "the tokenizer": (lambda: {"tokenizer": tiny_tokenizer(OTHER_WORDS)}, ["tokenizer"]),
    "a row": (lambda: {"train": rows(("a b", "b", "c a", "a", "c c a"))}, ["data.train"]),
    "the order of the rows": (lambda: {"train": rows(("b", "a b", "c a", "a", "c c b"))}, ["data.train"]),
    "the template": (
        lambda: {
            n: rows(template=replace(COPY, source="copy {{note}} ||| {{note}}"), **o)
            for n, o in (("train", {}), ("held_out", {"reference_column": "answer"}))
        },
        ["data.train", "data.eval", "templates"],
    ),
    "a reference": (
        lambda: {"held_out": rows(("b a", "b", "c a", "a", "c c b"), reference_column="answer")}, ["data.eval"]
    ),
    "no references": (lambda: {"held_out": rows()}, ["data.eval"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_input_is_refused_by_name(run, tmp_path, case):
    options, names = CHANGES[case][0](), CHANGES[case][1]
    trainer = build(tmp_path, **options)
    with pytest.raises(ConfigError, match="was written with other settings or inputs") as caught:
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    lines = str(caught.value).splitlines()[1:-1]
    assert [line.strip().split(": ")[0] for line in lines] == names
    assert all(" -> " in line for line in lines)


def test_equal_inputs_are_the_same_run_and_an_allowed_change_is_recorded(run, tmp_path):
    build(tmp_path / "same").train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert RunRecord.read(tmp_path / "same").resumed[0]["changed"] == []
    other = build(tmp_path / "other", model=changed_weight(adapted()), allow_config_change=True)
    other.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    (line,) = RunRecord.read(tmp_path / "other").resumed[0]["changed"]
    assert line.startswith("  initial student's weights: ")


def test_a_trainer_that_goes_on_compares_the_student_it_began_with(tmp_path):
    trainer = build(tmp_path)
    trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert RunRecord.read(tmp_path).resumed[0]["changed"] == []


def test_classifiers_and_their_two_tokenizers_are_compared(tmp_path):
    teacher, other = tiny_classifier(), classifier_tokenizer(["<pad>", "[CLS]", "[SEP]", "<unk>", *"zyxwvutsrqponmlk"])
    options = {"preset": "kd", "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_tkd(tmp_path, teacher=teacher, **options).train()
    again = make_tkd(tmp_path, teacher=changed_weight(tiny_classifier(), "classifier.bias"), other=other, **options)
    with pytest.raises(ConfigError) as caught:
        again.train(resume_from_checkpoint="auto")
    names = [line.strip().split(": ")[0] for line in str(caught.value).splitlines()[1:-1]]
    assert {"teacher's weights", "teacher's tokenizer"} <= {*names}


@pytest.mark.parametrize("kind", KINDS)
def test_digests_of_models_know_every_weight_and_nothing_else(tmp_path, kind):
    model = tiny_model(kind)
    before = weights_digest(model), configuration_digest(model)
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path)
    assert weights_digest(tiny_model(kind)) == before[0] == weights_digest(read)
    assert configuration_digest(tiny_model(kind)) == before[1]
    digests = {before[0]}
    for name, weight in model.named_parameters():
        for index in (0, weight.numel() // 3, weight.numel() - 1):
            digests.add(weights_digest(changed_weight(model, name, by=0.5, index=index)))
    assert len(digests) == 1 + 3 * len(list(model.named_parameters()))


def test_a_tokenizers_digest_is_that_of_its_content(tmp_path):
    one = tiny_tokenizer()
    one.save_pretrained(tmp_path)
    read = type(one).from_pretrained(tmp_path)
    read("a b c", truncation=True, max_length=2)
    assert tokenizer_digest(read) == tokenizer_digest(one)
    added, chat = tiny_tokenizer(), tiny_tokenizer()
    added.add_tokens(["new"])
    chat.chat_template = "{{ messages }}"
    assert len({tokenizer_digest(t) for t in (one, added, chat, tiny_tokenizer(WORDS))}) == 4


# Versions


def record(**changes):
    values = {"trainer": "T", "settings": {}, "data": {}, "templates": [], "models": {}, "revisions": {}}
    return RunRecord(**values | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"versions": {"torch": "1.0", "trl": None, "python": "3"}}, ["torch 1.0 -> ", "trl None -> ", "python 3 -> "]),
        ({"rlkd": "0.0.1"}, ["rlkd 0.0.1 -> "]),
        ({"code": "abc"}, ["rlkd's code abc -> "]),
        ({"git": {"commit": "a" * 40, "dirty": False}}, ["git commit aaaa"]),
    ],
)  # fmt: skip
def test_other_versions_are_named_and_recorded(tmp_path, caplog, changes, said):
    now = {"git": {"commit": "b" * 40, "dirty": True}}
    record(**now | changes).write(tmp_path)
    resumed = record(**now)
    with caplog.at_level(logging.WARNING, logger="rlkd"):
        resumed.resume(tmp_path, [], allow_change=False)
    assert all(part in caplog.text for part in said)
    assert len(resumed.resumed[0]["versions"]) == len(said)


def test_inputs_that_an_older_record_lacks_are_named(tmp_path, caplog):
    record().write(tmp_path)
    with caplog.at_level(logging.WARNING, logger="rlkd"):
        record(inputs={"tokenizer": "abc"}).resume(tmp_path, [], allow_change=False)
    assert f"{RUN_FILE} does not record tokenizer: not compared" in caplog.text


def test_a_teacher_that_comes_or_goes_is_another_run(tmp_path):
    record(models={"student": "s"}).write(tmp_path)
    with pytest.raises(ConfigError, match="models: student -> student, teacher"):
        record(models={"student": "s", "teacher": "t"}).resume(tmp_path, [], allow_change=False)


def test_trainers_without_a_teacher_have_inputs_too(tmp_path):
    trainer = make_tkd(tmp_path, preset="ft", teacher=None, model=tiny_classifier(layers=2))
    assert set(describe_inputs(trainer)) == {
        "initial student's weights", "initial student's configuration", "tokenizer", "teacher's tokenizer",
    }  # fmt: skip
