"""`--engine openai`: the labels of the model in PyTorch, from a server, with the guarantees of every other engine."""

import json

import numpy as np
import pytest
import torch
import urllib3
from models.decoder_families import tiny_decoder
from trainers import tiny_runs
from typer.testing import CliRunner

import stub
from fake_server import FakeServer, running
from rlkd import Decoding, EngineSettings, Example, ModelSpec, TeacherSpec, generate_pseudolabels, load_pseudolabels
from rlkd.cli.main import app
from rlkd.errors import ConfigError, ModelError, ServerError
from rlkd.labels.options import RunOptions
from rlkd.models import loading
from rlkd.models.architectures import language_model
from rlkd.models.server import KEY, ServerSettings
from rlkd.models.spec import LoadedModel
from rlkd.sampling.engines.openai_engine import OpenAIEngine
from rlkd.sampling.engines.registry import choose_engine
from rlkd.sampling.engines.torch_engine import TorchEngine
from tiny import save_pretrained, tiny_t5, tiny_tokenizer

pytestmark = pytest.mark.enable_socket  # to this machine
WORDS, EOS = tiny_runs.WORDS, tiny_runs.EOS
TEXTS = ["a b", "c", "a a c", "b c a b"]
EXAMPLES = [Example(str(i), text, (f"copy : {text}",)) for i, text in enumerate(TEXTS)]
SAMPLES = Decoding("sample", 4, labels_per_input=2, temperature=0.7)


def model():
    return tiny_decoder("gpt2", seed=3, words=len(WORDS) - 4, eos_token_id=EOS)


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(urllib3.Retry, "sleep", lambda self, response=None: None)


@pytest.fixture
def served():
    with running(FakeServer(model(), tiny_tokenizer(WORDS))) as server:
        yield server


@pytest.fixture
def teacher(tmp_path):
    return TeacherSpec(ModelSpec(save_pretrained(tmp_path / "teacher", model(), tiny_tokenizer(WORDS)), "teacher"), 16)


def label(teacher, out, server=None, decoding=SAMPLES, **options):
    where = ServerSettings(server.url, concurrency=2, timeout=5.0) if server else None
    engine = EngineSettings("openai", server=where) if server else None
    generate_pseudolabels(
        teacher, EXAMPLES, out=out, template_names=["copy"], decoding=decoding, engine=engine,
        options=RunOptions(quiet=True, **options),
    )  # fmt: skip
    return load_pseudolabels(out).to_list()


