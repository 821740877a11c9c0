"""A teacher on a server: its scores against transformers' own forward, and everything that can go wrong."""

import json
import os
import time

import pytest
import torch
import urllib3
from models.decoder_families import tiny_decoder
from trainers import tiny_runs

from fake_server import FakeServer, running
from rlkd import DataArguments, ReinforceArguments, ReinforceTrainer, TeacherArguments, prepare
from rlkd.errors import ConfigError, DivergenceError, ModelError, ServerError
from rlkd.models import loading
from rlkd.models.architectures import language_model
from rlkd.models.generation import AnswerRules
from rlkd.models.other_tokenizer import OtherTokenizer, ServedOtherTokenizer
from rlkd.models.served import ServerTeacher
from rlkd.models.server import ATTEMPTS, KEY, Server, ServerSettings, layout
from rlkd.models.spec import ModelSpec, TeacherSpec
from rlkd.models.teacher import Teacher
from rlkd.objectives.rewards import induced_advantage
from rlkd.sampling.rollouts import greedy_writer
from rlkd.settings.trl_compat import ModelConfig
from rlkd.tensors import pad_rows
from tiny import save_pretrained, tiny_t5, tiny_tokenizer

pytestmark = pytest.mark.enable_socket  # to this machine
WORDS, EOS, VALID = tiny_runs.WORDS, tiny_runs.EOS, tiny_runs.VALID
INPUTS = [("copy : a b c",), ("copy : b",), ("c",)]
ANSWERS = [[3, 4, 5, EOS], [6], [7, 7, 3, 3, 2]]
IDS, MASK = pad_rows(ANSWERS, EOS)


def decoder(family="gpt2", *, spare=0, seed=0):
    """A tiny model of the words, with rows for `spare` ids beyond them."""
    return tiny_decoder(family, seed=seed, words=VALID - 4 + spare, eos_token_id=EOS)


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr(urllib3.Retry, "sleep", lambda self, response=None: None)


@pytest.fixture
def served():
    with running(FakeServer(decoder(), tiny_tokenizer(WORDS))) as server:
        yield server


def teacher(server, **options):
    settings = ServerSettings(server.url, **{"concurrency": 2, "timeout": 5.0, **options})
    tokenizer = tiny_tokenizer(WORDS)
    normalises = server.model.config.vocab_size == VALID
    rules = AnswerRules(eos_ids=(EOS,))
    return ServerTeacher("served", Server(settings, VALID, tokenizer), tokenizer, rules, 16, False, normalises)


