"""`rlkd export`: CTranslate2 answers as transformers' own generate does; what it cannot keep to is refused."""

import json
import re

import pytest
import torch

pytest.importorskip("ctranslate2")

from models.chat_templates import chat_model, chat_tokenizer
from models.decoder_families import VALID as DECODER_VALID
from models.decoder_families import continuing_tokenizer, tiny_decoder
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from rlkd.cli.main import main
from rlkd.errors import ConfigError, DataError, ModelError
from rlkd.jobs.export import export
from rlkd.models import conversion, loading
from rlkd.models.chat import with_chat
from rlkd.models.conversion import GENERATORS, TRANSLATORS
from rlkd.sampling import exported
from rlkd.sampling.exported import equal_shares, token_names
from tiny import (
    EOS,
    PADDED_VOCAB,
    VALID,
    WORDS,
    classifier_tokenizer,
    save_pretrained,
    tiny_bart,
    tiny_classifier,
    tiny_t5,
    tiny_tokenizer,
)  # fmt: skip

TEXTS = [" ".join(WORDS[3 + (7 * i + j * j) % 23] for j in range(1 + i % 7)) for i in range(12)]
NEW = 6
PLAIN = dict.fromkeys(
    ("dataset", "input_column", "student_template", "teacher", "templates", "max_input_tokens", "max_new_tokens")
)
DEFAULTS = {
    **PLAIN, "quantization": "float32", "split": "train", "limit": 200, "teacher_dtype": "float32", "allow_bin": False
}  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    """A file with TEXTS, as the options that name it."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return {"dataset": str(path), "input_column": "text", "max_input_tokens": 16, "max_new_tokens": NEW}


def request(model, **options):
    return {**DEFAULTS, "model": str(model), **options}


def served(folder, texts=TEXTS):
    """What the program of the card prints for `texts`."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    code = code.replace("path/to/this/folder", str(folder)).replace('["A text."]', repr(texts))
    printed = []
    exec(code, {"print": printed.append})
    return printed[0]