def test_greedy_labels_are_those_of_the_model(served, teacher, tmp_path, monkeypatch):
    decoding = Decoding("greedy", 5, top_k_logprobs=3)
    ours = label(teacher, tmp_path / "torch", decoding=decoding)

    def refuse(*args, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_model", refuse)
    theirs = label(teacher, tmp_path / "server", served, decoding)
    assert len({row["n_out"] for row in ours}) > 1
    for one, other in zip(ours, theirs, strict=True):
        for name in ("token_ids", "label", "finish_reason", "top_ids", "n_in"):
            assert one[name] == other[name], name
        assert one["sum_logprob"] == pytest.approx(other["sum_logprob"], abs=1e-4)
        np.testing.assert_allclose(one["top_logps"], other["top_logps"], atol=1e-5)
    header = json.loads((tmp_path / "server" / "manifest.jsonl").read_text().splitlines()[0])
    settings = header["settings"]
    assert (settings["engine"], settings["server_model"]) == ("openai", "tiny")
    assert "agreement" not in header
    assert served.url not in (tmp_path / "server" / "manifest.jsonl").read_text()  # another port, the same labels


def test_samples_follow_the_seed_and_are_scored_at_temperature_1(served, teacher, tmp_path):
    rows = label(teacher, tmp_path / "one", served, batch_tokens=30)
    again = label(teacher, tmp_path / "two", served, batch_tokens=2000, seed=0)
    other = label(teacher, tmp_path / "three", served, seed=1)
    assert [row["token_ids"] for row in rows] == [row["token_ids"] for row in again]
    assert [row["token_ids"] for row in rows] != [row["token_ids"] for row in other]
    assert any(rows[i]["token_ids"] != rows[i + 1]["token_ids"] for i in range(0, len(rows), 2))
    lm = language_model(served.model, tiny_tokenizer(WORDS))
    prompts = [tiny_tokenizer(WORDS)(row["teacher_input"], add_special_tokens=False)["input_ids"] for row in rows]
    want = TorchEngine(lm).score(prompts, [row["token_ids"] for row in rows])
    assert [row["sum_logprob"] for row in rows] == pytest.approx([sum(row) for row in want], abs=1e-4)
    assert {body["temperature"] for _, body, _ in served.requests if body and "seed" in body} == {0.7}


def test_a_server_that_fails_costs_nothing_that_it_answered(served, teacher, tmp_path):
    """The run ends with what was answered, and the repeated command gives the undisturbed folder."""
    options = {"shard_rows": 8, "batch_tokens": 25}  # one shard, four batches of one prompt
    label(teacher, tmp_path / "straight", served, **options)

    def prompts():
        return [tuple(body["prompt"][0]) for _, body, _ in served.requests if body and "seed" in body]

    undisturbed = prompts()
    served.requests.clear()
    served.mishap = lambda path, body, number: (500, {}) if number >= 5 else None  # after the first batch
    with pytest.raises(ServerError, match=r"it fails \(500\): {}\. 0 labels are committed in .*, 2 more are saved"):
        label(teacher, tmp_path / "out", served, **options)
    assert stub.entries(tmp_path / "out")[-1]["kind"] == "partial"
    served.mishap = lambda path, body, number: None
    served.requests.clear()
    label(teacher, tmp_path / "out", served, **options)
    assert stub.shards(tmp_path / "out") == stub.shards(tmp_path / "straight")
    assert sorted(prompts()) == sorted(undisturbed[2:])


def test_what_it_refuses(served, teacher, tmp_path):
    where = ServerSettings(served.url)

    def choose(decoding, source=None, **options):
        return choose_engine(
            EngineSettings("openai", **{"server": where, **options}), source or teacher.model, decoding
        )

    for decoding in (None, Decoding("beam", 4, num_beams=2)):
        with pytest.raises(ConfigError, match=r"engine = 'openai': it decodes greedily and samples: it neither ranks"):
            choose(decoding)
    with pytest.raises(ConfigError, match=r"engine = 'openai': it takes the server's URL \(--server-url\)"):
        choose(SAMPLES, server=None)
    with pytest.raises(ConfigError, match=r"SGLang's samples do not follow a row's seed"):
        choose(SAMPLES, server=ServerSettings(served.url, api="sglang"))
    with pytest.raises(ConfigError, match=r"the server decides on the teacher's precision"):
        choose(SAMPLES, compute_type="int8")
    encoder_decoder = LoadedModel(language_model(tiny_t5(vocab=len(WORDS)), tiny_tokenizer(WORDS)))
    with pytest.raises(ConfigError, match=r"servers score prompt and answer as one sequence"):
        choose(SAMPLES, encoder_decoder)
    assert choose_engine(EngineSettings("auto", server=where), teacher.model, SAMPLES).name == "torch"
    served.most_logprobs = 2
    with pytest.raises(ModelError, match=r"refuses the request \(400\): .*more than 2 logprobs"):
        label(teacher, tmp_path / "out", served, Decoding("greedy", 3, top_k_logprobs=3))


def test_spare_rows_of_the_head_are_recorded(served):
    served.model = tiny_decoder("gpt2", seed=3, words=len(WORDS), eos_token_id=EOS)
    with torch.no_grad():
        served.model.transformer.wte.weight[len(WORDS) :] = 0  # never the most probable
    engine = OpenAIEngine(LoadedModel(language_model(served.model, tiny_tokenizer(WORDS))), ServerSettings(served.url))
    assert engine.identity()["normalised_over"] == "12 ids, 8 of them tokens"
    for prompt, answer in (([6, 7, 3], [4, EOS]), ([5], [3])):
        (got,) = engine.score([prompt], [answer])
        want = served.logps(prompt + answer)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
        assert got == pytest.approx(want.flatten().tolist(), abs=1e-5)


def test_the_command(served, teacher, tmp_path, monkeypatch):
    """From the command line: labels without weights, a key from the environment alone, 75 if the server is down."""
    served.key = "abc123-of-mine"
    monkeypatch.setenv(KEY, served.key)
    (tmp_path / "teacher" / "model.safetensors").unlink()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    base = ["generate-pseudolabels", "--teacher", str(tmp_path / "teacher"), "--dataset", str(rows), "--input-column",
            "text", "--out", str(tmp_path / "out"), "--max-new-tokens", "4", "--max-input-tokens", "16",
            "--quiet"]  # fmt: skip
    args = [*base, "--engine", "openai", "--server-url", served.url, "--server-concurrency", "2"]
    served.mishap = lambda path, body, number: (503, {}) if body else None
    broken = CliRunner().invoke(app, args)
    assert broken.exception.exit_code == 75
    served.mishap = lambda path, body, number: None
    assert CliRunner().invoke(app, args, catch_exceptions=False).exit_code == 0
    assert len(load_pseudolabels(tmp_path / "out")) == len(TEXTS)
    assert not any(served.key.encode() in path.read_bytes() for path in (tmp_path / "out").iterdir())
    with pytest.raises(ConfigError, match=r"^server_url is set, and engine is 'auto': set engine to openai"):
        CliRunner().invoke(app, [*base, "--overwrite", "--server-url", served.url], catch_exceptions=False)
