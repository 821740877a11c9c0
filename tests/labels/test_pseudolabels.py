"""Labels on disk, against an oracle that sees all logits at once and calls nothing of rlkd's decoding or scoring."""

import hashlib
import json
import logging
import math
from dataclasses import fields

import datasets
import pyarrow.parquet as pq
import pytest
import torch

from rlkd.errors import ConfigError, DataError, DivergenceError
from rlkd.labels.options import RunOptions
from rlkd.labels.pseudolabels import generate_pseudolabels
from rlkd.labels.store import load_pseudolabels
from rlkd.records import Example
from rlkd.sampling.engines.protocol import Decoding
from tiny import EOS, PAD, VALID, tiny_teacher

NEW = 6
EXAMPLES = [
    Example(f"r{i}", text, (f"copy {text}", f"answer of {text} is :"), (text.upper(),))
    for i, text in enumerate(["a b c", "d", "e f g h i j k l m", "0 1", "2 3 4 5 6", "a", "m l k", "9 8 7 6"])
]
TEMPLATES = ["copy", "answer"]


def generate(out, teacher=None, examples=EXAMPLES, **settings):
    """`settings` are fields of Decoding and of RunOptions."""
    settings = {"strategy": "greedy", "max_new_tokens": NEW, "batch_tokens": 60} | settings
    decoding, options = (
        kind(**{field.name: settings.pop(field.name) for field in fields(kind) if field.name in settings})
        for kind in (Decoding, RunOptions)
    )
    assert not settings
    return generate_pseudolabels(
        teacher or tiny_teacher(), examples, out=out, template_names=TEMPLATES, decoding=decoding, options=options
    )


def full_log_probs(teacher, text, ids):
    """Log-probabilities [R, V] of every next token by one plain forward of the transformers model."""
    prompt = torch.tensor([teacher.tokenizer(text, add_special_tokens=teacher.append_eos)["input_ids"]])
    start = teacher.lm.model.config.decoder_start_token_id
    decoder_input = torch.tensor([[start, *ids]])
    with torch.no_grad():
        logits = teacher.lm.model(input_ids=prompt, decoder_input_ids=decoder_input).logits
    return logits[0, :, :VALID].double().log_softmax(-1)


def oracle_sum(teacher, text, ids):
    table = full_log_probs(teacher, text, ids)
    return sum(table[t, token].item() for t, token in enumerate(ids))


@pytest.mark.parametrize("kind", ["t5", "t5-untied", "bart"])
@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "greedy"},
        {"strategy": "sample", "labels_per_input": 3},
        {"strategy": "sample", "labels_per_input": 2, "temperature": 0.7},
        {"strategy": "beam", "num_beams": 3, "labels_per_input": 2},
    ],
    ids=["greedy", "sample", "tempered", "beam"],
)
def test_every_row_in_order_with_its_exact_logprob(tmp_path, kind, settings):
    teacher = tiny_teacher(kind)
    n = settings.get("labels_per_input", 1)
    totals = generate(tmp_path, teacher, **settings)
    rows = load_pseudolabels(tmp_path).to_list()
    expected = [
        (e.id, name, text, e.student_input, list(e.references), sample)
        for e in EXAMPLES
        for name, text in zip(TEMPLATES, e.teacher_inputs, strict=True)
        for sample in range(n)
    ]
    columns = ("id", "template", "teacher_input", "student_input", "references", "sample")
    assert [tuple(row[c] for c in columns) for row in rows] == expected
    assert totals["rows"] == len(expected)
    for row in rows:
        ids = row["token_ids"]
        assert row["sum_logprob"] == pytest.approx(oracle_sum(teacher, row["teacher_input"], ids), abs=2e-5)
        assert row["finish_reason"] == ("eos" if ids[-1] == EOS else "length")
        assert EOS not in ids[:-1]
        assert row["finish_reason"] == "eos" or len(ids) == NEW
        prompt = teacher.tokenizer(row["teacher_input"])["input_ids"]
        assert (row["n_in"], row["n_out"], row["truncated"]) == (len(prompt), len(ids), False)
        assert (row["status"], row["error"], row["choices"]) == ("ok", None, None)
        assert max(ids) < VALID
        assert row["label"] == teacher.tokenizer.decode(ids, skip_special_tokens=True)