def by_hand(model, texts, answers):
    """Log-softmax [R, rows of the head] at each token of each answer, one row at a time."""
    encode = tiny_tokenizer(WORDS)
    for (text,), answer in zip(texts, answers, strict=True):
        prompt = encode(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        yield logits[len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize(("family", "api"), [("gpt2", "vllm"), ("llama", "vllm"), ("gpt2", "sglang")])
def test_scores_are_those_of_the_model(family, api):
    """Of the own forward, of the local teacher, and of one row at a time."""
    model = decoder(family)
    with running(FakeServer(model, tiny_tokenizer(WORDS))) as server:
        ours = teacher(server, api=api)
        signal = ours.score(INPUTS, IDS, MASK)
        alone = [ours.score(INPUTS[i : i + 1], IDS[i : i + 1], MASK[i : i + 1]) for i in range(3)]
    for i, logps in enumerate(by_hand(model, INPUTS, ANSWERS)):
        n = len(ANSWERS[i])
        want = logps.gather(-1, torch.tensor(ANSWERS[i])[:, None]).squeeze(-1)
        torch.testing.assert_close(signal.chosen[i, :n], want, atol=1e-5, rtol=0)
        torch.testing.assert_close(signal.max[i, :n], logps.amax(-1), atol=1e-5, rtol=0)
        torch.testing.assert_close(alone[i].chosen[0, :n], want, atol=1e-5, rtol=0)
    assert not signal.chosen[~MASK].any()
    local = Teacher(language_model(model, tiny_tokenizer(WORDS)), tiny_tokenizer(WORDS), max_input_tokens=16)
    full = local.score(INPUTS, IDS, MASK)
    for name in ("max", "lse"):
        ours_, theirs = (induced_advantage(x, name) * MASK for x in (signal, full))
        torch.testing.assert_close(ours_, theirs, atol=1e-5, rtol=0)


def test_spare_rows_of_the_head_leave_the_regret_exact():
    """Servers count ids that are no tokens: the normaliser is then another one, the difference of two tokens is not."""
    model = decoder(spare=4)
    with running(FakeServer(model, tiny_tokenizer(WORDS))) as server:
        ours = teacher(server)
        assert ours.gives == {"chosen", "max"}
        with torch.no_grad():  # the best id is a token
            model.transformer.wte.weight[VALID:] *= 0.01
        signal = ours.score(INPUTS, IDS, MASK)
    assert signal.logsumexp is None
    local = Teacher(language_model(model, tiny_tokenizer(WORDS)), tiny_tokenizer(WORDS), max_input_tokens=16)
    regret = [induced_advantage(x, "max") * MASK for x in (signal, local.score(INPUTS, IDS, MASK))]
    torch.testing.assert_close(*regret, atol=1e-5, rtol=0)


def test_several_templates_are_averaged(served):
    ours, texts = teacher(served), [("copy : a", "a"), ("b", "copy : b c")]
    both = ours.score(texts, IDS[:2], MASK[:2])
    parts = [ours.score([(pair[k],) for pair in texts], IDS[:2], MASK[:2]) for k in (0, 1)]
    for name in ("chosen", "max", "logsumexp"):
        torch.testing.assert_close(getattr(both, name), sum(getattr(part, name) for part in parts) / 2)
    assert both.entropy is None


def test_prompts_are_sent_as_ids_with_every_sampling_setting(served):
    """What is left out, servers take from the model's generation_config."""
    teacher(served, concurrency=2).score(INPUTS, IDS, MASK)
    bodies = [body for _, body, _ in served.requests if body]
    sent = [tokens for body in bodies for tokens in body["prompt"]]
    assert sorted(sent) == sorted([[6, 7, 3, 4, 5, *ANSWERS[0]], [6, 7, 4, *ANSWERS[1]], [5, *ANSWERS[2]]])
    assert layout([6, 7], [4]) == ([6, 7, 4], slice(2, 3))
    assert len(bodies) == 2
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
                "presence_penalty": 0.0, "frequency_penalty": 0.0, "max_tokens": 1, "prompt_logprobs": 1}  # fmt: skip
    for body in bodies:
        assert body == {**settings, "model": "tiny", "prompt": body["prompt"]}


def test_no_more_requests_at_a_time_than_asked_for(served):
    active, most = [0], [0]

    def watch(path, body, number):
        active[0] += 1
        most[0] = max(most[0], active[0])
        time.sleep(0.05)
        active[0] -= 1

    served.mishap = watch
    ours = teacher(served, concurrency=2)
    ours.server.generate([[3]] * 6, AnswerRules(eos_ids=(EOS,)), 2, temperature=1.0, seeds=range(6))
    assert most[0] == 2
    assert len(served.requests) == 7  # one asked for the models


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_greedy_answers(served, api):
    ours = teacher(served, api=api).greedy([text for (text,) in INPUTS], 5)
    for (text,), answer in zip(INPUTS, ours, strict=True):
        ids = tiny_tokenizer(WORDS)(text, add_special_tokens=False)["input_ids"]
        for token in answer:
            with torch.no_grad():
                assert token == served.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)
        assert len(answer) == 5 or answer[-1] == EOS


# What can go wrong


def fails(server, error, match, *, question=None, **options):
    ours = teacher(server, **options)
    with pytest.raises(error, match=match) as raised:
        (question or (lambda: ours.score(INPUTS, IDS, MASK)))()
    assert len(str(raised.value).splitlines()) == 1


def test_a_server_that_stumbles_is_asked_again(served):
    want = teacher(served).score(INPUTS, IDS, MASK)
    served.requests.clear()
    served.mishap = lambda path, body, number: (503, {}) if number in (1, 2) else None
    got = teacher(served, concurrency=1).score(INPUTS, IDS, MASK)
    torch.testing.assert_close(got.chosen, want.chosen)
    assert len(served.requests) == 4


