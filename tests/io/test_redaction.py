"""Secrets: found by name, by form, or because the environment holds them; what only looks like one stays."""

import base64
import json
import random
import string
import subprocess
import sys

import pytest

from rlkd.io.redaction import REDACTED, is_secret, redacted

HUB = "hf_" + "Ab3" * 11
WANDB = "0123456789abcdef" * 2 + "01234567"
CANARY = "canary-7f3a-value"


@pytest.mark.parametrize(
    "name",
    [
        *("hub_token", "--hub-token", "WANDB_API_KEY", "apiKey", "aws_secret_access_key", "password", "credentials"),
        *(
            "PGPASSWORD",
            "MYSQL_PWD",
            "GITHUB_PAT",
            "x-api-key",
            "Authorization",
            "accessKey",
            "auth.value.key",
            "APIKEY",
        ),
        *("wandb_key_2", "SLACK_WEBHOOK_URL", "SENTRY_DSN", "client_secret_v2", "HF_TOKEN_OLD", "sessionCookie"),
    ],
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
        *(
            "pad_token",
            "decoder_start_token",
            "eos_token_id",
            "num_key_value_heads",
            "token_healing",
            "first_token_share",
        ),
        *("tokens", "keys", "sort_key", "key_value_states", "passes", "compass", "author", "pattern"),
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
        ("s3://me:p@ss@w0rd@host:8080/x", f"s3://{REDACTED}@host:8080/x"),
        ("https://abcdefghij0123456789@host/x", f"https://{REDACTED}@host/x"),
        ("ssh://git@host/x", "ssh://git@host/x"),
        ("https://host/d?file=a.csv&token=ab12cd34ef&x=1", f"https://host/d?file=a.csv&token={REDACTED}&x=1"),
        ("https://host/d?X-Amz-Signature=ab12cd34ef56", f"https://host/d?X-Amz-Signature={REDACTED}"),
        ('{"api_key": "not-a-known-form", "n": 1}', f'{{"api_key": "{REDACTED}", "n": 1}}'),
        ("password: correcthorse, user: me", f"password: {REDACTED}, user: me"),
        ("r.py --hub-token abcd1234efgh --lam 0.2", f"r.py --hub-token {REDACTED} --lam 0.2"),
        ("best_token = trainer.objective", "best_token = trainer.objective"),
        ("key: the value is a sentence", "key: the value is a sentence"),
        ("token 'pen' has reward -0.31; pad_token: <pad12345>", "token 'pen' has reward -0.31; pad_token: <pad12345>"),
        (
            "sk-learn-like words and risk-averse-tokenisation-of-text",
            "sk-learn-like words and risk-averse-tokenisation-of-text",
        ),
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
    named = f"git commit {WANDB} -> {WANDB[::-1]} with changes"
    assert redacted(named) == named
    assert redacted(f"commit it. The key is in the next line\n{WANDB}").endswith(REDACTED)
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
    monkeypatch.setenv("PWD", "/home/me/project")  # a shell's working directory, no password
    monkeypatch.setenv("MYSQL_PWD", "hunter22hunter")
    assert redacted(f"x{CANARY}y short visible-value") == f"x{REDACTED}y short visible-value"
    assert redacted("/home/me/project/a.csv hunter22hunter") == f"/home/me/project/a.csv {REDACTED}"


def test_other_values_are_as_they_were():
    value = {"a": [1, 2.5, None, True, {"b": "c"}], "hub_token": None, "use_key": False}
    assert redacted(value) == value


def _text(n, letters=string.ascii_letters + string.digits):
    return "".join(random.Random(n).choices(letters, k=n - 1)) + "7"


def _jwt():
    head, body = (
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
        for part in ({"alg": "HS256", "typ": "JWT"}, {"sub": "1234567890"})
    )
    return f"{head}.{body}.{_text(43)}"


LOWER, UPPER, HEX = string.ascii_lowercase + string.digits, string.ascii_uppercase + string.digits, "0123456789abcdef"
KNOWN_TO_SCANNERS = {
    "artifactory": " AKC" + _text(64) + " ", "aws": "AKIA" + _text(16, UPPER), "aws session": "ASIA" + _text(16, UPPER),
    "azure": "AccountKey=" + _text(86) + "==", "basic auth": "postgres://me:" + _text(12) + "@host/db",
    "discord": "M" + _text(23) + "." + _text(6) + "." + _text(27), "github": "ghs_" + _text(36),
    "gitlab": "glpat-" + _text(20),
    "jwt": _jwt(), "mailchimp": _text(32, HEX) + "-us12", "npm": "//registry/:_authToken=npm_" + _text(36),
    "openai": "sk-proj-" + _text(20) + "T3BlbkFJ" + _text(20), "pypi": "pypi-AgEIcHlwaS5vcmc" + _text(80),
    "private key": "-----BEGIN RSA PRIVATE KEY-----\n" + _text(64) + "\n-----END RSA PRIVATE KEY-----",
    "sendgrid": "SG." + _text(22) + "." + _text(43), "slack": "xoxb-123456789012-" + _text(24, LOWER),
    "webhook": "https://hooks.slack.com/services/T" + _text(8) + "/B" + _text(8) + "/" + _text(24),
    "square": "sq0csp-" + _text(43), "stripe": "sk_live_" + _text(24), "telegram": "123456789:" + _text(35),
    "twilio": "SK" + _text(32, HEX),
}  # fmt: skip
OTHER_FORMS = {
    "anthropic": "sk-ant-api03-" + _text(60), "google": "AIza" + _text(35), "google oauth": "ya29." + _text(60),
    "groq": "gsk_" + _text(52), "xai": "xai-" + _text(60), "replicate": "r8_" + _text(37),
    "nvidia": "nvapi-" + _text(60),
    "databricks": "dapi" + _text(32, HEX), "digitalocean": "dop_v1_" + _text(64, HEX), "vault": "hvs." + _text(90),
    "docker": "dckr_pat_" + _text(27), "notion": "ntn_" + _text(46), "shopify": "shpat_" + _text(32, HEX),
    "hub": "hf_" + _text(34), "hub org": "api_org_" + _text(34), "wandb": _text(40, HEX),
    "github fine": "github_pat_" + _text(60),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*KNOWN_TO_SCANNERS, *OTHER_FORMS])