def generated(folder, texts=TEXTS, new=NEW):
    """What transformers alone answers, one text at a time, without the rows beyond the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    causal = not AutoConfig.from_pretrained(folder).is_encoder_decoder
    model = (AutoModelForCausalLM if causal else AutoModelForSeq2SeqLM).from_pretrained(folder).eval()
    config = GenerationConfig.from_pretrained(folder)
    banned = {*(config.suppress_tokens or ()), *range(len(tokenizer), model.config.vocab_size)}
    config.update(max_new_tokens=new, do_sample=False, suppress_tokens=sorted(banned), pad_token_id=0)
    answers = []
    for text in texts:
        ids = tokenizer([text], return_tensors="pt").input_ids
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)[0]
        answers.append(tokenizer.decode(out[ids.shape[1] :] if causal else out, skip_special_tokens=True))
    return answers


def t5(folder):
    return save_pretrained(folder, tiny_t5(tied=False, width=32, seed=7))


BART = {
    "vocab_size": PADDED_VOCAB, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
    "init_std": 0.3, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": EOS, "decoder_start_token_id": EOS,
    "forced_eos_token_id": None, "num_hidden_layers": 2,
}  # fmt: skip
T5 = {"vocab_size": PADDED_VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
      "decoder_start_token_id": 0}  # fmt: skip


def student(folder, family):
    """A tiny student of a family, with biases and norms that are not those of a fresh one."""
    if family in GENERATORS:
        options = {"sliding_window": None} if family == "mistral" else {"use_sliding_window": False}
        model = tiny_decoder(family, **(options if family in ("mistral", "qwen2") else {}))
        words = ["<pad>", "</s>", "<unk>", "<s>", *WORDS[3:]]
        words += [f"w{i}" for i in range(DECODER_VALID - len(words))]
        return save_pretrained(folder, model, continuing_tokenizer(words))
    torch.manual_seed(3)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **(T5 if "t5" in family else BART))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return save_pretrained(folder, model)


@pytest.mark.parametrize("family", [*TRANSLATORS, *GENERATORS])
def test_the_program_of_the_card_answers_as_generate_does(tmp_path, rows, family):
    folder, out = student(tmp_path / "student", family), tmp_path / "out"
    forms = export(request(folder, **rows), out)
    want = generated(folder)
    assert served(out) == want
    assert len(set(want)) > 1
    assert (forms[0].equal_answers, forms[0].equal_tokens) == (1.0, 1.0)


def test_forced_and_forbidden_tokens_and_a_second_end_are_kept(tmp_path, rows):
    model = tiny_bart(seed=2)
    free = save_pretrained(tmp_path / "free", model)
    model.generation_config.update(
        forced_bos_token_id=7, forced_eos_token_id=EOS, suppress_tokens=[9, 10, 11, 12], eos_token_id=[EOS, 5]
    )
    folder, out = save_pretrained(tmp_path / "student", model), tmp_path / "out"
    export(request(folder, **rows), out)
    want = generated(folder)
    assert served(out) == want != generated(free)
    assert "target_prefix=" in (out / "README.md").read_text()


def test_an_adapter_is_merged(tmp_path, rows):
    base, out = save_pretrained(tmp_path / "base", tiny_t5()), tmp_path / "out"
    model = get_peft_model(
        AutoModelForSeq2SeqLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q", "v", "wo"])
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_()
    model.save_pretrained(tmp_path / "adapter")
    export(request(tmp_path / "adapter", **rows), out)
    save_pretrained(tmp_path / "merged", model.merge_and_unload())
    assert served(out) == generated(tmp_path / "merged") != generated(base)


def test_int8_is_smaller_and_its_agreement_is_that_of_the_answers(tmp_path, rows):
    folder = save_pretrained(tmp_path / "student", tiny_t5(tied=False, width=64, seed=1))
    whole, small = (export(request(folder, quantization=q, **rows), tmp_path / q) for q in ("float32", "int8"))
    assert small[0].megabytes < whole[0].megabytes / 2
    # A float32 file is the weights, and its embedding is not there twice.
    assert whole[0].megabytes == pytest.approx(whole[1].megabytes, rel=0.05)
    pairs = list(zip(served(tmp_path / "int8"), generated(folder), strict=True))
    assert small[0].equal_answers == sum(a == b for a, b in pairs) / len(pairs) < 1
    record = json.loads((tmp_path / "int8" / "export.json").read_text())
    assert record["inputs"] == len(TEXTS)
    assert record["forms"][0]["equal_answers"] == small[0].equal_answers
    assert (
        f"| {small[0].equal_answers:.1%} | {small[0].equal_tokens:.1%} |" in (tmp_path / "int8/README.md").read_text()
    )


def test_a_run_is_compared_on_its_own_held_out_rows_as_it_was_trained(tmp_path, monkeypatch, capsys):
    from trainers.tiny_runs import examples, make

    trainer = make(
        "supervised", tmp_path / "run", max_steps=1, eval_examples=examples(5), max_new_tokens=3, max_input_tokens=4
    )
    trainer.run()
    teacher = t5(tmp_path / "teacher")
    main_(
        ["export", str(tmp_path / "run"), "--to", "ctranslate2", "--out", str(tmp_path / "out"), "--teacher", teacher]
    )
    shown = capsys.readouterr().out
    assert [name for name in ("CTranslate2 int8", "student, PyTorch", "teacher, PyTorch") if name not in shown] == []
    record = json.loads((tmp_path / "out/export.json").read_text())
    assert record["inputs"] == 5
    assert (record["settings"]["max_new_tokens"], record["settings"]["max_input_tokens"]) == (3, 4)
    assert all(form["tokens_per_second"] > 0 for form in record["forms"])


def main_(argv):
    with pytest.raises(SystemExit) as end:
        main(argv)
    return end.value.code


# -- what is refused -------------------------------------------------------------------------------------------------


def other(folder, kind):
    """A model that cannot be exported."""
    if kind == "classifier":
        return save_pretrained(folder, tiny_classifier(), classifier_tokenizer())
    if kind in ("gemma2", "window", "rope"):
        words = ["<pad>", "</s>", "<unk>", "<s>", *(f"w{i}" for i in range(DECODER_VALID - 4))]
        yarn = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
        options = {"gemma2": {}, "window": {}, "rope": {"rope_parameters": yarn}}[kind]
        family = {"gemma2": "gemma2", "window": "mistral", "rope": "llama"}[kind]
        return save_pretrained(folder, tiny_decoder(family, **options), continuing_tokenizer(words))
    model = tiny_t5()
    if kind == "moving":
        model.generation_config.no_repeat_ngram_size = 3
    return save_pretrained(folder, model)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("classifier", {}, "is a classifier. Use --to onnx."),
        ("gemma2", {}, "it does not convert 'gemma2' models, only t5, "),
        ("window", {}, "it does not compute attention in a sliding window"),
        ("rope", {}, "it does not compute positions of rope_type 'yarn', which the student has."),
        ("moving", {}, "under no_repeat_ngram_size (the student's generation_config)."),
        ("t5", {"templates": ["a"]}, "--templates are what --teacher reads"),
        ("t5", {"dataset": None}, "give both, or neither."),
        ("t5", {"dataset": None, "input_column": None}, "has no held_out.jsonl, as a run leaves it."),
    ],
)
def test_what_cannot_be_exported_is_refused_before_weights_load(tmp_path, rows, monkeypatch, kind, options, said):
    folder = other(tmp_path / "student", kind)
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=re.escape(said)):
        export(request(folder, **{**rows, **options}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_line_of_held_out_rows_is_named(tmp_path):
    folder = t5(tmp_path / "run")
    (tmp_path / "run/held_out.jsonl").write_text('{"input": "a b"}\n{"inp')
    with pytest.raises(DataError, match=r"held_out.jsonl:2: no row of a run with an input"):
        export(request(folder), tmp_path / "out")


def test_a_conversion_that_computes_otherwise_is_refused(tmp_path, rows, monkeypatch):
    folder = save_pretrained(tmp_path / "student", tiny_t5())

    def scaled(lm, names):
        spec = conversion.specification(lm, names)
        spec.decoder.scale_outputs = 0.5
        return spec

    monkeypatch.setattr(exported, "specification", scaled)
    with pytest.raises(ModelError, match=r"float32 form differs from PyTorch by .* nats .* Nothing was written"):
        export(request(folder, quantization="int8", **rows), tmp_path / "out")
    monkeypatch.setattr(exported, "specification", lambda *_: {}["missing"])
    with pytest.raises(ModelError, match=r"CTranslate2 cannot convert this 't5' model \(KeyError: 'missing'\)"):
        export(request(folder, **rows), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "student"]


def test_a_classifier_goes_to_onnx_as_it_did(tmp_path, monkeypatch, capsys):
    from rlkd.models.encoders import onnx_export

    seen = []
    monkeypatch.setattr(onnx_export, "export_onnx", lambda *given, **more: seen.append((given, more)) or "agrees")
    out = tmp_path / "out"
    assert main_(["export", "a/model", "--to", "onnx", "--out", str(out)]) == 0
    assert seen == [(("a/model", out), {"allow_bin": False})]
    assert f"{out / 'model.onnx'}: agrees" in capsys.readouterr().out
    assert main_(["export", "a/model", "--to", "onnx", "--out", str(out), "--limit", "3"]) == 2
    assert "--limit has no effect with --to onnx" in capsys.readouterr().err
    assert main_(["export", "a/model", "--to", "gguf", "--out", str(out)]) == 2


# -- parts -----------------------------------------------------------------------------------------------------------


def test_shares_of_answers_and_of_tokens():
    # 2 of 3 answers; of 3 + 2 + 0 places, 2 + 2 have the same token.
    assert equal_shares([[1, 2], [4, 5], []], [[1, 2, 3], [4, 5], []]) == (2 / 3, 4 / 5)
    assert equal_shares([[]], [[]]) == (1.0, 1.0)


def test_every_id_has_a_name_of_its_own():
    class Tokens:
        @staticmethod
        def convert_ids_to_tokens(ids):
            return [["a", "b", None, "a", "<id 5>", None][i] for i in ids]

    assert token_names(Tokens(), 4) == ["a", "b", "<id 2>", "<id 3>"]
    tokenizer = tiny_tokenizer()
    assert tokenizer.convert_tokens_to_ids(token_names(tokenizer, VALID)) == list(range(VALID))


def test_a_chat_template_is_read_as_in_training(tmp_path):
    tokenizer = with_chat(chat_tokenizer(), "Speak up.")
    source = save_pretrained(tmp_path / "student", chat_model(seed=3), tokenizer)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    rows = {"dataset": str(tmp_path / "rows.jsonl"), "input_column": "text", "max_input_tokens": 99}
    (form, *_) = export(request(source, max_new_tokens=NEW, **rows), tmp_path / "out")
    assert form.equal_answers == 1.0
    model, want = AutoModelForCausalLM.from_pretrained(source), []
    beyond = list(range(len(tokenizer), model.config.vocab_size))
    for text in TEXTS:
        turns = [{"role": "system", "content": "Speak up."}, {"role": "user", "content": text}]
        ids = chat_tokenizer().apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        made = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, suppress_tokens=beyond)
        want.append(tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))
    assert served(tmp_path / "out") == want
