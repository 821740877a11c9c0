"""The TKD trainer: every preset trains, the cache changes nothing, runs resume, and the student is left plain."""

import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rlkd.data.labelled import model_inputs
from rlkd.errors import ConfigError, DataError, ModelError
from rlkd.models.encoders.bilstm import BiLSTMConfig, BiLSTMForSequenceClassification
from rlkd.models.encoders.classifiers import build_student
from rlkd.objectives.attention_tree import all_tokens, attention_tree, cls_token, rows_of_map
from rlkd.objectives.encoder import cross_entropy, soft_cross_entropy, token_distance
from rlkd.trainers.encoders.arguments import TKDArguments
from rlkd.trainers.encoders.terms import PRESETS, TERMS
from rlkd.trainers.encoders.tkd import TKDTrainer
from tiny import CLASSIFIER_WORDS, classifier_tokenizer, tiny_classifier
from tiny_runs import assert_same, differ, logged, weights

LETTERS = CLASSIFIER_WORDS[4:]


def rows(n=12, seed=0, pairs=False):
    """Sentences of 2 to 9 letters; the label says whether the first is a vowel."""
    draw = random.Random(seed)
    texts = [[draw.choice(LETTERS) for _ in range(draw.randint(2, 9))] for _ in range(n)]
    made = [{"text": " ".join(words), "label": int(words[0] in "aeiou")} for words in texts]
    return [row | {"text_pair": "x y z"} for row in made] if pairs else made


def make(
    folder, *, model=None, teacher="bert", tokenizer=None, train=None, dev=None, other=None, metrics=None, **settings
):
    teacher = tiny_classifier(teacher) if isinstance(teacher, str) else teacher
    args = TKDArguments(
        output_dir=str(folder),
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        **{
            "max_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "max_length": 32,
            **settings,
        },
    )
    return TKDTrainer(
        build_student(teacher, 2) if model is None else model,
        args,
        teacher=teacher,
        tokenizer=tokenizer or classifier_tokenizer(),
        train_rows=rows() if train is None else train,
        eval_rows=dev,
        teacher_tokenizer=other,
        compute_metrics=metrics,
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_and_logs_its_terms_raw_and_weighted(tmp_path, preset):
    own = {name: 17.0 for name in PRESETS[preset] if TERMS[name].setting is None}
    own = {"gram": 17.0} if preset == "custom" else own
    trainer = make(tmp_path, preset=preset, terms=own, beta=3.0, gamma_s=5.0, gamma_t=7.0, gamma_r=11.0, eta=13.0)
    before, teacher = weights(trainer.trained.student), weights(trainer.teacher)
    trainer.train()
    assert differ(before, weights(trainer.trained.student))
    assert_same(teacher, weights(trainer.teacher))
    given = {"ce": 0.5, "kd": 0.5, "pt": 3.0, "td_student": 5.0, "td_teacher": 7.0, "td_random": 11.0, "all": 13.0}
    given = ({"ce": 1.0} if preset == "ft" else given | {"mse": 0.5, "noisy": 0.5}) | own
    steps = [row for row in logged(tmp_path) if "loss" in row]
    assert len(steps) == 2
    for row in steps:
        terms = {name for name in row if f"weighted_{name}" in row}
        assert terms == {*PRESETS[preset], *own}
        assert all(row[f"weighted_{name}"] == pytest.approx(given[name] * row[name], rel=1e-5) for name in terms)
        assert sum(row[f"weighted_{name}"] for name in terms) == pytest.approx(row["loss"], rel=1e-3)
        assert all(row[name] > 0 for name in terms - {"embedding"})  # which the student has from the teacher


def one_batch(trainer, n=4):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(n)])


