"""The identity of what a run is made from: weights, configurations and tokenizers, each as a digest of all of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from .chat import chat_record

# Of a configuration: where it was found and by which version it was written.
ORIGIN = {
    "_name_or_path", "_commit_hash", "architectures", "base_model_name_or_path", "dtype", "revision", "torch_dtype",
    "transformers_version", "peft_version",
}  # fmt: skip
DIGITS = 16


def weights_digest(model: Any) -> str:
    """SHA-256 (its first 16 digits) of the names, shapes, precisions and values of all weights, wherever they are."""
    entries = sorted(model.state_dict().items())
    with ThreadPoolExecutor() as pool:  # hashing frees the interpreter's lock
        return _joined(pool.map(_entry_digest, entries))


def _entry_digest(entry: tuple[str, Any]) -> str:
    name, value = entry
    if not isinstance(value, torch.Tensor):  # what quantised layers keep
        return sha256(f"{name} {value!r}".encode()).hexdigest()
    digest = sha256(f"{name} {tuple(value.shape)} {value.dtype}".encode())
    digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def configuration_digest(model: Any) -> str:
    """SHA-256 (its first 16 digits) of what configures a model: its own settings, those of generation and of its
    adapters, where they are not the defaults, which later versions of transformers add to.
    """
    adapters = getattr(model, "peft_config", {})
    parts = [model.config, getattr(model, "generation_config", None), *(adapters[name] for name in sorted(adapters))]
    return _joined(_canonical(_settings(part)) for part in parts if part is not None)


def _settings(config: Any) -> dict[str, Any]:
    values = config.to_diff_dict() if hasattr(config, "to_diff_dict") else config.to_dict()
    return {name: value for name, value in values.items() if name not in ORIGIN}


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 (its first 16 digits) of everything that decides how a tokenizer reads and writes, its files' place
    excepted.
    """
    special = {"class": type(tokenizer).__name__, "special": tokenizer.special_tokens_map}
    special["chat"] = getattr(tokenizer, "chat_template", None)
    special |= {"prompts": made} if (made := chat_record(tokenizer)) else {}
    return _joined([_canonical(special), *_definition(tokenizer)])


def _definition(tokenizer: Any) -> Iterable[str]:
    if getattr(tokenizer, "is_fast", False):
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        for name in ("truncation", "padding"):  # left over from the last call
            definition.pop(name, None)
        return [_canonical(definition)]
    parts = [_canonical(tokenizer.get_vocab())]
    with tempfile.TemporaryDirectory() as folder, suppress(NotImplementedError):
        for path in sorted(tokenizer.save_vocabulary(folder) or ()):  # merges, or the pieces with their scores
            parts.append(sha256(Path(path).read_bytes()).hexdigest())
    return parts


def _canonical(value: Any) -> str:
    def plain(item: Any) -> Any:
        return sorted(map(str, item)) if isinstance(item, set | frozenset) else str(item)

    return json.dumps(value, sort_keys=True, default=plain)


def _joined(parts: Iterable[str]) -> str:
    return sha256("\n".join(parts).encode()).hexdigest()[:DIGITS]