def test_greedy_takes_the_largest_logit(tmp_path):
    teacher = tiny_teacher("bart", seed=3)
    generate(tmp_path, teacher)
    for row in load_pseudolabels(tmp_path):
        table = full_log_probs(teacher, row["teacher_input"], row["token_ids"])
        assert table[: len(row["token_ids"])].argmax(-1).tolist() == row["token_ids"]


def test_full_width_beam_search_finds_the_best_answer_of_all(tmp_path):
    """With at least as many beams as prefixes, beam search is exhaustive: compare with brute force over 2 tokens."""
    teacher = tiny_teacher("t5-untied", seed=1)
    generate(tmp_path, teacher, EXAMPLES[:2], strategy="beam", num_beams=VALID, max_new_tokens=2, labels_per_input=1)
    for row in load_pseudolabels(tmp_path):
        first = full_log_probs(teacher, row["teacher_input"], [])[0]
        answers = {(EOS,): first[EOS].item()}
        for token in range(VALID):
            if token != EOS:
                second = full_log_probs(teacher, row["teacher_input"], [token])[1]
                answers |= {(token, last): (first[token] + second[last]).item() for last in range(VALID)}
        # transformers ranks by log-probability per token.
        best = max(answers, key=lambda ids: answers[ids] / len(ids))
        assert tuple(row["token_ids"]) == best


@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam"])
def test_labels_depend_on_neither_batch_nor_shard_size(tmp_path, strategy):
    n = 1 if strategy == "greedy" else 2
    teacher = tiny_teacher("t5-untied", seed=5)
    tables = []
    for i, (batch_tokens, shard_rows) in enumerate([(1, 100), (60, 100), (2000, 5), (40, 4)]):
        out = tmp_path / str(i)
        generate(out, teacher, strategy=strategy, labels_per_input=n, batch_tokens=batch_tokens, shard_rows=shard_rows)
        tables.append(load_pseudolabels(out).to_list())
    logprobs = [[row.pop("sum_logprob") for row in table] for table in tables]
    for table, sums in zip(tables[1:], logprobs[1:], strict=True):
        assert table == tables[0]
        assert sums == pytest.approx(logprobs[0], abs=2e-5)


def test_samples_differ_and_follow_the_seed(tmp_path):
    def labels(name, **settings):
        generate(tmp_path / name, strategy="sample", labels_per_input=4, **settings)
        return load_pseudolabels(tmp_path / name)["token_ids"][:]

    first = labels("a", seed=1)
    groups = [first[i : i + 4] for i in range(0, len(first), 4)]
    assert sum(len({tuple(ids) for ids in group}) > 1 for group in groups) >= len(groups) - 1
    assert labels("b", seed=1) == first
    assert labels("c", seed=2) != first
    assert labels("d", seed=1, temperature=0.3) != first


def test_t0_inputs_carry_no_eos(tmp_path):
    teacher = tiny_teacher("t5", append_eos=False)
    generate(tmp_path, teacher, strategy="beam")
    row = load_pseudolabels(tmp_path)[0]
    assert row["sum_logprob"] == pytest.approx(oracle_sum(teacher, row["teacher_input"], row["token_ids"]), abs=2e-5)
    with_eos = oracle_sum(tiny_teacher("t5"), row["teacher_input"], row["token_ids"])
    assert abs(with_eos - row["sum_logprob"]) > 1e-3


def test_how_the_checkpoint_searches_does_not_leak_into_beam_search(tmp_path):
    """What it says of answers does: tests/models/test_generation.py."""
    plain = tiny_teacher("bart", seed=2)
    generate(tmp_path / "plain", plain, strategy="beam")
    biased = tiny_teacher("bart", seed=2)
    biased.lm.model.generation_config.update(num_beams=7, max_length=3, num_return_sequences=2, do_sample=True)
    generate(tmp_path / "biased", biased, strategy="beam")
    one, other = (load_pseudolabels(tmp_path / name).remove_columns("generation") for name in ("biased", "plain"))
    assert one.to_list() == other.to_list()
    assert biased.lm.model.generation_config.num_beams == 7