@pytest.mark.parametrize("normalise", [True, False])
def test_the_loss_is_the_sum_of_its_terms_on_the_models_own_outputs(tmp_path, normalise):
    trainer = make(tmp_path, preset="all", beta=2.0, eta=3.0, normalise=normalise, temperature=4.0)
    batch = one_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    inputs = model_inputs(batch)
    student, teacher = (m(**inputs, output_hidden_states=True) for m in (trainer.trained.student, trainer.teacher))
    pairs = student.hidden_states[1:], [teacher.hidden_states[2], teacher.hidden_states[4]]
    valid = batch["attention_mask"].bool()
    expected = (
        0.5 * cross_entropy(student.logits, batch["labels"])
        + 0.5 * soft_cross_entropy(student.logits, teacher.logits, 4.0)
        + 2.0 * token_distance(*pairs, [cls_token(valid)] * 2, normalise=normalise)
        + 3.0 * token_distance(*pairs, [all_tokens(valid, 2)] * 2, normalise=normalise)
    )
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)


def test_a_tree_wide_enough_is_all_and_random_too(tmp_path):
    trainer = make(tmp_path, preset="tkd", tree_m=32)
    batch = one_batch(trainer)
    student = trainer.model(model_inputs(batch), {"hidden", "tree"})
    read = trainer.batch(batch, student, trainer.teacher_outputs(batch, {"hidden"}))
    terms = {name: TERMS[name].loss(read) for name in ("td_student", "td_random", "all")}
    torch.testing.assert_close(terms["td_student"], terms["all"])
    torch.testing.assert_close(terms["td_random"], terms["all"])


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(tmp_path):
    teacher = tiny_classifier()
    trainer = make(tmp_path, model=build_student(teacher, 4), teacher=teacher, preset="all-t-s-tkd", w_ce=0.0)
    assert trainer.compute_loss(trainer.model, one_batch(trainer)).item() == pytest.approx(0, abs=1e-5)


def test_the_teachers_tree_reads_the_matched_layers(tmp_path):
    trainer = make(tmp_path, preset="teacher-tkd", layer_map=[2, 3])
    batch = one_batch(trainer)
    valid = batch["attention_mask"].bool()
    teacher = trainer.teacher_outputs(batch, {"hidden", "tree"})
    own = trainer.batch(batch, None, teacher).tree("teacher")
    trainer.teacher.set_attn_implementation("eager")
    maps = trainer.teacher(**model_inputs(batch), output_attentions=True).attentions
    eager = attention_tree([rows_of_map(maps[1]), rows_of_map(maps[2])], valid, 2, 2)
    assert len(teacher.attention) == 2
    assert all(torch.equal(one, other) for one, other in zip(own, eager, strict=True))


def test_excluded_tokens_are_never_chosen(tmp_path):
    trainer = make(tmp_path, tree_exclude=["cls", "sep", "self"], tree_m=32)
    batch = one_batch(trainer)
    student = trainer.model(model_inputs(batch), {"tree"})
    special = (batch["input_ids"] == 1) | (batch["input_ids"] == 2)
    for level in trainer.batch(batch, student, None).student_tree:
        assert not level.transpose(1, 2)[special].any()
        assert level.any()


def test_a_tree_can_start_late(tmp_path):
    make(tmp_path, tree_start_epoch=1.0, max_steps=-1, num_train_epochs=2, preset="all-tkd").train()
    lines = [row for row in logged(tmp_path) if "loss" in row]
    assert [sorted(set(row) & {"pt", *(name for name, term in TERMS.items() if term.late)}) for row in lines] == [
        ["pt"]
    ] * 3 + [["all", "pt", "td_student"]] * 3


def test_auto_scale_makes_the_terms_equal_at_their_first_step(tmp_path):
    make(tmp_path, preset="all-tkd", auto_scale=True, tree_start_epoch=0.3, max_steps=3).train()
    lines = [row for row in logged(tmp_path) if "loss" in row]
    for step, name in ((0, "pt"), (1, "td_student"), (1, "all")):
        row = lines[step]
        assert row[f"weighted_{name}"] == pytest.approx(row["weighted_ce"] + row["weighted_kd"], rel=1e-5)
    scale = [row["weighted_pt"] / row["pt"] for row in lines]
    assert scale == pytest.approx([scale[0]] * 3)


