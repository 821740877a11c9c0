"""Secrets: found by name, by form, or because the environment holds them; what only looks like one stays."""

import pytest

from rlkd.io.redaction import REDACTED, is_secret, redacted

HUB = "hf_" + "Ab3" * 11
WANDB = "0123456789abcdef" * 2 + "01234567"
CANARY = "canary-7f3a-value"


@pytest.mark.parametrize(
    "name", ["hub_token", "--hub-token", "WANDB_API_KEY", "apiKey", "aws_secret_access_key", "password", "credentials"]
)
def test_names_of_secrets(name):
    assert is_secret(name)
    assert redacted(CANARY, name) == REDACTED
    assert redacted(12345, name) == REDACTED
    assert redacted({"inner": [CANARY]}, name) == {"inner": REDACTED}


@pytest.mark.parametrize(
    "name",
    [
        "max_new_tokens",
        "tokenizer",
        "include_num_input_tokens_seen",
        "keyword",
        "average_tokens_across_devices",
        "monkey",
    ],
)
def test_names_that_only_look_like_it(name):
    assert not is_secret(name)
    assert redacted(64, name) == 64


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"before {HUB} after", f"before {REDACTED} after"),
        (f"key={WANDB}", f"key={REDACTED}"),
        ("wandb_v1_" + "x" * 40, REDACTED),
        ("ghp_" + "a1" * 18, REDACTED),
        ("https://me:pass@host/x", f"https://{REDACTED}@host/x"),
        ("Authorization: Bearer abcdefgh12345", f"Authorization: Bearer {REDACTED}"),
        ("a plain sentence, https://host/x@1:2", "a plain sentence, https://host/x@1:2"),
        ("f" * 64, "f" * 64),  # a sha256
        ("hf_small", "hf_small"),
    ],
)
def test_forms_of_secrets(text, clean):
    assert redacted(text) == clean
    assert redacted({"a": [text]}) == {"a": [clean]}


def test_a_commit_is_not_a_key():
    assert redacted({"model_revision": WANDB, "git": {"commit": WANDB}, "revisions": {"teacher": WANDB}}) == {
        "model_revision": WANDB,
        "git": {"commit": WANDB},
        "revisions": {"teacher": WANDB},
    }
    assert redacted(["--teacher_revision", WANDB, "--run_name", WANDB])[1::2] == [WANDB, REDACTED]


def test_command_lines():
    line = ["r.py", "--hub_token", CANARY, "--lam", "0.2", f"--wandb-api-key={CANARY}", "--names", "a", HUB]
    assert redacted(line) == [
        *("r.py", "--hub_token", REDACTED, "--lam", "0.2", f"--wandb-api-key={REDACTED}", "--names", "a", REDACTED)
    ]


def test_values_of_the_environment(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", CANARY)
    monkeypatch.setenv("OTHER_KEY", "short")
    monkeypatch.setenv("PLAIN", "visible-value")
    assert redacted(f"x{CANARY}y short visible-value") == f"x{REDACTED}y short visible-value"


def test_other_values_are_as_they_were():
    value = {"a": [1, 2.5, None, True, {"b": "c"}], "hub_token": None, "use_key": False}
    assert redacted(value) == value
