"""Redaction of secrets in everything that is written or shown, except the user's rows.

A secret is recognised by its name (hub_token, WANDB_API_KEY; in a text, `password=...` or `"api_key": "..."`), by its
form (hf_..., a wandb key, a password in a URL, a private key), or because it is the value of an environment variable
with such a name. The exits: error messages and usage errors, log records of every library, tracebacks, the command
line that trackers record, settings sent to trackers, run.json, cards, the manifest of labels.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

REDACTED = "<redacted>"
# Anywhere in a name.
STRONG = re.compile(
    r"passw(?:or)?d|passphrase|passcode|secret|credential|api_?key|access_?key|private_?key|auth_?token"
)
# At the end of a name: hub_token, github_pat, MYSQL_PWD; not token_healing, num_key_value_heads.
LAST = re.compile(
    r"(?:^|_)(?:token|key|pass|pwd|pat|auth|authorization|bearer|cookie|signature|sig|dsn|webhook(?:_url)?)"
    r"(?:_(?:value|old|new|prod|dev|test|base64|b64|\d+))*$"
)
# Tokens of a vocabulary and keys of a table: pad_token, decoder_start_token, sort_key.
HARMLESS = re.compile(
    r"(?:^|_)(?:pad|eos|bos|unk|sep|cls|mask|start|end|image|video|audio|language|special|added|first|last|next|per|"
    r"each|best|one)_token$|(?:^|_)(?:sort|label|dict|state|group)_key$"
)
FOLDERS = {"PWD", "OLDPWD"}  # set by every shell
SHORTEST = 8  # shorter values of environment variables are ordinary words
FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bapi_org_[A-Za-z0-9]{16,}"
    r"|\bwandb_v\d+_\w{16,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bgl(?:pat|dt|ft|soat|rt|cbt|imt|ptt|agent|oas)-[\w-]{20,}|\bGR1348941[\w-]{20,}"
    r"|\b(?:sk|pk|rk)[-_](?:live_|test_)?[\w-]{20,}"  # OpenAI, Anthropic, Stripe
    r"|\b(?:gsk|xai|r8|nvapi|pplx|fw|tgp|dapi|dop_v1|doo_v1|ntn|lin_api|shpat|shpss|sq0\w{3}|EAAA|dckr_pat|npm|rubygems)"
    r"[-_]?[A-Za-z0-9][\w-]{19,}"
    r"|\bpypi-[\w-]{20,}"
    r"|(?<![A-Z0-9])(?:A3T[A-Z0-9]|ABIA|ACCA|AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Z])"
    r"|\bAIza[\w-]{35}|\bya29\.[\w-]{20,}|\bGOCSPX-[\w-]{20,}"
    r"|\bxox[a-z]-[\w-]{10,}|\bxapp-[\w-]{10,}|(?<=hooks\.slack\.com/services/)[\w/]{10,}"
    r"|(?<=discord\.com/api/webhooks/)[\w/-]{10,}|\b[MNO][A-Za-z\d_-]{23,25}\.[A-Za-z\d_-]{6}\.[A-Za-z\d_-]{27,}"
    r"|\bSG\.[\w-]{16,}\.[\w-]{16,}|\b(?:AC|SK)[a-z0-9]{32}\b|\b[0-9a-z]{32}-us\d{1,2}\b"
    r"|\b\d{8,10}:[\w-]{35}(?![\w-])|\bhv[sb]\.[\w-]{20,}|\bAGE-SECRET-KEY-1[A-Z0-9]{20,}"
    r"|\bAKC[a-zA-Z0-9]{10,}|\bAP[\dA-F][a-zA-Z0-9]{40,}"
    r"|\beyJ[\w=-]{8,4096}\.[\w=-]+(?:\.[\w.+/=-]*)?|\beyJ[A-Za-z0-9+/_-]{60,}=*"
    r"|(?<=\bBearer )[\w.~+/-]{8,}=*|(?<=\bBasic )[A-Za-z0-9+/]{8,}=*"
    r"|-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|\Z)"
    r"|(?:(?<=://)|(?<=:/)(?!/))(?:[^\s/@:]*:[^\s/]+|[\w.~%-]{20,})(?=@)",  # a Path has one slash
    re.DOTALL,
)
# name=value, name: value, "name": "value", --name value; the name decides in `is_secret`.
PAIR = re.compile(
    # Bounded and possessive, so that a long text without spaces costs no more than its length.
    r"(?<![\w.-])(?=[\w.-]{0,80}?(?:token|key|pass|pwd|pat|auth|secret|credential|cookie|sig|dsn|webhook))"
    r"(?P<name>[\w.-]++)(?P<sign>[\"']?\s{0,9}[:=]\s{0,9})"
    r"(?P<quote>[\"']?)(?P<value>(?<=[\"'])[^\"'\n]+|(?<![\"'])[^\s\"',;&<>()\[\]{}]+)",
    re.IGNORECASE,
)
FLAG = re.compile(r"(?P<name>(?<!\S)--[\w-]+)(?P<sign>\s+)(?P<quote>)(?P<value>[^\s-]\S*)")
WANDB_KEY = re.compile(r"\b[0-9a-f]{40}\b")  # a git commit looks the same, and is named before it
NAMED_COMMIT = re.compile(r"\b(?:commit|revision|sha1?)\b[^\n]{0,60}\Z", re.IGNORECASE)
COMMIT_WORDS = {"revision", "revisions", "commit", "sha", "sha1"}


def is_secret(name: str) -> bool:
    """Whether a setting, flag or variable of this name holds a secret: hub_token and --api-key, not max_new_tokens. Of
    a dotted name (`wandb.api_key.value`) one part is enough.
    """
    return any(
        STRONG.search(part) or (LAST.search(part) and not HARMLESS.search(part)) for part in _snake(name).split(".")
    )


def redacted(value: Any, name: str = "") -> Any:
    """`value` (JSON-serialisable, or a command line as a list) without secrets; `name` is the name of the setting."""
    if isinstance(value, dict):
        return {key: redacted(item, f"{name}.{key}") for key, item in value.items()}
    if value is not None and not isinstance(value, bool) and is_secret(name):
        return REDACTED
    if isinstance(value, (list, tuple)):
        return _redacted_list(list(value), name)
    return _redacted_text(value, name) if isinstance(value, str) else value


def redact_outputs() -> None:
    """Redact what this process says from now on: log records of all libraries, and tracebacks."""
    logging.setLogRecordFactory(_redacting(logging.LogRecord))
    sys.excepthook = _show_traceback


def redact_command_line() -> None:
    """Redact `sys.argv`, which trackers record. To be called once it has been parsed."""
    sys.argv[1:] = redacted(sys.argv[1:])


def _redacting(make: Callable[..., logging.LogRecord]) -> Callable[..., logging.LogRecord]:
    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        try:
            message = made.getMessage()
        except Exception:  # a wrong format string: logging reports it
            return made
        made.msg, made.args = redacted(message), ()
        return made

    return record


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


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
    if not COMMIT_WORDS & _words(name):
        text = WANDB_KEY.sub(_redacted_key, text)
    return FLAG.sub(_redacted_pair, PAIR.sub(_redacted_pair, text))


def _redacted_key(found: re.Match[str]) -> str:
    before = found.string[max(found.start() - 100, 0) : found.start()]
    return found[0] if NAMED_COMMIT.search(before) else REDACTED


def _redacted_pair(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    # `best_token = trainer.token` in a traceback and `key: sentence` are none: such a value of a secret has a digit.
    likely = len(value) >= SHORTEST and (STRONG.search(_snake(name)) or re.search(r"\d", value))
    if value == REDACTED or not likely or not is_secret(name):
        return found[0]
    return f"{name}{found['sign']}{found['quote']}{REDACTED}"


def _from_environment() -> list[str]:
    named = {name: value for name, value in os.environ.items() if name not in FOLDERS and is_secret(name)}
    values = {value for value in named.values() if len(value) >= SHORTEST}
    return sorted(values, key=len, reverse=True)


def _snake(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()).strip("_")


def _words(name: str) -> set[str]:
    return set(re.split(r"[_.]", _snake(name)))