def test_logits_may_be_matched_by_squares_and_with_noise(tmp_path):
    trainer = make(tmp_path, preset="logit-mse", w_ce=0.0, w_kd=1.0)
    batch = one_batch(trainer)
    inputs = model_inputs(batch)
    difference = trainer.trained.student(**inputs).logits - trainer.teacher(**inputs).logits
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), difference.square().mean())
    noisy = make(tmp_path, preset="noisy-logits", w_ce=0.0, w_kd=1.0, noise_probability=1.0)
    one, other = (noisy.compute_loss(noisy.model, batch).item() for _ in range(2))
    assert one != other


def test_patience_without_the_last_layer_and_with_a_map(tmp_path):
    trainer = make(tmp_path, preset="pkd", w_ce=0.0, w_kd=0.0, beta=1.0, patience_last_layer=False, layer_map=[3, 4])
    batch = one_batch(trainer)
    inputs = model_inputs(batch)
    student, teacher = (m(**inputs, output_hidden_states=True) for m in (trainer.trained.student, trainer.teacher))
    expected = token_distance(
        [student.hidden_states[1]], [teacher.hidden_states[3]], [cls_token(batch["attention_mask"])]
    )
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


# The cache


@pytest.mark.parametrize(
    ("kind", "preset"), [("logits", "kd"), ("cls", "pkd"), ("hidden", "tkd"), ("hidden", "rand"), ("hidden", "kd")]
)
def test_the_cache_changes_nothing_in_any_order_of_rows(tmp_path, kind, preset):
    runs = {}
    for cache in ("none", kind):
        options = {"teacher_cache": cache, "num_train_epochs": 2, "max_steps": -1, "per_device_eval_batch_size": 5}
        trainer = make(tmp_path / cache, preset=preset, train=rows(13), optim="sgd", **options)
        trainer.train()
        runs[cache] = trainer
    one, other = ([r for r in logged(tmp_path / cache) if "loss" in r] for cache in runs)
    assert len(one) == len(other) == 8
    for plain, kept in zip(one, other, strict=True):
        names = [name for name in plain if f"weighted_{name}" in plain]
        assert [kept[name] for name in names] == pytest.approx([plain[name] for name in names], abs=1e-6, rel=1e-5)
    asked = runs[kind]
    cache, asked.teacher_cache = asked.teacher_cache, None
    for index in ([3, 0, 12], [7]):
        batch = asked.data_collator([asked.train_dataset[i] for i in index])
        direct = asked.teacher_outputs(batch, set() if kind == "logits" else {"hidden"})
        kept = cache.batch(index, batch["input_ids"].shape[1])
        torch.testing.assert_close(kept.logits, direct.logits, atol=1e-6, rtol=1e-6)
        for k, states in enumerate(kept.hidden):
            mask = batch["attention_mask"].bool()[:, : states.shape[1]]
            torch.testing.assert_close(states[mask], direct.hidden[k][:, : states.shape[1]][mask], atol=1e-6, rtol=1e-5)
            assert not states[~mask].any()
        assert len(kept.hidden) == (0 if kind == "logits" else 2)


def folders(root):
    return {path.name for path in root.iterdir()}


def test_the_cache_is_found_again_and_never_mistaken(tmp_path):
    root = tmp_path / "cache"
    options = {"preset": "kd", "teacher_cache": "logits", "teacher_cache_dir": str(root)}
    make(tmp_path / "a", **options).open_teacher_cache()
    (first,) = folders(root)
    written = (root / first / "logits.npy").stat().st_mtime_ns
    make(tmp_path / "b", **options, seed=5, model=tiny_classifier(layers=3, seed=9)).open_teacher_cache()
    assert folders(root) == {first}
    assert (root / first / "logits.npy").stat().st_mtime_ns == written
    changed = rows()
    changed[3] = {"text": "q q", "label": changed[3]["label"]}
    others = (
        {"train": changed},
        {"teacher": tiny_classifier(seed=3)},
        {"max_length": 5},
        {"tokenizer": classifier_tokenizer([*CLASSIFIER_WORDS[:-1], "zz"])},
        {"teacher_cache": "cls"},
    )
    for n, other in enumerate(others, start=2):
        make(tmp_path / "c", **{**options, **other}).open_teacher_cache()
        assert len(folders(root)) == n
    relabelled = [row | {"label": 0} for row in rows()]
    make(tmp_path / "d", **options, train=relabelled).open_teacher_cache()
    assert len(folders(root)) == n


