"""Recorded token ids are used by the tokenizer that they belong to, and by no other."""

import json
import logging
import shutil

import datasets
import pytest
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import stub
from rlkd.errors import DataError
from rlkd.inspection.labels import from_labels
from rlkd.labels.maintenance import merge
from rlkd.labels.manifest import Manifest
from rlkd.labels.store import load_pseudolabels
from rlkd.models.vocabulary import vocabulary_record
from rlkd.trainers.arguments import SupervisedArguments
from rlkd.trainers.supervised import SupervisedTrainer
from tiny import WORDS, tiny_t5, tiny_teacher, tiny_tokenizer

LETTERS = [word for word in WORDS if len(word) == 1]


def other_order():
    head, rest = WORDS[:3], WORDS[3:]
    return tiny_tokenizer(head + rest[::-1])


def more_tokens():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<sep>"])
    return tokenizer


def fewer_tokens():
    """Half of the ids that the labels use do not exist."""
    return tiny_tokenizer(WORDS[:10])


def other_end():
    """The same tokens, but another one ends an answer, as in a model and its chat version."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<pad>"
    return tokenizer


def from_bytes():
    """A vocabulary of another kind, with a start token as BART has it."""
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing

    words = ["<pad>", "<s>", "</s>", "<unk>", *sorted(ByteLevel.alphabet())]
    backend = Tokenizer(BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


OTHERS = {f.__name__: f for f in (other_order, more_tokens, fewer_tokens, other_end, from_bytes)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Labels of the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("labels")
    stub.label(stub.write_rows(folder / "rows.jsonl", 24), folder / "out", templates=())
    return folder / "out"


def forgotten(folder, tmp_path):
    """The folder as an older version wrote it: its header has no vocabulary."""
    out = tmp_path / "old"
    shutil.copytree(folder, out)
    manifest = Manifest.read(out / "manifest.jsonl")
    del manifest.headers[0]["vocabulary"]
    manifest.rewrite()
    return out


def answers(rows, tokenizer, tmp_path) -> list[list[int]]:
    """The token ids that a student with this tokenizer learns."""
    args = SupervisedArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none", max_new_tokens=20)
    trainer = SupervisedTrainer(
        tiny_t5(vocab=300), args, tokenizer=tokenizer, train_dataset=rows
    )  # fmt: skip
    batch = trainer.data_collator([rows[i] for i in range(len(rows))])
    return [ids[mask].tolist() for ids, mask in zip(batch["answer_ids"], batch["answer_mask"], strict=True)]


def test_the_same_vocabulary_in_another_class_keeps_the_exact_tokens(folder, tmp_path, caplog):
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    rows = load_pseudolabels(folder)
    for tokenizer in (tiny_tokenizer(), again, PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")):
        assert vocabulary_record(tokenizer) == vocabulary_record(tiny_tokenizer())
        assert answers(rows, tokenizer, tmp_path) == rows["token_ids"][:]
    assert "tokenised anew" not in caplog.text


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("recorded", [True, False])
def test_another_vocabulary_learns_the_text(folder, tmp_path, caplog, other, recorded):
    tokenizer = OTHERS[other]()
    rows = load_pseudolabels(folder if recorded else forgotten(folder, tmp_path))
    with caplog.at_level(logging.WARNING):
        learned = answers(rows, tokenizer, tmp_path)
    # What the recorded ids mean to an older folder's reader is all there is to go by: more tokens do not change it.
    if (other, recorded) == ("more_tokens", False):
        assert learned == rows["token_ids"][:]
        assert "tokenised anew" not in caplog.text
        return
    assert learned == [tokenizer(text)["input_ids"] for text in rows["label"]]
    assert f"{len(rows)} of {len(rows)} labels" in caplog.text
    assert "their texts are tokenised anew with the student's tokenizer" in caplog.text
    why = "is not this one" if recorded else "no vocabulary is recorded, and their token ids do not give their texts"
    assert why in caplog.text


@pytest.mark.parametrize("how", ["folder", "select", "shuffle", "load_dataset", "list"])
def test_however_the_rows_travel(folder, tmp_path, caplog, how):
    rows = load_pseudolabels(folder)
    rows = {
        "folder": lambda: rows,
        "select": lambda: rows.select(range(9)),
        "shuffle": lambda: rows.shuffle(seed=1),
        "load_dataset": lambda: datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache")),
        "list": rows.to_list,
    }[how]()
    tokenizer = other_order()
    texts = [row["label"] for row in rows]
    assert answers(rows, tokenizer, tmp_path) == [tokenizer(text)["input_ids"] for text in texts]
    assert "tokenised anew" in caplog.text


def test_an_answer_that_was_cut_learns_no_end(folder, tmp_path):
    rows = [row | {"finish_reason": "length"} for row in load_pseudolabels(folder).to_list()]
    for row in rows:
        row["token_ids"] = row["token_ids"][:-1]
    tokenizer = other_order()
    assert answers(rows, tokenizer, tmp_path) == [tokenizer(row["label"])["input_ids"][:-1] for row in rows]
    # So does a text that is longer than max_new_tokens.
    long = [{"student_input": "a", "label": " ".join(["b"] * 30)}]
    assert answers(long, tokenizer, tmp_path) == [tokenizer("b")["input_ids"][:1] * 20]


def test_labels_of_two_tokenizers_in_one_data_set(folder, tmp_path, caplog):
    """Joined in Python: each label is learned as its own teacher's record says."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    log = Manifest.read(other / "manifest.jsonl")
    log.headers[0]["vocabulary"] = vocabulary_record(other_order())
    log.rewrite()
    mine = load_pseudolabels(folder).remove_columns("generation").add_column("generation", ["mine"] * 48)
    mine.info.description = mine.info.description.replace(log.header["generation"], "mine")
    both = datasets.concatenate_datasets([mine, load_pseudolabels(other)])
    learned = answers(both, other_order(), tmp_path)
    assert learned[:48] == [other_order()(text)["input_ids"] for text in mine["label"]]
    assert learned[48:] == both["token_ids"][48:]
    assert "48 of 96 labels (generation mine)" in caplog.text


