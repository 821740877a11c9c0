"""Training from what a label folder recorded of the teacher's probabilities: the teacher is not there."""

import json
import logging
import math
from collections import defaultdict

import datasets
import pytest
import torch
from test_supervised import full_logits, hand_divergence

from rlkd import (
    DataArguments,
    Decoding,
    GKDArguments,
    PPOArguments,
    SupervisedArguments,
    SupervisedTrainer,
    TeacherArguments,
    generate_pseudolabels,
    load_pseudolabels,
    prepare,
)
from rlkd.errors import ConfigError, DataError
from rlkd.labels.recorded import RecordedTeacher, probability_weights
from rlkd.models import loading
from rlkd.settings.paths import refuse_missing_paths
from rlkd.settings.trl_compat import ModelConfig
from tiny import save_pretrained, tiny_tokenizer
from tiny_runs import VALID, WORDS, assert_same, examples, logged, make, student, tiny_teacher, weights

TEMPLATES = """dataset: mine
templates:
  1: !Template
    answer_choices: null
    id: '1'
    jinja: "copy : {{text}} ||| {{text}}"
    metadata: {choices_in_prompt: false, languages: [en], metrics: [Other], original_task: true}
    name: copy
    reference: ''
"""

READY = {"until_ready": True, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
         "save_steps": 1, "lr_scheduler_type": "reduce_lr_on_plateau"}  # fmt: skip


def write_labels(out, k, strategy="sample", n=8, teacher=None, **options):
    decoding = Decoding(strategy, 5, top_k_logprobs=k, **options)
    generate_pseudolabels(teacher or tiny_teacher(), examples(n), out=out, template_names=["copy"], decoding=decoding)
    return load_pseudolabels(out)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """K -> labels with that many tokens recorded."""
    base = tmp_path_factory.mktemp("labels")
    return {k: write_labels(base / str(k), k, labels_per_input=2) for k in (1, 3, VALID)}