def test_a_scanner_finds_nothing_after_redaction(kind):
    scan = pytest.importorskip("detect_secrets.core.scan").scan_line
    from detect_secrets.settings import transient_settings

    names = [
        *(
            "ArtifactoryDetector",
            "AWSKeyDetector",
            "AzureStorageKeyDetector",
            "BasicAuthDetector",
            "DiscordBotTokenDetector",
        ),
        *("GitHubTokenDetector", "GitLabTokenDetector", "JwtTokenDetector", "MailchimpDetector", "NpmDetector"),
        *("OpenAIDetector", "PrivateKeyDetector", "PypiTokenDetector", "SendGridDetector", "SlackDetector"),
        *("SquareOAuthDetector", "StripeDetector", "TelegramBotTokenDetector", "TwilioKeyDetector"),
    ]
    secret = (KNOWN_TO_SCANNERS | OTHER_FORMS)[kind]
    with transient_settings({"plugins_used": [{"name": name} for name in names]}):
        assert kind in OTHER_FORMS or list(scan(secret))
        clean = redacted(f"saw {secret} there")
        assert not list(scan(clean))
    assert REDACTED in clean
    assert clean.startswith("saw ")
    assert clean.endswith(" there")
    longest = max(secret.replace("/", " ").replace(".", " ").replace("\n", " ").split(), key=len)
    assert longest[-12:] not in clean


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "piece", ["token", "a.b-token", "https://", "eyJa-", "c@", "key ", "0123456789" * 4 + " ", "://a:"]
)
def test_long_texts_cost_no_more_than_their_length(piece):
    """A pattern that starts anew at every character would take minutes."""
    assert redacted(f"a {piece * 30_000} password=hunter22hunter").endswith(f"password={REDACTED}")


def test_what_a_process_says(tmp_path):
    """Log records of any library, its tracebacks, and the command line as others read it."""
    script = tmp_path / "job.py"
    script.write_text(
        "import logging, sys\n"
        "from rlkd.io.redaction import redact_command_line, redact_outputs\n"
        "redact_outputs()\n"
        "redact_command_line()\n"
        "logging.basicConfig()\n"
        "logging.getLogger('another.library').warning('got %s from %s', 403, sys.argv[2])\n"
        "logging.getLogger('x').warning('url https://me:hunter22@host/x')\n"
        "print(sys.argv)\n"
        "raise ValueError('failed with ' + 'hf_' + 'Ab3' * 11)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), "--hub_token", CANARY, "--lam", "0.2"], capture_output=True, text=True
    )
    said = done.stdout + done.stderr
    assert "ValueError: failed with" in said
    assert "--lam" in said
    assert "got 403 from" in said
    assert not [secret for secret in (CANARY, "hunter22", HUB) if secret in said]