@pytest.mark.parametrize("recorded", [True, False])
def test_views_of_labels_refuse_another_vocabulary(folder, tmp_path, recorded):
    out = folder if recorded else forgotten(folder, tmp_path)
    assert len(from_labels(out, tiny_tokenizer(), teacher=tiny_teacher(), limit=3)) == 3
    for teacher in (None, tiny_teacher()):
        with pytest.raises(
            DataError, match=r"labels: .* but '.*' is to read their token ids\. Name the model"
        ) as error:
            from_labels(out, other_order(), teacher=teacher)
        assert "\n" not in str(error.value)


def test_a_run_continued_with_another_tokenizer(folder, tmp_path, monkeypatch, caplog):
    """Refused, unless it is allowed; then each label has the tokens of its own."""
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    log = out / "manifest.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-2]))
    monkeypatch.setattr(stub, "tiny_tokenizer", other_order)
    source = folder.parent / "rows.jsonl"
    with pytest.raises(DataError, match=r"tokenizer: '\w+' -> '\w+'"):
        stub.label(source, out, templates=())
    stub.label(source, out, templates=(), allow_config_change=True)
    rows = load_pseudolabels(out)
    new = [i for i, row in enumerate(rows["row"]) if row >= 16]
    learned = answers(rows, other_order(), tmp_path)
    assert [learned[i] for i in new] == [rows["token_ids"][i] for i in new]
    old = [i for i in range(len(rows)) if i not in new]
    assert [learned[i] for i in old] == [other_order()(rows["label"][i])["input_ids"] for i in old]
    assert f"{len(old)} of {len(rows)} labels" in caplog.text


def test_parts_of_two_tokenizers_are_not_merged(folder, tmp_path, monkeypatch):
    source = folder.parent / "rows.jsonl"
    stub.label(source, tmp_path / "0", part=(0, 2))
    monkeypatch.setattr(stub, "tiny_tokenizer", other_order)
    stub.label(source, tmp_path / "1", part=(1, 2))
    with pytest.raises(DataError, match=r"different settings from .*\n  tokenizer: '\w+' -> '\w+'"):
        merge(tmp_path / "out", [tmp_path / "0", tmp_path / "1"])


def test_the_header_records_the_vocabulary(folder):
    header = json.loads((folder / "manifest.jsonl").read_text().splitlines()[0])
    assert header["vocabulary"] == {"tokens": len(WORDS), "eos": 1, "sha256": header["vocabulary"]["sha256"]}
    # Independent of the order in which a tokenizer lists its tokens, and of nothing else.
    assert header["vocabulary"] == vocabulary_record(tiny_tokenizer())
    assert header["vocabulary"] != vocabulary_record(other_order())