def test_an_answer_of_padding_alone_is_no_label(tmp_path):
    teacher = tiny_teacher("bart", seed=2)
    teacher.lm.model.final_logits_bias[0, teacher.lm.pad_id] = 100.0
    generate(tmp_path, teacher, strategy="greedy")
    rows = load_pseudolabels(tmp_path, statuses=None).to_list()
    assert {(row["status"], row["error"]) for row in rows} == {("failed", "the answer is only padding tokens")}
    assert {row["label"] for row in rows} == {None}


def test_shards_load_with_datasets_and_the_manifest_describes_them(tmp_path):
    out = tmp_path / "out"
    totals = generate(out, shard_rows=6, seed=4)
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        "README.md",
        *(f"labels-0000{i}.parquet" for i in range(3)),
        "manifest.jsonl",
    ]
    header, *shards, finished = log(out)
    assert [(s["kind"], s["shard"], s["first_row"], s["inputs"], s["rows"]) for s in shards] == [
        ("shard", 0, 0, 3, 6), ("shard", 1, 3, 3, 6), ("shard", 2, 6, 2, 4)
    ]  # fmt: skip
    for shard in shards:
        assert hashlib.sha256((out / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    assert finished["rows"] == totals["rows"] == 16
    assert finished["status"] == {"ok": 16, "skipped": 0, "failed": 0}
    rows = load_pseudolabels(out).to_list()
    assert finished["tokens"] == sum(len(row["token_ids"]) for row in rows)
    assert header["settings"]["strategy"] == "greedy"
    assert [name for name, _, _ in header["settings"]["templates"]] == TEMPLATES
    assert {"rlkd", "torch", "transformers"} <= set(header["packages"])
    assert {row["generation"] for row in rows} == {header["generation"]}
    shard = pq.ParquetFile(out / "labels-00000.parquet")
    assert shard.metadata.row_group(0).column(0).compression == "ZSTD"
    # The data card's YAML leads datasets to the shards.
    loaded = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == rows


def log(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"strategy": "topk"}, "strategy = 'topk': allowed are 'greedy', 'beam', 'sample'"),
        ({"labels_per_input": 2}, "labels_per_input = 2 with strategy = 'greedy'"),
        ({"strategy": "sample", "labels_per_input": 0}, "labels_per_input = 0"),
        ({"strategy": "beam", "num_beams": 2, "labels_per_input": 3}, "num_beams = 2 with labels_per_input = 3"),
        ({"strategy": "beam", "num_beams": 1}, "num_beams = 1"),
        ({"temperature": 0.5}, "temperature = 0.5 with strategy = 'greedy'"),
        ({"strategy": "sample", "temperature": 0.0}, "temperature = 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
    ],
)
def test_contradicting_settings(tmp_path, settings, wanted):
    with pytest.raises(ConfigError) as error:
        generate(tmp_path / "out", **settings)
    assert wanted in str(error.value)
    assert not (tmp_path / "out").exists()


def test_no_examples(tmp_path):
    with pytest.raises(DataError, match="no examples to label"):
        generate(tmp_path, examples=[])


@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam"])
def test_nan_logits_stop_the_run_and_write_nothing(tmp_path, strategy):
    teacher = tiny_teacher("t5-untied")
    with torch.no_grad():
        teacher.lm.model.lm_head.weight[5, 0] = math.nan
    with pytest.raises(DivergenceError, match=r"not finite for .*r\d"):
        generate(tmp_path, teacher, strategy=strategy)
    assert not list(tmp_path.glob("*.parquet"))
    batch = [json.loads(line) for line in (tmp_path / "not_finite.jsonl").read_text().splitlines()]
    texts = {(e.id, name): text for e in EXAMPLES for name, text in zip(TEMPLATES, e.teacher_inputs, strict=True)}
    assert batch
    assert not all(row["finite"] for row in batch)
    for row in batch:
        assert row["teacher_input"] == texts[row["id"], row["template"]]
        assert row["token_ids"] == teacher.tokenizer(row["teacher_input"])["input_ids"]


def test_progress_is_logged_where_there_is_no_terminal(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="rlkd"):
        generate(tmp_path)
    assert [r.message.split("  ")[0] for r in caplog.records] == ["labels 16/16"]
    assert "rows/s" in caplog.text
    assert "tokens/s" in caplog.text


def test_decoder_start_and_pad_are_one_token_in_t5():
    """The reason why answers are cut by length and never by `ids != pad`."""
    assert tiny_teacher("t5").lm.start_id == PAD