def test_a_server_that_is_down(served):
    url = served.url
    ours = Server(ServerSettings("http://127.0.0.1:9/v1", timeout=1.0), VALID)
    with pytest.raises(ServerError, match=r"^server http://127\.0\.0\.1:9/v1: it cannot be reached .*Is it running"):
        ours.score([[3]], [[4]])
    served.mishap = lambda path, body, number: (503, {"error": "no engine"})
    fails(served, ServerError, rf"^server {url}: it fails \(503\): .*no engine")
    assert len(served.requests) == ATTEMPTS
    served.mishap = lambda path, body, number: (500, {"error": "crashed"})
    fails(served, ServerError, r"it fails \(500\): .*crashed")
    served.mishap = lambda path, body, number: (302, b"elsewhere")
    fails(served, ModelError, r"it refuses the request \(302\): elsewhere")
    served.mishap = lambda path, body, number: (200, b"<html>")
    fails(served, ModelError, r"it does not answer in JSON: it takes a server with vLLM's API")
    served.mishap = lambda path, body, number: (200, {"data": "?"})
    fails(served, ModelError, r"no list of models or choices")


def test_a_server_that_is_slow(served):
    served.mishap = lambda path, body, number: time.sleep(0.5) if body else None
    started = time.monotonic()
    fails(served, ServerError, rf"no answer within 0\.1 s, in {ATTEMPTS} attempts: raise server_timeout", timeout=0.1)
    assert time.monotonic() - started < 3


def test_the_wrong_model(served):
    fails(served, ModelError, r"it does not serve 'other' \(server_model\): it serves tiny\.", model="other")
    served.models = [{"id": "one"}, {"id": "two"}]
    fails(served, ModelError, r"name one of its models \(server_model\): it serves one, two\.")
    served.mishap = lambda path, body, number: (404, {"error": {"message": "gone"}}) if body else None
    served.models = [{"id": "tiny"}]
    fails(served, ModelError, r"it refuses the request \(404\): .*gone")
    # Without a list of models a name is enough.
    served.mishap = lambda path, body, number: None if body else (404, {})
    fails(served, ModelError, r"it refuses the request \(404\)")
    assert teacher(served, model="tiny").score(INPUTS, IDS, MASK).chosen.any()
    fails(served, ModelError, r"The model `other` does not exist", model="other")


def test_the_key_comes_from_the_environment_and_is_nowhere_else(served, monkeypatch):
    served.key = "abc123-of-mine"
    fails(served, ConfigError, rf"it refuses the key \(401\): set {KEY} in the environment")
    monkeypatch.setenv(KEY, served.key)
    teacher(served).score(INPUTS, IDS, MASK)
    assert all(headers.get("Authorization") == f"Bearer {served.key}" for _, _, headers in served.requests[-2:])
    # A server that repeats it does not bring it into a message.
    served.mishap = lambda path, body, number: (400, {"error": f"bad {os.environ[KEY]}"}) if body else None
    ours = teacher(served)
    with pytest.raises(ModelError, match="refuses the request") as raised:
        ours.score(INPUTS, IDS, MASK)
    assert served.key not in str(raised.value)
    assert served.key not in repr(ours) + json.dumps(ours.identity())