def test_an_interrupted_cache_leaves_nothing(tmp_path, monkeypatch):
    trainer = make(tmp_path, preset="kd", teacher_cache="logits", per_device_eval_batch_size=4)
    asked = trainer._ask_teacher
    calls = []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return asked(*args, **kwargs)

    monkeypatch.setattr(trainer, "_ask_teacher", fails)
    with pytest.raises(KeyboardInterrupt):
        trainer.open_teacher_cache()
    assert folders(tmp_path / "teacher_cache") == set()
    trainer.open_teacher_cache()
    assert len(trainer.teacher_cache) == 12


def test_runs_that_share_a_cache_do_not_trip_over_each_other(tmp_path, monkeypatch):
    """The other run finishes while this one computes; and one that was killed left its part behind."""
    options = {"preset": "kd", "teacher_cache": "logits", "teacher_cache_dir": str(tmp_path / "cache")}
    slow, fast = make(tmp_path / "a", **options), make(tmp_path / "b", **options)
    asked = slow._ask_teacher

    def overtaken(*args, **kwargs):
        fast.open_teacher_cache()
        return asked(*args, **kwargs)

    monkeypatch.setattr(slow, "_ask_teacher", overtaken)
    slow.open_teacher_cache()
    (name,) = folders(tmp_path / "cache")
    assert len(slow.teacher_cache) == len(fast.teacher_cache) == 12
    shutil.rmtree(tmp_path / "cache" / name)
    (tmp_path / "cache" / f"{name}.partial-{os.getpid()}").mkdir()
    make(tmp_path / "c", **options).open_teacher_cache()
    assert name in folders(tmp_path / "cache")


