"""Redaction of secrets in everything that is written or shown: run.json, error messages, the list of settings.

A secret is recognised by its name (hub_token, WANDB_API_KEY), by its form (hf_..., a wandb key, a password in a URL),
or because it is the value of an environment variable with such a name.
"""

from __future__ import annotations

import os
import re
from typing import Any

REDACTED = "<redacted>"
SECRET_WORDS = {
    "token", "key", "apikey", "secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials",
}  # fmt: skip
SHORTEST = 8  # shorter values of environment variables are ordinary words
FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}"
    r"|\bwandb_v\d+_\w{16,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bsk-[\w-]{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"
    r"|(?<=\bBearer )[\w.~+/-]{8,}=*"
)
WANDB_KEY = re.compile(r"\b[0-9a-f]{40}\b")  # a git commit looks the same
COMMIT_WORDS = {"revision", "revisions", "commit", "sha", "sha1"}


def is_secret(name: str) -> bool:
    """Whether a setting, flag or variable of this name holds a secret: hub_token and --api-key, not max_new_tokens."""
    return bool(SECRET_WORDS & _words(name))


def redacted(value: Any, name: str = "") -> Any:
    """`value` (JSON-serialisable, or a command line as a list) without secrets; `name` is the name of the setting."""
    if isinstance(value, dict):
        return {key: redacted(item, f"{name}.{key}") for key, item in value.items()}
    if value is not None and not isinstance(value, bool) and is_secret(name):
        return REDACTED
    if isinstance(value, (list, tuple)):
        return _redacted_list(list(value), name)
    return _redacted_text(value, name) if isinstance(value, str) else value


def _redacted_list(items: list[Any], name: str) -> list[Any]:
    """A list that may be a command line: a secret follows its flag as `--name value` or `--name=value`."""
    out, flag = [], name
    for item in items:
        if isinstance(item, str) and item.startswith("--"):
            flag, equals, value = item.partition("=")
            out.append(f"{flag}={redacted(value, flag)}" if equals else flag)
            flag = name if equals else flag
        else:
            out.append(redacted(item, flag))
            flag = flag if is_secret(flag) else name
    return out


def _redacted_text(text: str, name: str) -> str:
    for secret in _from_environment():
        text = text.replace(secret, REDACTED)
    text = FORMS.sub(REDACTED, text)
    return text if COMMIT_WORDS & _words(name) else WANDB_KEY.sub(REDACTED, text)


def _from_environment() -> list[str]:
    values = {value for name, value in os.environ.items() if is_secret(name) and len(value) >= SHORTEST}
    return sorted(values, key=len, reverse=True)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))
