"""Labels of decoder-only teachers by the command, against transformers' own forward over prompt and answer."""

import json

import numpy as np
import pytest
import torch
from models.decoder_families import continuing_tokenizer, tiny_decoder
from transformers import GenerationConfig

from rlkd.cli.main import main
from rlkd.labels.store import load_pseudolabels
from tiny import save_pretrained

WORDS = ["<s>", "</s>", "<unk>", "a", "b", "c", "copy", ":", "yes", "no"]
VALID, EOS, NEW = len(WORDS), 1, 5
TEMPLATE = "templates: {x: {name: x, jinja: 'copy : {{ text }} ||| ', answer_choices: 'yes ||| no ||| a b'}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    model = tiny_decoder("gemma2", words=VALID, eos_token_id=EOS, final_logit_softcapping=3.0)
    save_pretrained(folder / "teacher", model, continuing_tokenizer(WORDS))
    texts = ["a b", "c", "a a c b a b", "b c"]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "t.yaml").write_text(TEMPLATE)
    return folder, model


def label(folder, out, *options):
    named = {"--teacher": "teacher", "--dataset": "rows.jsonl", "--templates": "t.yaml", "--out": out}
    command = ["generate-pseudolabels", "--input-column", "text", "--quiet", "--max-input-tokens", "16"]
    command += [part for option, name in named.items() for part in (option, str(folder / name))]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--max-new-tokens", str(NEW), *options])
    return load_pseudolabels(folder / out).to_list() if ended.value.code == 0 else ended.value.code


@torch.no_grad()
def table(model, row):
    """Log-probabilities [R, V] of what follows the prompt of a row."""
    ids = row["token_ids"]
    prompt = [0, *(WORDS.index(word) for word in row["teacher_input"].split())]
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1, :VALID]
    return prompt, logits.double().log_softmax(-1)


@pytest.mark.parametrize(
    "options",
    [
        ("--top-k-logprobs", "3"),
        ("--strategy", "beam", "--num-beams", "3", "--labels-per-input", "2"),
        ("--strategy", "sample", "--labels-per-input", "2", "--top-k-logprobs", "2"),
        ("--strategy", "rank"),
    ],
    ids=["greedy", "beam", "sample", "rank"],
)
def test_labels_have_the_log_probabilities_of_a_plain_forward(folder, options, request):
    folder, model = folder
    strategy = request.node.callspec.id
    rows = label(folder, strategy, *options)
    assert len(rows) == 4 * (2 if strategy in ("beam", "sample") else 1)
    for row in rows:
        prompt, log_p = table(model, row)
        assert row["sum_logprob"] == pytest.approx(float(log_p[range(len(log_p)), row["token_ids"]].sum()), abs=1e-4)
        assert row["n_in"] == len(prompt)
        if strategy == "greedy":
            assert row["token_ids"] == log_p.argmax(-1).tolist()
            np.testing.assert_allclose(row["top_logps"], log_p.topk(3).values, atol=1e-4)
        if strategy == "rank":
            sums = dict(zip(row["choices"], row["choice_logprobs"], strict=True))
            for choice, logprob in sums.items():
                ids = [*(WORDS.index(word) for word in choice.split()), EOS]
                _, log_p = table(model, row | {"token_ids": ids})
                assert logprob == pytest.approx(float(log_p[range(len(ids)), ids].sum()), abs=1e-4)
            assert row["label"] == max(sums, key=sums.get)
        else:
            assert (row["finish_reason"] == "eos") == (row["token_ids"][-1] == EOS)
    if strategy == "beam":
        settings = GenerationConfig(
            num_beams=3, num_return_sequences=2, max_new_tokens=NEW, do_sample=False, eos_token_id=EOS,
            pad_token_id=EOS, suppress_tokens=[*range(VALID, VALID + 4)],
        )  # fmt: skip
        prompt, _ = table(model, rows[0])
        found = model.generate(torch.tensor([prompt]), generation_config=settings)[:, len(prompt) :].tolist()
        want = [ids[: ids.index(EOS) + 1] if EOS in ids else ids for ids in found]
        assert [row["token_ids"] for row in rows[:2]] == want


def test_the_manifest_says_how_prompts_end_and_who_decoded(folder, capsys):
    folder, _ = folder
    label(folder, "said")
    header = json.loads((folder / "said" / "manifest.jsonl").read_text().splitlines()[0])
    assert header["settings"]["append_eos"] is False
    assert header["settings"]["engine"] == "torch"
    assert label(folder, "refused", "--engine", "ctranslate2") == 2
    assert (
        "it does not convert 'gemma2' models, only t5, mt5, umt5, bart, mbart, pegasus. Use --engine torch."
        in capsys.readouterr().err
    )
    assert label(folder, "refused", "--input-eos") == 2
    assert "append_eos = True: the answers of a decoder-only teacher" in capsys.readouterr().err
    assert not (folder / "refused").exists()