@pytest.mark.parametrize("name", ["logits.npy", "hidden.npy", "offsets.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_cache_is_computed_again(tmp_path, caplog, name, damage):
    def outputs():
        trainer = make(tmp_path, preset="pkd", teacher_cache="hidden")
        trainer.open_teacher_cache()
        out = trainer.teacher_cache.batch(range(12), max(trainer.train_dataset.lengths))
        return [tensor.clone() for tensor in (out.logits, *out.hidden)]

    before = outputs()
    (path,) = (tmp_path / "teacher_cache").glob(f"*/{name}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:-9])
    if damage == "missing":
        path.unlink()
    after = outputs()
    assert "are damaged: computing them again" in caplog.text
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_cache_of_another_precision_or_batch_is_another(tmp_path, monkeypatch):
    """Each decides the last bits. The precision is the accelerator's: a setting is not the only way to it."""
    made = set()
    for precision, batch in (("no", 8), ("bf16", 8), ("fp16", 8), ("no", 4)):
        trainer = make(tmp_path, preset="kd", teacher_cache="logits", per_device_eval_batch_size=batch)
        monkeypatch.setattr("accelerate.Accelerator.mixed_precision", precision)
        trainer.open_teacher_cache()
        made.add(frozenset(folders(tmp_path / "teacher_cache")))
    assert len(made) == 4


@pytest.mark.parametrize("bf16", [False, True])
def test_the_teacher_computes_in_the_precision_asked_for_and_answers_in_float32(tmp_path, bf16):
    trainer = make(tmp_path, preset="teacher-tkd", bf16=bf16)
    found = trainer.teacher_outputs(one_batch(trainer), {"hidden", "tree"}).logits
    exact = trainer.teacher(**model_inputs(one_batch(trainer))).logits
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float()) is bf16
    torch.testing.assert_close(found, exact, atol=0.1 if bf16 else 1e-6, rtol=0.05 if bf16 else 1e-6)


def test_a_kept_teacher_is_not_asked_again(tmp_path, monkeypatch):
    trainer = make(tmp_path, preset="tkd", teacher_cache="hidden")
    trainer.open_teacher_cache()
    monkeypatch.setattr(trainer.teacher, "forward", None)
    trainer.train()
    assert trainer.state.global_step == 2


# Saving and resuming


@pytest.mark.parametrize("options", [{"preset": "rand"}, {"preset": "all-tkd", "auto_scale": True}, {"narrow": True}])
def test_a_resumed_run_is_the_same_run(tmp_path, options):
    def run(folder):
        torch.manual_seed(0)
        teacher = tiny_classifier(dropout=0.1)
        narrow = {"hidden_size": 8} if options.get("narrow") else {}
        model = build_student(teacher, 2, "random" if narrow else "mapped", **narrow)
        given = {name: value for name, value in options.items() if name != "narrow"}
        given |= {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
        return make(folder, model=model, teacher=teacher, **given)

    straight = run(tmp_path / "one")
    straight.train()
    resumed = run(tmp_path / "two")
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert_same(weights(straight.trained), weights(resumed.trained))
    assert resumed.scales == straight.scales
    assert bool(resumed.trained.projections) == bool(options.get("narrow"))
    tail = [[row for row in logged(tmp_path / f) if "loss" in row and row["step"] > 2] for f in ("one", "two")]
    terms = [[{k: v for k, v in row.items() if "td" in k or k in ("ce", "kd")} for row in lines] for lines in tail]
    assert len(terms[0]) == 3
    assert terms[0] == terms[1]


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_the_saved_student_is_a_plain_classifier(tmp_path, kind):
    teacher = tiny_classifier(kind)
    model = build_student(teacher, 2, "random", hidden_size=8)
    trainer = make(tmp_path, model=model, teacher=teacher, save_strategy="steps", save_steps=2)
    assert trainer.trained.projections
    trainer.train()
    trainer.save_model()
    assert "projections.safetensors" in folders(tmp_path / "checkpoint-2")
    saved = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert {path.name for path in tmp_path.glob("[!.]*") if path.is_file()} == {*saved, "metrics.jsonl", "run.json"}
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        loaded, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert type(loaded) is type(teacher)
        assert load_file(folder / "model.safetensors").keys() <= teacher.state_dict().keys()
        saved = json.loads((folder / "config.json").read_text())
        assert not [name for name in saved if "rlkd" in str(saved[name])]
        assert_same(weights(loaded), weights(model))


def test_the_best_dev_score_is_kept_and_training_stops_early(tmp_path):
    options = {
        "num_train_epochs": 12, "max_steps": -1, "eval_strategy": "epoch", "save_strategy": "epoch",
        "load_best_model_at_end": True, "metric_for_best_model": "accuracy", "early_stopping_patience": 2,
        "learning_rate": 0.03, "preset": "kd", "save_total_limit": 2,
    }  # fmt: skip
    trainer = make(tmp_path, dev=rows(30, seed=1), **options)
    trainer.train()
    scores = {row["step"]: row["eval_accuracy"] for row in logged(tmp_path) if "eval_accuracy" in row}
    best = max(scores.values())
    assert trainer.state.best_metric == best
    first = min(step for step, score in scores.items() if score == best)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{first}")
    assert trainer.state.epoch < 12
    assert trainer.evaluate()["eval_accuracy"] == best


def test_evaluation_is_accuracy_and_cross_entropy_of_the_student_alone(tmp_path, monkeypatch, caplog):
    dev = rows(9, seed=2)
    dev[4]["label"] = None
    trainer = make(tmp_path, dev=dev, per_device_eval_batch_size=3)
    assert "eval_rows: skipping 1 of 9 rows, which have no label" in caplog.text
    monkeypatch.setattr(trainer.teacher, "forward", None)
    metrics = trainer.evaluate()
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(8)])
    logits = trainer.trained.student(**model_inputs(batch)).logits
    hits = (logits.argmax(-1) == torch.tensor([row["label"] for row in dev if row["label"] is not None])).tolist()
    assert metrics["eval_accuracy"] == pytest.approx(sum(hits) / 8)
    assert metrics["eval_loss"] == pytest.approx(cross_entropy(logits, batch["labels"]).item(), rel=1e-5)


def test_it_fine_tunes_a_teacher_and_learns(tmp_path, capsys):
    model = tiny_classifier(layers=2)
    trainer = TKDTrainer(
        model,
        TKDArguments(
            output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, report_to=[], preset="ft", max_steps=150,
            learning_rate=1e-2, per_device_train_batch_size=16, save_strategy="no", max_length=32,
        ),
        tokenizer=classifier_tokenizer(),
        train_rows=rows(200, seed=3),
        eval_rows=rows(60, seed=4),
    )  # fmt: skip
    trainer.run()
    assert trainer.evaluate()["eval_accuracy"] > 0.9
    assert "model and metrics.jsonl saved in" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").exists()


# Other students


def test_models_of_other_heads_and_width(tmp_path):
    teacher = tiny_classifier(width=24, heads=3)
    student = build_student(teacher, 2, "random", hidden_size=16, attention_heads=4)
    trainer = make(tmp_path, model=student, teacher=teacher, preset="all-t-s-tkd")
    before = weights(trainer.trained.projections)
    trainer.train()
    assert differ(before, weights(trainer.trained.projections))


@pytest.mark.parametrize("preset", ["kd", "pkd"])
def test_a_bilstm_learns_from_logits_and_cls(tmp_path, preset):
    torch.manual_seed(0)
    config = BiLSTMConfig(
        vocab_size=len(CLASSIFIER_WORDS), embedding_size=8, hidden_size=6, classifier_size=5, num_hidden_layers=2
    )
    trainer = make(tmp_path, model=BiLSTMForSequenceClassification(config), preset=preset)
    trainer.train()
    assert trainer.state.global_step == 2


def other_tokenizer():
    return classifier_tokenizer(["<pad>", "[CLS]", "[SEP]", "<unk>", *reversed(LETTERS)])


@pytest.mark.parametrize("cache", ["none", "logits"])
def test_a_teacher_with_its_own_tokenizer_gives_logits(tmp_path, cache):
    trainer = make(tmp_path, preset="kd", other=other_tokenizer(), teacher_cache=cache, train=rows(12))
    trainer.open_teacher_cache()
    ids = torch.tensor([[1, 4 + 25 - LETTERS.index("b"), 2]])
    trainer.teacher_texts.ids["input_ids"][0] = ids[0].tolist()
    trainer.teacher_texts.ids["token_type_ids"][0] = [0, 0, 0]
    if cache == "none":
        outputs = trainer.teacher_outputs(one_batch(trainer, 1), {"logits"})
        torch.testing.assert_close(outputs.logits, trainer.teacher(input_ids=ids).logits)
    trainer.train()


def test_unlabelled_rows_train_on_the_teacher_alone(tmp_path):
    unlabelled = [{"text": row["text"]} for row in rows()]
    make(tmp_path, preset="kd", train=unlabelled).train()
    lines = [row for row in logged(tmp_path) if "loss" in row]
    assert [row["ce"] for row in lines] == [0, 0]
    assert all(row["kd"] > 0 for row in lines)


def test_preset_ft_leaves_out_what_has_no_label(tmp_path):
    train = rows()
    mixed = [{"text": "z z", "label": None}, *train, {"text": "y"}]
    one, other = (make(tmp_path / str(len(r)), preset="ft", train=r) for r in (train, mixed))
    for trainer in (one, other):
        trainer.train()
    assert len(other.train_dataset) == len(train)
    assert_same(weights(one.trained), weights(other.trained))


def test_auto_scale_waits_for_a_term_that_is_there(tmp_path):
    """The states of a student that is the whole teacher equal its own: the inverse of their distance is no weight."""
    teacher = tiny_classifier()
    trainer = make(
        tmp_path, model=build_student(teacher, 4), teacher=teacher, preset="pkd", auto_scale=True, max_steps=8
    )
    trainer.train()
    lines = [row for row in logged(tmp_path) if "loss" in row]
    assert lines[0]["pt"] < 1e-6
    assert lines[0]["weighted_pt"] == 0
    joined = next((row for row in lines if row["weighted_pt"] > 0), None)
    if joined is not None:
        assert joined["pt"] >= 1e-4
        assert joined["weighted_pt"] == pytest.approx(joined["weighted_ce"] + joined["weighted_kd"], rel=1e-5)


def test_auto_scale_waits_for_something_to_scale_to(tmp_path):
    """CE alone has no value in a batch without labels."""
    trainer = make(tmp_path, preset="pkd", w_kd=0.0, auto_scale=True, max_steps=6)
    batch = one_batch(trainer)
    unlabelled = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert trainer.compute_loss(trainer.model, unlabelled).item() == 0
    assert trainer.scales == {}
    loss = trainer.compute_loss(trainer.model, batch)
    assert trainer.scales["pt"] > 0
    logits = trainer.trained.student(**model_inputs(batch)).logits
    torch.testing.assert_close(loss, 2 * 0.5 * cross_entropy(logits, batch["labels"]))


def test_the_seed_draws_the_projections(tmp_path):
    drawn = []
    for before, seed in ((1, 0), (2, 0), (2, 5)):
        teacher = tiny_classifier()
        model = build_student(teacher, 2, "random", hidden_size=8)
        torch.manual_seed(before)
        trainer = make(tmp_path, model=model, teacher=teacher, preset="pkd", seed=seed)
        drawn.append(weights(trainer.trained.projections))
    assert_same(drawn[0], drawn[1])
    assert differ(drawn[1], drawn[2])


def test_pairs_keep_their_token_types(tmp_path):
    trainer = make(tmp_path, train=rows(4, pairs=True))
    batch = one_batch(trainer)
    assert batch["token_type_ids"][0].sum() == 4  # x y z [SEP]
    trainer.train()


def test_bf16_runs_and_stays_close(tmp_path):
    for name, options in (("full", {}), ("bf16", {"bf16": True})):
        make(tmp_path / name, preset="all-tkd", **options).train()
    full, half = (next(row for row in logged(tmp_path / name) if "loss" in row) for name in ("full", "bf16"))
    assert half["ce"] == pytest.approx(full["ce"], rel=0.05)
    assert half["pt"] == pytest.approx(full["pt"], rel=0.05)
    assert half["ce"] != full["ce"]


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "tdk"}, "preset = 'tdk': allowed are 'ft', 'kd'"),
        ({"w_kd": -1.0}, "w_kd = -1.0: must be at least 0"),
        ({"temperature": 0.0}, "temperature = 0.0: must be above 0"),
        ({"preset": "noisy-logits", "noise_probability": 2.0}, "noise_probability = 2.0"),
        ({"preset": "noisy-logits", "noise_deviation": -1.0}, "noise_deviation = -1.0"),
        ({"tree_m": 0}, "tree_m = 0: must be at least 1"),
        ({"max_length": 2}, "max_length = 2: must be at least 3"),
        ({"tree_exclude": ["pad"]}, "allowed are lists of 'self', 'cls', 'sep'"),
        ({"tree_start_epoch": 3.0, "num_train_epochs": 3, "max_steps": -1}, "3.0: must be less than"),
        ({"preset": "kd", "w_ce": 0.0, "w_kd": 0.0}, "no term has a weight above 0 at the start"),
        ({"w_ce": 0.0, "w_kd": 0.0, "beta": 0.0, "tree_start_epoch": 0.5}, "no term has a weight above 0 at the start"),
        ({"w_ce": 0.0, "w_kd": 0.0, "auto_scale": True}, "scales to CE and KD"),
        ({"early_stopping_patience": 2}, "needs load_best_model_at_end: true"),
        ({"teacher_cache": "logits", "preset": "ft"}, "preset 'ft' uses no teacher"),
        ({"teacher_cache": "logits", "preset": "kd", "w_kd": 0.0}, "preset 'kd' uses no teacher"),
        ({"teacher_cache": "hidden", "preset": "t-s-tkd"}, "grows a tree in the teacher's attention"),
        ({"teacher_cache": "logits", "preset": "pkd"}, "preset 'pkd' needs 'cls' or hidden, or none"),
        ({"teacher_cache": "cls", "preset": "tkd"}, "preset 'tkd' needs 'hidden', or none"),
        ({"layer_map": [1, 9]}, r"layer_map = \[1, 9\]: must give 2 layers"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, **settings)