def recorded(folder, rows, **options):
    return make("supervised", folder, data=rows, teacher=RecordedTeacher(rows, tiny_tokenizer(WORDS)), **options)


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jensen_shannon", "skew_reverse_kl"])
def test_with_all_tokens_recorded_it_is_the_run_with_the_teacher(tmp_path, folders, objective):
    options = {"objective": objective, "max_steps": 3}
    offline = recorded(tmp_path / "offline", folders[VALID], **options)
    online = make("supervised", tmp_path / "online", data=folders[VALID], **options)
    for trainer in (offline, online):
        trainer.train()
    losses = [[line["loss"] for line in logged(tmp_path / name) if "loss" in line] for name in ("offline", "online")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert_same(weights(offline.policy), weights(online.policy), tolerance=1e-4)


@pytest.mark.parametrize("objective", ["forward_kl", "jensen_shannon"])
def test_three_tokens_and_the_rest_against_full_logits(tmp_path, folders, objective):
    rows = folders[3]
    trainer = recorded(tmp_path, rows, objective=objective, max_new_tokens=4)  # labels of 5 are cut
    batch = trainer.data_collator([rows[i] for i in range(len(rows))])
    loss = trainer.compute_loss(trainer.policy, batch)
    teacher, losses = tiny_teacher().lm.model, []
    for row in rows:
        answer = row["token_ids"][:4]
        answer = answer[:-1] if row["finish_reason"] == "length" and answer[-1] == 1 else answer
        pi, p = (
            full_logits(model, row[text], answer).detach().softmax(-1).double()
            for model, text in ((trainer.policy.student, "student_input"), (teacher, "teacher_input"))
        )
        best = p.topk(3).indices
        merged = [torch.cat([x.gather(-1, best), 1 - x.gather(-1, best).sum(-1, keepdim=True)], -1) for x in (pi, p)]
        losses.append(hand_divergence(objective, *(x.log() for x in merged)))
    assert loss.item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run(tmp_path, folders):
    options = {"objective": "forward_kl", "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1,
               "gradient_accumulation_steps": 2}  # fmt: skip
    straight = recorded(tmp_path / "straight", folders[3], **options, max_steps=3)
    straight.train()
    for steps in (1, 2, 3):  # over the end of an epoch of two updates
        resumed = recorded(tmp_path / "resumed", folders[3], **options, max_steps=steps)
        resumed.train(resume_from_checkpoint=steps > 1)
    assert_same(weights(straight.policy), weights(resumed.policy))
    # Labels recorded otherwise are other training data.
    other = recorded(tmp_path / "resumed", folders[VALID], **options, max_steps=4)
    with pytest.raises(ConfigError, match=r"data\.train"):
        other.train(resume_from_checkpoint=True)


def test_what_was_not_recorded_is_refused(tmp_path, folders):
    rows, tokenizer = folders[3], tiny_tokenizer(WORDS)
    with pytest.raises(ConfigError, match=r"objective = 'alpha_beta' needs the probability of every token.*forward_kl"):
        recorded(tmp_path, rows, objective="alpha_beta")
    with pytest.raises(ConfigError, match=r"^temperature = 2: softens .* set it to 1\.$"):
        recorded(tmp_path, rows, objective="forward_kl", temperature=2.0)
    with pytest.raises(ConfigError, match=r"until_ready needs the teacher's chosen, distribution .* it takes"):
        recorded(tmp_path, rows, eval_examples=examples(2), **READY)
    with pytest.raises(ConfigError, match=r"^teacher_signal = 'recorded': .* not for the student's answers"):
        make("gkd", tmp_path, teacher=RecordedTeacher(rows, tokenizer))
    with pytest.raises(DataError, match=r"have no column top_ids, top_logps.*--top-k-logprobs"):
        RecordedTeacher(rows.remove_columns(["top_ids", "top_logps"]), tokenizer)
    mixed = datasets.concatenate_datasets([folders[3], folders[VALID]])
    with pytest.raises(DataError, match=r"not recorded alike: K is \[3, 8\] in one folder"):
        RecordedTeacher(mixed, tokenizer)
    blank = datasets.Dataset.from_list([*rows.to_list(), {**rows[0], "top_ids": None}], features=rows.features)
    with pytest.raises(DataError, match="not recorded alike: 1 of 17 labels have none"):
        RecordedTeacher(blank, tokenizer)
    with pytest.raises(DataError, match=r"16 of 16 labels: their vocabulary .* but 'the student' is to read"):
        RecordedTeacher(rows, tiny_tokenizer([*WORDS[:-1], "other"]))


def test_answers_that_are_no_labels_are_refused(folders):
    teacher = RecordedTeacher(folders[3], tiny_tokenizer(WORDS))
    row = folders[3][0]
    beginning = torch.tensor([row["token_ids"][:1]])
    signal = teacher.score([(row["teacher_input"],)], beginning, beginning > 0)
    assert signal.top_k.ids[0, 0].tolist() == row["top_ids"][0]
    for prompt, answer in ((row["teacher_input"], [6, 6, 6, 6, 6]), ("copy : other", row["token_ids"])):
        ids = torch.tensor([answer])
        with pytest.raises(DataError, match=r"1 of 1 answers are not among the recorded labels.*: mine"):
            teacher.score([(prompt,)], ids, ids >= 0, ids=["mine"])


def test_the_chosen_token_is_known_only_among_the_recorded(folders):
    """Against the local teacher: equal where the label's token is the best, NaN elsewhere."""
    rows = folders[1]
    inputs = [(text,) for text in rows["teacher_input"]]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in rows["token_ids"]], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor(rows["n_out"])[:, None]
    signal = RecordedTeacher(rows, tiny_tokenizer(WORDS)).score(inputs, ids, mask)
    full = tiny_teacher().score(inputs, ids, mask)
    known = torch.tensor([
        [t < len(row["token_ids"]) and row["token_ids"][t] in row["top_ids"][t] for t in range(ids.shape[1])]
        for row in rows
    ])  # fmt: skip
    assert 0 < (known & mask).sum() < mask.sum()
    torch.testing.assert_close(signal.chosen[known], (full.chosen - full.logsumexp)[known], atol=1e-5, rtol=0)
    assert signal.chosen[mask & ~known].isnan().all()
    torch.testing.assert_close(signal.max[mask], (full.max - full.logsumexp)[mask], atol=1e-5, rtol=0)


