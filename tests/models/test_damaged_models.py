"""Damaged and odd model folders: one line that names the model, the file and what to do, exit code 2, never a guess."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlkd import EncoderStudentArguments, EncoderTeacherArguments, LabelledDataArguments, TKDArguments
from rlkd.cli.main import main
from rlkd.errors import ModelError
from rlkd.jobs.encoder_setup import prepare_encoders
from rlkd.models import folders
from rlkd.models.encoders.representations import load_encoder, load_encoder_config
from rlkd.models.spec import ModelSpec
from rlkd.models.vocabulary import load_tokenizer
from tiny import classifier_tokenizer, save_pretrained, tiny_bart, tiny_classifier, tiny_t5

WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX, BIN = "model.safetensors.index.json", "pytorch_model.bin"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def write(file, content):
    def damage(folder):
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def remove(*files):
    def damage(folder):
        for file in files:
            (folder / file).unlink()

    return damage


def cut(file, size):
    return lambda folder: os.truncate(folder / file, size if size > 0 else (folder / file).stat().st_size + size)


def flip(file, place):
    def damage(folder):
        content = bytearray((folder / file).read_bytes())
        content[place] ^= 0x40
        (folder / file).write_bytes(content)

    return damage


def edit(file, **values):
    def damage(folder):
        known = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({k: v for k, v in (known | values).items() if v is not ...}))

    return damage


def tensors(change):
    def damage(folder):
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def pickled(folder, *, keep=False):
    torch.save(load_file(folder / WEIGHTS), folder / BIN)
    if not keep:
        (folder / WEIGHTS).unlink()


def shards(change):
    """The weights in two files and an index, then `change(folder, index)`."""

    def damage(folder):
        held = load_file(folder / WEIGHTS)
        names = sorted(held)
        parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
        for file, own in parts.items():
            save_file({name: held[name] for name in own}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
        (folder / WEIGHTS).unlink()
        changed = change(folder, index)
        (folder / INDEX).write_text(json.dumps(index if changed is None else changed))

    return damage


def first(held):
    return next(name for name in held if held[name].dim() == 2 and "shared" not in name and "embed" not in name)


def wrong_shape(held):
    held[first(held)] = torch.zeros(3, 5)


def not_finite(held):
    held[first(held)].view(-1)[0] = float("inf")


def unlinked(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("nowhere.safetensors")


def as_folder(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


# Damage -> what the message says, beside the model's name. Of language models and encoders alike.
COMMON = {
    "weights gone": (remove(WEIGHTS), f"has no weights: {WEIGHTS} is missing"),
    "weights empty": (write(WEIGHTS, ""), f"{WEIGHTS} is empty"),
    "weights of 3 bytes": (write(WEIGHTS, "abc"), f"{WEIGHTS} is cut off"),
    "weights of text": (write(WEIGHTS, "no weights at all, but text"), f"{WEIGHTS} is cut off"),
    "weights a web page": (write(WEIGHTS, "<html>404</html>" * 99), f"{WEIGHTS} is cut off"),
    "weights a pointer": (write(WEIGHTS, POINTER), f"{WEIGHTS} is a pointer of Git LFS"),
    "weights pickled under that name": (
        lambda folder: torch.save({"a": torch.ones(1)}, folder / WEIGHTS),
        f"{WEIGHTS} is a pickle under the name",
    ),
    "weights cut in the header": (cut(WEIGHTS, 100), f"{WEIGHTS} is cut off"),
    "weights cut in the middle": (cut(WEIGHTS, -3000), f"{WEIGHTS} has "),
    "weights cut by a byte": (cut(WEIGHTS, -1), f"{WEIGHTS} has "),
    "weights with bytes behind": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"tail"),
        f"{WEIGHTS} has ",
    ),
    "length of the header flipped": (flip(WEIGHTS, 5), f"{WEIGHTS} is cut off"),
    "header flipped": (flip(WEIGHTS, 8), f"{WEIGHTS} has a damaged header"),
    "no tensors": (tensors(dict.clear), f"{WEIGHTS} holds no weights"),
    "a link to nothing": (unlinked, f"{WEIGHTS} cannot be read"),
    "a folder for weights": (as_folder, f"{WEIGHTS} cannot be read"),
    "a weight missing": (tensors(lambda held: held.pop(first(held))), "which would stay random"),
    "half of the weights missing": (
        tensors(lambda held: [held.pop(name) for name in list(held)[::2]]),
        "which would stay random",
    ),
    "a weight of another shape": (tensors(wrong_shape), "[3, 5] in the file"),
    "a weight not finite": (tensors(not_finite), "not finite"),
    "pickled": (pickled, f"only as pickles ({BIN})"),
    "only another format": (
        lambda folder: (folder / WEIGHTS).rename(folder / "tf_model.h5"),
        "It has tf_model.h5, which is not read",
    ),
    "a shard missing": (shards(lambda folder, index: os.remove(folder / "b.safetensors")), "b.safetensors is missing"),
    "a shard cut off": (shards(lambda folder, index: os.truncate(folder / "b.safetensors", 50)), "b.safetensors is"),
    "a shard empty": (shards(lambda folder, index: os.truncate(folder / "a.safetensors", 0)), "a.safetensors is empty"),
    "a shard twice": (
        shards(lambda folder, index: shutil.copy(folder / "a.safetensors", folder / "b.safetensors") and None),
        "b.safetensors lacks",
    ),
    "an index without a map": (shards(lambda folder, index: {"metadata": {}}), f"{INDEX} has no weight_map"),
    "an index of a list": (shards(lambda folder, index: []), f"{INDEX} holds a list"),
    "an index that leads out": (
        shards(lambda folder, index: {"weight_map": dict.fromkeys(index["weight_map"], "../x.safetensors")}),
        "names '../x.safetensors'",
    ),
    "an index cut off": (
        lambda folder: (shards(lambda f, i: None)(folder), os.truncate(folder / INDEX, 40)),
        f"{INDEX} is cut off",
    ),
    "no config": (remove(CONFIG), "is a folder without config.json"),
    "config empty": (write(CONFIG, ""), f"{CONFIG} is empty"),
    "config cut off": (cut(CONFIG, 60), f"{CONFIG} is cut off"),
    "config a list": (write(CONFIG, "[1]"), f"{CONFIG} holds a list"),
    "config in UTF-16": (
        lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text(), "utf-16"),
        f"{CONFIG} ",
    ),
    "config of bytes": (write(CONFIG, b"\xff\xfe\x00\x81" * 9), f"{CONFIG} is cut off or no JSON"),
    "config without a model type": (edit(CONFIG, model_type=..., architectures=...), CONFIG),
    "config of an unknown type": (edit(CONFIG, model_type="nonsense"), CONFIG),
    "config with a word for a number": (edit(CONFIG, vocab_size="many"), ""),
    "tokenizer gone": (remove("tokenizer.json", "tokenizer_config.json"), "has no tokenizer: tokenizer.json is"),
    "tokenizer empty": (write("tokenizer.json", ""), "tokenizer.json is empty"),
    "tokenizer cut off": (cut("tokenizer.json", -20), "tokenizer.json is cut off"),
    "tokenizer a pointer": (write("tokenizer.json", POINTER), "tokenizer.json is a pointer"),
    "tokenizer of another kind of JSON": (write("tokenizer.json", "{}"), "its tokenizer cannot be loaded"),
    "tokenizer's config cut off": (cut("tokenizer_config.json", 30), "tokenizer_config.json is cut off"),
    "tokenizer without a vocabulary": (
        edit("tokenizer.json", model={"type": "WordLevel", "vocab": {}, "unk_token": "<unk>"}),
        "special tokens only",
    ),
    "config with numbers for names": (edit(CONFIG, architectures=[3]), "no names of classes"),
    "config that is a folder": (
        lambda folder: ((folder / CONFIG).unlink(), (folder / CONFIG).mkdir()),
        f"{CONFIG} cannot be read: Is a directory",
    ),
    "config too deep": (write(CONFIG, "[" * 100_000), f"{CONFIG} is cut off or no JSON"),
    "config of an unknown precision": (edit(CONFIG, dtype="float99"), f"{CONFIG} cannot be loaded"),
    "config with code of its own": (
        edit(CONFIG, model_type="mine", auto_map={"AutoConfig": "code.Config"}),
        "code of its own, which rlkd never runs",
    ),
    "special tokens damaged": (write("special_tokens_map.json", "{"), "special_tokens_map.json is cut off"),
}  # fmt: skip
LANGUAGE = {
    "generation config cut off": (cut("generation_config.json", 12), "generation_config.json is cut off"),
    "generation config empty": (write("generation_config.json", ""), "generation_config.json is empty"),
    "config of a wider model": (edit(CONFIG, d_model=32), "weights have other shapes"),
    "config of a deeper model": (edit(CONFIG, num_layers=3), "which would stay random"),
    "config of a shallower model": (edit(CONFIG, num_layers=1, num_decoder_layers=1), "fewer layers than the weights"),
    "config of a smaller vocabulary": (edit(CONFIG, vocab_size=4), "do not match"),
    "config of a larger vocabulary": (edit(CONFIG, vocab_size=999), "weights have other shapes"),
    "config without layers": (edit(CONFIG, num_layers=0, num_decoder_layers=0), "fewer layers than the weights"),
    "config with heads that do not fit": (edit(CONFIG, num_heads=3), "weights have other shapes"),
    "config of another family": (
        lambda folder: tiny_bart().config.save_pretrained(folder),
        "which would stay random",
    ),
    "config of a classifier": (
        lambda folder: tiny_classifier().config.save_pretrained(folder),
        "has model_type 'bert', an encoder",
    ),
}
ENCODERS = {
    "config of a deeper model": (edit(CONFIG, num_hidden_layers=5), "which would stay random"),
    "config of a shallower model": (edit(CONFIG, num_hidden_layers=2), "fewer layers than the weights"),
    "config of a wider model": (edit(CONFIG, hidden_size=32), "weights have other shapes"),
    "config of an encoder-decoder": (lambda folder: tiny_t5().config.save_pretrained(folder), "not an encoder-only"),
    "config with heads that do not divide": (edit(CONFIG, num_attention_heads=3), "the model cannot be loaded"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    save_pretrained(folder / "language", tiny_t5(tied=False))
    save_pretrained(folder / "encoder", tiny_classifier(), classifier_tokenizer())
    return folder


def read_language_model(folder):
    return ModelSpec(str(folder), "teacher").language_model()


def read_encoder(folder):
    config = load_encoder_config(str(folder))
    return load_tokenizer(str(folder), "model"), load_encoder(str(folder), config)


def refused(read, folder):
    with pytest.raises(ModelError) as error:
        read(folder)
    message = str(error.value)
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 700
    return message


@pytest.mark.parametrize("name", COMMON | LANGUAGE)
def test_a_damaged_language_model(tmp_path, whole, name):
    damage, expected = (COMMON | LANGUAGE)[name]
    damage(Path(shutil.copytree(whole / "language", tmp_path / "model")))
    assert expected in refused(read_language_model, tmp_path / "model")


@pytest.mark.parametrize("name", COMMON | ENCODERS)
def test_a_damaged_encoder(tmp_path, whole, name):
    damage, expected = (COMMON | ENCODERS)[name]
    damage(Path(shutil.copytree(whole / "encoder", tmp_path / "model")))
    assert expected in refused(read_encoder, tmp_path / "model")


def test_whole_models_load(tmp_path, whole):
    """Those that the damages above begin with, in one file, in shards, and pickled on request."""
    read_language_model(whole / "language")
    read_encoder(whole / "encoder")
    for kind, change in (("shards", shards(lambda folder, index: None)), ("pickled", pickled)):
        folder = Path(shutil.copytree(whole / "language", tmp_path / kind))
        change(folder)
        loaded = ModelSpec(str(folder), "student", allow_bin=True).load().state_dict()
        assert all(torch.equal(loaded[key], weight) for key, weight in tiny_t5(tied=False).state_dict().items())
    # Safetensors are preferred, whatever lies beside them.
    both = Path(shutil.copytree(whole / "language", tmp_path / "both"))
    (both / BIN).write_bytes(b"anything")
    read_language_model(both)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nothing", "there is no such folder"),
        ("link", "is a link to elsewhere, which does not exist"),
        ("model/config.json", "is a file: give the folder of a saved transformers model"),
    ],
)
def test_names_that_are_no_folders(tmp_path, whole, place, message):
    shutil.copytree(whole / "language", tmp_path / "model")
    (tmp_path / "link").symlink_to("elsewhere")
    assert message in refused(read_language_model, tmp_path / place)
    assert message in refused(read_encoder, tmp_path / place)


def test_a_folder_that_may_not_be_read(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(folders.os, "access", lambda path, mode: False)
    assert "you have no permission" in refused(read_language_model, whole / "language")


def test_files_that_may_not_be_read(tmp_path, whole, monkeypatch):
    def forbidden(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("open", "read_bytes"):
        monkeypatch.setattr(folders.Path, name, forbidden)
        assert "cannot be read: Permission denied" in refused(read_language_model, whole / "language")


def test_pickles_on_request_may_be_damaged_too(tmp_path, whole):
    for content, message in ((b"", f"{BIN} is empty"), (b"text", f"{BIN} is no file of torch"), (b"PK" * 90, "loaded")):
        folder = Path(shutil.copytree(whole / "language", tmp_path / f"model-{len(content)}"))
        (folder / WEIGHTS).unlink()
        (folder / BIN).write_bytes(content)

        def read(folder):
            return ModelSpec(str(folder), "teacher", allow_bin=True).language_model()

        assert message in refused(read, folder)
    index = Path(shutil.copytree(whole / "language", tmp_path / "index"))
    (index / WEIGHTS).unlink()
    (index / f"{BIN}.index.json").write_text(json.dumps({"weight_map": {"a": "b.bin"}}))
    assert "b.bin is missing" in refused(read, index)


def test_pickles_never_run_code(tmp_path, whole):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = Path(shutil.copytree(whole / "language", tmp_path / "model"))
    (folder / WEIGHTS).unlink()
    torch.save({"shared.weight": Payload()}, folder / BIN)
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        ModelSpec(str(folder), "teacher", allow_bin=True).load()
    assert not (tmp_path / "ran").exists()


TKD = {
    "a weight of a layer missing": (
        {},
        tensors(lambda held: held.pop("bert.encoder.layer.1.output.dense.weight")),
        "random",
    ),
    "a head missing": ({}, tensors(lambda held: held.pop("classifier.weight")), None),
    "a head of another task": ({}, edit(CONFIG, id2label={"0": "a", "1": "b", "2": "c"}), None),
    "a fine-tuned head missing": (
        {"teacher_finetuned": True},
        tensors(lambda held: held.pop("classifier.weight")),
        "which would stay random: classifier.weight",
    ),
    "cut off": ({}, cut(WEIGHTS, -1), f"{WEIGHTS} has "),
    "pickled": ({}, pickled, "only as pickles"),
    "pickled, on request": ({"allow_bin": True}, pickled, None),
}


@pytest.mark.parametrize("name", TKD)
def test_a_damaged_teacher_of_a_classifier(tmp_path, whole, name):
    """Only the head of a model that is fine-tuned for another task may be new."""
    options, damage, message = TKD[name]
    folder = Path(shutil.copytree(whole / "encoder", tmp_path / "model"))
    damage(folder)
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "a,LABEL_0\nb,LABEL_1\n" * 3)
    data = LabelledDataArguments(train_file=str(rows), dev_file=str(rows), text_column="text", label_column="label")
    training = TKDArguments(str(tmp_path / "run"), use_cpu=True, max_length=16)

    def read(folder):
        teacher = EncoderTeacherArguments(str(folder), **options)
        setup = prepare_encoders(data, teacher, EncoderStudentArguments(student_layers=2), training)
        return setup.load_teacher(str(folder))

    if message is None:
        assert read(folder).config.num_labels == 2
    else:
        assert message in refused(read, folder)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["weights cut in the middle", "no config", "pickled", "tokenizer cut off"])
def test_every_command_ends_in_one_line_and_code_2(tmp_path, whole, damage, capsys):
    """Labels, rewards, probes, ONNX and merging read the same checks."""
    language, encoder = (Path(shutil.copytree(whole / kind, tmp_path / kind)) for kind in ("language", "encoder"))
    for folder in (language, encoder):
        COMMON[damage][0](folder)
    lines = [json.dumps({"text": f"{word} b", "label": label}) for word, label in 20 * [("a", "x"), ("c", "y")]]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rows, out = str(tmp_path / "rows.jsonl"), tmp_path / "out"
    inputs = ["--dataset", rows, "--input-column", "text"]
    commands = {
        language: [
            ["generate-pseudolabels", "--teacher", language, *inputs, "--out", out],
            ["generate-pseudolabels", "--teacher", language, *inputs, "--out", out, "--engine", "ctranslate2"],
            ["inspect-rewards", "--teacher", whole / "language", "--student", language, *inputs],
        ],
        encoder: [
            ["probe", encoder, "--train", rows, "--test", rows, "--max-length", "16"],
            ["export-onnx", encoder, out],
        ],
    }
    for folder, own in commands.items():
        for command in own:
            with pytest.raises(SystemExit) as end:
                main([str(part) for part in command])
            said = [line for line in capsys.readouterr().err.splitlines() if str(folder) in line]
            assert (end.value.code, len(said)) == (2, 1)
            assert COMMON[damage][1] in said[0]
    assert not out.exists()


@pytest.mark.parametrize("length", [0x180, int.from_bytes(b"PK", "little")])
def test_a_whole_file_whose_header_begins_as_a_pickle_does_is_read(tmp_path, length):
    """One length in 32 has that first byte."""
    for n in range(length - 150, length):
        save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"note": "x" * n})
        if int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") == length:
            break
    assert (tmp_path / "model.safetensors").read_bytes()[:2] in (b"\x80\x01", b"PK")
    assert set(folders._header(tmp_path / "model.safetensors")) == {"w"}