def test_texts_longer_than_a_model_has_positions(tmp_path):
    make(tmp_path, max_length=40)
    with pytest.raises(ConfigError, match=r"max_length = 41: the student \('bert'\) has 40 positions"):
        make(tmp_path, max_length=41)
    with pytest.raises(ConfigError, match=r"the student .* has 40 positions"):
        make(tmp_path, max_length=41, teacher=None, model=tiny_classifier(), preset="ft")
    # RoBERTa's positions begin after that of padding.
    with pytest.raises(ConfigError, match=r"\('roberta'\) has 39 positions"):
        make(tmp_path, max_length=40, teacher="roberta")
    teacher, student = tiny_classifier(), BiLSTMForSequenceClassification(BiLSTMConfig(vocab_size=30))
    make(tmp_path, teacher=teacher, model=student, preset="kd")  # has no positions to run out of
    with pytest.raises(ConfigError, match=r"the teacher .* has 40 positions"):
        make(tmp_path, max_length=41, teacher=teacher, model=student, preset="kd")


def test_models_that_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match="needs a teacher: give one, or preset: ft"):
        make(tmp_path, teacher=None, model=tiny_classifier())
    with pytest.raises(ConfigError, match=r"different tokenizers.*Use preset: kd"):
        make(tmp_path, other=other_tokenizer())
    with pytest.raises(ModelError, match="teacher has 2 labels and the student 3"):
        make(tmp_path, model=tiny_classifier(labels=3, layers=2))
    with pytest.raises(ConfigError, match=r"5 layers, more than its teacher \(4\)"):
        make(tmp_path, model=tiny_classifier(layers=5))
    for preset in ("tkd", "rand", "all"):
        with pytest.raises(ConfigError, match="student's 3 heads, and the teacher's width 16"):
            make(tmp_path, model=tiny_classifier(layers=2, width=12, heads=3), preset=preset)
    make(tmp_path, model=tiny_classifier(layers=2, width=12, heads=3), preset="teacher-tkd")
    with pytest.raises(ModelError, match="'rlkd_bilstm' model without attention heads"):
        make(tmp_path, model=BiLSTMForSequenceClassification(BiLSTMConfig(vocab_size=30)), preset="tkd")
    more = classifier_tokenizer([*CLASSIFIER_WORDS, "zz"])
    with pytest.raises(
        ModelError, match="student 'bert': the tokenizer has ids up to 30 but the model's vocab_size is 30"
    ):
        make(tmp_path, tokenizer=more, teacher=None, model=tiny_classifier(), preset="ft")
    with pytest.raises(ModelError, match="teacher 'bert': the tokenizer has ids up to 30"):
        make(tmp_path, other=more, preset="kd")
    unpadded = classifier_tokenizer()
    unpadded.pad_token = None
    with pytest.raises(ModelError, match="the tokenizer has no padding token"):
        make(tmp_path, tokenizer=unpadded)
    with pytest.raises(ConfigError, match="a student of 1 layer has no other"):
        make(tmp_path, model=tiny_classifier(layers=1), preset="pkd", patience_last_layer=False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a b", "label": 2}, "row 12: label 2 is not in the label set: allowed are the whole numbers 0 to 1"),
        ({"text": "a b", "label": "yes"}, "row 12: label 'yes' is not in the label set"),
        ({"text": "a b", "label": True}, "row 12: label True is not in the label set"),
        ({"text": None, "label": 1}, r"row 12: text and text_pair must be text, found \(None, None\)"),
        ({"txt": "a", "label": 1}, "row 12: text and text_pair must be text"),
        ({"text": 7, "label": 1}, r"row 12: .* found \(7, None\)"),
        ({"text": "a b", "label": 1, "text_pair": "c"}, "text_pair is missing.*needs two texts in every row"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        make(tmp_path, train=[*rows(), row])


def test_no_rows_and_no_labels(tmp_path):
    unlabelled = [{"text": "a b"}] * 4
    with pytest.raises(DataError, match="no rows: at least one text is needed"):
        make(tmp_path, train=[])
    with pytest.raises(DataError, match="train_rows: none of 4 rows has a label"):
        make(tmp_path, preset="ft", train=unlabelled)
    for dev in ([], unlabelled):
        with pytest.raises(DataError, match=f"eval_rows: none of {len(dev)} rows has a label"):
            make(tmp_path, dev=dev)