@pytest.mark.parametrize("url", ["http://me:secret-of-mine@host/v1", "https://host/v1?key=secret-of-mine"])
def test_a_key_in_the_url_is_refused_and_not_shown(url):
    with pytest.raises(ConfigError, match=f"server_url: a key does not belong in it.*{KEY}") as raised:
        ServerSettings(url)
    assert "mine" not in str(raised.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://[bad", ""])
def test_what_is_no_url(url):
    with pytest.raises(ConfigError, match="must be a URL such as http://localhost:8000/v1"):
        ServerSettings(url)


def changed(server, change):
    """Every answer with log-probabilities, changed: change(choice)."""

    def mishap(path, body, number):
        if not body:
            return None
        status, answer = server.answer(path, body)
        for choice in answer["choices"]:
            change(choice)
        return status, answer

    server.mishap = mishap


def entries(choice):
    return choice["prompt_logprobs"][1:]


def test_answers_that_are_not_enough(served):
    changed(served, lambda choice: choice.pop("prompt_logprobs"))
    fails(served, ModelError, r"no prompt_logprobs in its answer: it takes a server with vLLM's API")
    changed(served, lambda choice: choice["prompt_logprobs"].pop(0))
    fails(served, ModelError, r"it read \d of \d tokens, so it cuts prompts: lower max_input_tokens")

    def chosen_only(choice):
        for entry in entries(choice):
            for name in [name for name, value in entry.items() if value["rank"] == 1 and len(entry) > 1]:
                del entry[name]

    changed(served, chosen_only)
    fails(served, ModelError, r"too few log-probabilities for a token, 1 of 1 .*--max-logprobs 1")

    def best_only(choice):
        for entry in entries(choice):
            for name in [name for name, value in entry.items() if value["rank"] > 1]:
                del entry[name]

    changed(served, best_only)
    fails(served, ModelError, r"no log-probability of token \d, which was sent")
    changed(served, lambda choice: [entry.update({"3": -0.5}) for entry in entries(choice)])
    fails(served, ModelError, r"an entry of its prompt_logprobs is \{.*: it takes a server with vLLM's API")
    served.mishap = lambda path, body, number: (200, {"choices": []}) if body else None
    fails(served, ModelError, r"0 answers to \d prompts\.")
    served.mishap = lambda path, body, number: None
    served.most_logprobs = 0
    fails(served, ModelError, r"it refuses the request \(400\): .*more than 0 logprobs")


def test_answers_of_sglang_that_are_not_enough(served):
    served.mishap = lambda path, body, number: (200, [{"text": "a"}] * 3) if body else None
    fails(served, ModelError, r"its answer is \[\{'text': .*: it takes a server with SGLang's API", api="sglang")
    served.mishap = lambda path, body, number: (200, [{"meta_info": {}}] * len(body["input_ids"])) if body else None
    fails(served, ModelError, r"no prompt_logprobs in its answer", api="sglang")


def test_numbers_that_are_no_log_probabilities(served):
    def all_of(number):
        return lambda choice: [v.update(logprob=number(v["logprob"])) for e in entries(choice) for v in e.values()]

    changed(served, all_of(lambda logprob: logprob + 20))
    fails(served, ModelError, r"is not a log-probability: serve the model with --logprobs-mode raw_logprobs")
    for number in (float("nan"), -9999.0):
        changed(served, all_of(lambda logprob, number=number: number))
        fails(served, DivergenceError, r"a log-probability is not finite")


def test_another_vocabulary(served):
    served.tokenizer = tiny_tokenizer([*WORDS[:3], *reversed(WORDS[3:])])
    fails(served, ModelError, r"'tiny' has another vocabulary .*\(a token is '.' there and '.' here\)")
    served.tokenizer = tiny_tokenizer([*WORDS, "more"])
    with running(FakeServer(decoder(spare=4), tiny_tokenizer(WORDS))) as larger:
        with torch.no_grad():  # an id that is no token is the most probable
            larger.model.lm_head.bias = torch.nn.Parameter(torch.zeros(VALID + 4))
            larger.model.lm_head.bias[VALID + 1] = 100.0
        fails(larger, ModelError, rf"it writes token {VALID + 1}, and the tokenizer has {VALID} ids")
        fails(larger, ModelError, "it writes token", question=lambda: teacher(larger).greedy(["a"], 3))


def test_answers_that_end_oddly(served):
    changed(served, lambda choice: choice.update(finish_reason="abort"))
    fails(served, ServerError, "an answer ended by 'abort'", question=lambda: teacher(served).greedy(["a"], 3))
    changed(served, lambda choice: choice.pop("token_ids"))
    fails(served, ModelError, "no token_ids in its answer", question=lambda: teacher(served).greedy(["a"], 3))
    # Some servers leave end-of-sequence out.
    changed(served, lambda choice: choice.update(finish_reason="stop", token_ids=[3]))
    assert teacher(served).greedy(["a"], 3) == [[3, EOS]]


def test_the_context_window(served):
    ours = teacher(served).server
    ours.check_window(40, 23)
    with pytest.raises(ConfigError, match=r"max_input_tokens = 40 and max_new_tokens = 24: .* reads 64 tokens"):
        ours.check_window(40, 24)
    with pytest.raises(ModelError, match=r"refuses the request \(400\): .*maximum context length is 64 tokens"):
        ours.score([[3] * 64], [[4]])


def test_what_a_server_cannot_score_exactly(tmp_path):
    settings = ServerSettings("http://localhost:8000/v1")

    def spec(model):
        return TeacherSpec(ModelSpec(save_pretrained(tmp_path, model, tiny_tokenizer(WORDS)), "teacher", served=True))

    with pytest.raises(ModelError, match=r"cannot be asked on a server: servers score prompt and answer as one"):
        ServerTeacher.of(spec(tiny_t5(vocab=VALID)), settings)
    model = decoder()
    model.generation_config.suppress_tokens = [5]
    with pytest.raises(ModelError, match=r"its generation_config has suppress_tokens, which servers do not apply"):
        ServerTeacher.of(spec(model), settings)
    # Weights are not asked for, configuration and tokenizer are.
    plain = spec(decoder())
    (tmp_path / "model.safetensors").unlink()
    assert ServerTeacher.of(plain, settings).gives == {"chosen", "max", "logsumexp"}


# Training with it

NEEDS_MORE = r"needs the teacher's (distribution|entropy).*provides chosen, logsumexp, max"
COMPARED = {"loss", "grad_norm", "regret", "eval_regret", "eval_sample_regret", "eval_logprob", "eval_match"}
SERVED = {"one_step": "sampled", "weak_start": "ignore", "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}


@pytest.mark.parametrize("reward", ["max", "lse"])
def test_reinforce_is_the_run_with_the_local_teacher(tmp_path, served, reward):
    tokenizer = tiny_tokenizer(WORDS)
    local = Teacher(language_model(served.model, tokenizer), tokenizer, max_input_tokens=16)
    options = {**SERVED, "reward_value": reward, "baseline": "leave_one_out", "cut_answers": "end_price"}
    lines = {}
    for name, source in (("server", teacher(served)), ("local", local)):
        trainer = tiny_runs.make(
            "reinforce", tmp_path / name, teacher=source, eval_examples=tiny_runs.examples(3), **options
        )
        trainer.train()
        lines[name] = tiny_runs.logged(tmp_path / name)
    assert lines["server"][-1].keys() == lines["local"][-1].keys()
    for one, other in zip(lines["server"], lines["local"], strict=True):
        for name in COMPARED & other.keys():
            assert one[name] == pytest.approx(other[name], abs=1e-4, rel=1e-3), name
    record = json.loads((tmp_path / "server" / "run.json").read_text())
    assert record["inputs"]["teacher's model on the server"] == "tiny"


def test_what_needs_more_than_a_server_gives(tmp_path, served):
    ours = teacher(served)
    cases = {
        "reinforce": {**SERVED, "one_step": "exact"},
        "ppo": {**SERVED, "reward_value": "softmax"},
        "gkd": {"objective": "reverse_kl"},
        "supervised": {"objective": "forward_kl"},
    }
    for kind, options in cases.items():
        with pytest.raises(ConfigError, match=NEEDS_MORE):
            tiny_runs.make(kind, tmp_path, teacher=ours, eval_examples=tiny_runs.examples(3), **options)
    assert not served.requests


def test_a_server_that_fails_in_training_ends_the_run(tmp_path, served):
    options = {"one_step": "sampled", "baseline": "leave_one_out", "max_steps": 2}
    trainer = tiny_runs.make("reinforce", tmp_path, teacher=teacher(served), **options)
    served.mishap = lambda path, body, number: (503, {}) if number > 2 else None
    with pytest.raises(ServerError, match="it fails"):
        trainer.train()
    assert trainer.state.global_step == 1


# From settings


def prepared(tmp_path, served, training=None, told=None, rows=6, student="student"):
    for name, model in (("teacher", decoder()), ("student", tiny_runs.student())):
        save_pretrained(tmp_path / name, model, tiny_tokenizer(WORDS))
    (tmp_path / "teacher" / "model.safetensors").unlink()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"{'a ' * i}b"}) + "\n" for i in range(rows)))
    data = DataArguments(str(tmp_path / "rows.jsonl"), "text")
    told = {"teacher_signal": "server", "server_url": served.url, **(told or {})}
    settings = {"one_step": "sampled", "baseline": "leave_one_out", "weak_start": "ignore", "max_input_tokens": 16,
                "max_new_tokens": 4, "max_steps": 1, "per_device_train_batch_size": 4, "rollouts_per_prompt": 2,
                "disable_tqdm": True, **(training or {})}  # fmt: skip
    args = ReinforceArguments(str(tmp_path / "run"), use_cpu=True, **settings)
    student = ModelConfig(str(tmp_path / student), dtype=None)
    return prepare(data, TeacherArguments(str(tmp_path / "teacher"), **told), student, args), args