# From settings


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A recipe's settings with a teacher that does not exist."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "templates.yaml").write_text(TEMPLATES)
    rows = [{"text": e.student_input, "gold": e.student_input} for e in examples(12)]
    for name, part in (("train", rows[:8]), ("held", rows[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    model = save_pretrained(tmp_path / "student", student(), tiny_tokenizer(WORDS))
    loaded, load = [], loading.load_model
    monkeypatch.setattr(
        loading, "load_model", lambda name, *args, **kw: (loaded.append(name), load(name, *args, **kw))[1]
    )

    def prepared(training=None, templates=("mine",), pseudo_labels=None, **options):
        data = DataArguments(
            dataset=str(tmp_path / "train.jsonl"), eval_dataset=str(tmp_path / "held.jsonl"), input_column="text",
            reference_column="gold", task_metric="exact_match", templates=list(templates),
            templates_dir=str(tmp_path), pseudo_labels=pseudo_labels or str(tmp_path / "labels"),
        )  # fmt: skip
        told = TeacherArguments(str(tmp_path / "no such teacher"), teacher_signal="recorded")
        given = {
            "max_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "disable_tqdm": True,
            "max_input_tokens": 32,
        }
        training = training or SupervisedArguments(str(tmp_path / "run"), use_cpu=True, **{**given, **options})
        return prepare(data, told, ModelConfig(model, dtype=None), training), training

    prepared.loaded, prepared.student = loaded, model
    return prepared


def label_by_command(tmp_path, *more):
    from typer.testing import CliRunner

    from rlkd.cli.main import app

    teacher = save_pretrained(tmp_path / "teacher", tiny_teacher().lm.model, tiny_tokenizer(WORDS))
    args = ["generate-pseudolabels", "--teacher", teacher, "--dataset", str(tmp_path / "train.jsonl"), "--templates",
            "mine", "--templates-dir", str(tmp_path), "--input-column", "text", "--strategy", "sample",
            "--max-new-tokens", "5", "--out", str(tmp_path / "labels"), "--quiet", *more]  # fmt: skip
    assert CliRunner().invoke(app, args, catch_exceptions=False).exit_code == 0


def test_a_recipe_trains_and_evaluates_without_the_teacher(tmp_path, job, caplog, monkeypatch):
    label_by_command(tmp_path, "--top-k-logprobs", "3")
    job.loaded.clear()
    setup, training = job(objective="forward_kl")
    assert job.loaded == [job.student]
    trainer = SupervisedTrainer(setup.student, training, train_dataset=setup.pseudo_labels, **setup.trainer_inputs())
    with caplog.at_level(logging.WARNING):
        trainer.run(setup.settings)
    assert "held-out answers have no regret, logprob, match, token rewards: that takes" in caplog.text
    evaluation = [line for line in logged(tmp_path / "run") if "eval_length" in line][-1]
    assert {"eval_exact_match", "eval_sample_exact_match", "eval_finish_rate", "eval_kl"} <= evaluation.keys()
    assert not {"eval_regret", "eval_logprob", "eval_match"} & evaluation.keys()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["models"] == {"teacher": str(tmp_path / "teacher"), "student": job.student}
    assert "student distilled from teacher" in (tmp_path / "run" / "README.md").read_text()
    assert record["settings"]["teacher_signal"] == "recorded"
    held_out = (tmp_path / "run" / "held_out.jsonl").read_text()
    assert "teacher" not in json.loads(held_out.splitlines()[0])
    # What is shown of a run needs no teacher, either.
    refuse_missing_paths(["--teacher", str(tmp_path / "no such teacher"), "--teacher_signal", "recorded"])


def test_what_the_recipe_refuses(tmp_path, job):
    label_by_command(tmp_path)
    job.loaded.clear()
    with pytest.raises(DataError, match="no column top_ids"):
        job(objective="forward_kl")
    assert job(objective="sequence")[0].teacher is None  # it reads the labels alone
    with pytest.raises(DataError, match=r"^teacher_signal = 'recorded': the labels .* other templates .*none"):
        job(templates=())
    on_policy = [kind(str(tmp_path / "x"), use_cpu=True, **options) for kind, options in (
        (PPOArguments, {"imitation_coef": 1.0}), (GKDArguments, {"on_policy_fraction": 0.5}))]  # fmt: skip
    for training in on_policy:
        with pytest.raises(ConfigError, match=r"^teacher_signal = 'recorded': .* not for the student's answers"):
            job(training)
    with pytest.raises(ConfigError, match="objective = 'best_token' needs the probability of every token"):
        job(objective="best_token")
    with pytest.raises(ConfigError, match=r"^until_ready needs the teacher's chosen, distribution"):
        job(**READY)
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ConfigError, match=r"^metric_for_best_model = 'regret': takes the teacher's model"):
        job(**best)
    with pytest.raises(ConfigError, match=r"^template_combination = 'pool': takes the teacher's model"):
        TeacherArguments(teacher_signal="recorded", template_combination="pool")
    assert job.loaded == [job.student]


# Labels weighted by the teacher's probability


def test_weights_are_the_renormalised_probabilities_of_distinct_answers(folders):
    """By enumeration: the sampled labels of a prompt may be equal, and then count once."""
    rows = folders[3]
    got, prompts = probability_weights(rows), defaultdict(list)
    for row in rows:
        prompts[row["id"]].append(row)
    assert any(a["token_ids"] == b["token_ids"] for a, b in prompts.values())
    assert any(a["token_ids"] != b["token_ids"] for a, b in prompts.values())
    for group in prompts.values():
        mass = {tuple(row["token_ids"]): math.exp(row["sum_logprob"]) for row in group}
        for row in group:
            ids = tuple(row["token_ids"])
            same = sum(tuple(other["token_ids"]) == ids for other in group)
            weight = got[row["generation"], row["row"], row["template"], row["sample"]]
            assert weight == pytest.approx(2 * mass[ids] / sum(mass.values()) / same)


def test_the_weighted_loss(tmp_path, folders):
    rows = folders[3]
    trainer = make("supervised", tmp_path, data=rows, label_weights="probability", max_steps=1)
    loss = trainer.compute_loss(trainer.policy, trainer.data_collator([rows[i] for i in range(len(rows))]))
    want, tokens, weights_ = 0.0, 0, probability_weights(rows)
    for row in rows:
        answer = row["token_ids"]
        answer = answer[:-1] if row["finish_reason"] == "length" and answer[-1] == 1 else answer
        logits = full_logits(trainer.policy.student, row["student_input"], answer).detach()
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        want += weights_[row["generation"], row["row"], row["template"], row["sample"]] * nll
        tokens += len(answer)
    assert loss.item() == pytest.approx(want / tokens, rel=1e-5)
    trainer.train()
    assert trainer.state.global_step == 1


def test_weights_without_effect_or_without_probabilities_are_refused(tmp_path, folders):
    single = folders[3].filter(lambda row: row["sample"] == 0)
    with pytest.raises(DataError, match="no prompt has two different labels, so every weight is 1"):
        make("supervised", tmp_path, data=single, label_weights="probability")
    with pytest.raises(DataError, match="label_weights = 'probability': the labels have no column sum_logprob"):
        probability_weights(folders[3].remove_columns("sum_logprob"))
    with pytest.raises(ConfigError, match="label_weights = 'probability': objective = 'forward_kl' learns"):
        make("supervised", tmp_path, objective="forward_kl", label_weights="probability")