def test_a_recipe_trains_with_a_teacher_whose_weights_are_elsewhere(tmp_path, served, monkeypatch):
    served.key = "abc123-of-mine"
    monkeypatch.setenv(KEY, served.key)
    setup, args = prepared(tmp_path, served)
    trainer = ReinforceTrainer(setup.student, args, train_examples=setup.train_examples, **setup.trainer_inputs())
    trainer.run(setup.settings)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(served.key.encode() in path.read_bytes() for path in written)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["server_url"] == served.url
    assert record["models"]["teacher"] == str(tmp_path / "teacher")
    assert "distilled from teacher" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"training": {"one_step": "exact"}}, r"one_step = 'exact' needs the teacher's distribution"),
        ({"training": {"teacher_mix": 0.1, "importance_weight": "token"}}, r"^teacher_mix = 0\.1: .* local Teacher"),
        ({"training": {"max_new_tokens": 48}}, r"max_input_tokens = 16 and max_new_tokens = 48"),
        ({"told": {"server_model": "other"}}, r"it does not serve 'other'"),
        ({"told": {"server_url": None}}, r"^teacher_signal = 'server': server_url is not set"),
        ({"told": {"teacher_signal": "model"}}, r"^server_url is set, and teacher_signal is 'model': set it to server"),
        ({"told": {"template_combination": "pool"}}, r"^template_combination = 'pool': takes the teacher's model"),
    ],
)
def test_what_settings_get_wrong_is_said_before_the_student_loads(tmp_path, served, monkeypatch, options, match):
    def refuse(*args, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_model", refuse)
    with pytest.raises((ConfigError, ModelError), match=match):
        prepared(tmp_path, served, **options)


def test_a_student_of_another_vocabulary_is_scored_by_its_text(tmp_path, served):
    """The served teacher's regret is that of the local one, by characters; it answers in the student's tokens."""
    words = [*WORDS[:3], *WORDS[:2:-1], "more"]
    save_pretrained(tmp_path / "other", tiny_t5(vocab=len(words) + 4), tiny_tokenizer(words))
    setup, args = prepared(tmp_path, served, training={"eval_strategy": "no"}, student="other")
    assert isinstance(setup.teacher, ServedOtherTokenizer)
    rules = setup.teacher.rules
    teacher = Teacher(language_model(decoder(), tiny_tokenizer(WORDS)), tiny_tokenizer(WORDS), append_eos=False)
    local = OtherTokenizer(teacher, tiny_tokenizer(words), rules)
    one, other = (source.score(INPUTS, IDS, MASK) for source in (setup.teacher, local))
    torch.testing.assert_close(one.chosen - one.max, other.chosen - other.max, atol=1e-4, rtol=1e-4)
    prompts = [texts[0] for texts in INPUTS]
    assert setup.teacher.greedy(prompts, 4) == local.answer(INPUTS, greedy_writer(4), 4)
    trainer = ReinforceTrainer(setup.student, args, train_examples=setup.train_examples, **setup.trainer_inputs())
    trainer.run(setup.settings)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["inputs"]["teacher's vocabulary"].startswith("another")
    assert record["models"]["teacher"] == str(tmp_path / "teacher")
