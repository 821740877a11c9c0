"""A saved model's folder, checked before a library reads it: what must be there is there and whole.

A name that is no local folder is a hub id and is left to the hub's client.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import ModelError, RlkdError
from ..io.files import sha256

CONFIG, GENERATION, ADAPTER_CONFIG = "config.json", "generation_config.json", "adapter_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
)  # fmt: skip
# A tokenizer has one of them.
VOCABULARIES = (
    "tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "spm.model", "source.spm", "target.spm", "vocab.json",
    "merges.txt", "vocab.txt", "bpe.codes",
)  # fmt: skip
SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_SAFETENSORS = "adapter_model.safetensors"
# Safe file (or index) -> what holds pickled weights in its place.
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_PICKLED = ("adapter_model.bin",)
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx")
AGAIN = "Copy or download the model again."
BIN = (
    "holds its weights only as pickles ({files}), which can run code when they load. Save it again as safetensors "
    "(save_pretrained), or allow them: --allow-bin, in a recipe allow_bin: true (read with weights_only)."
)
POINTER = b"version https://git-lfs"


def check_place(name: str, role: str) -> Path | None:
    """The folder of a local model, None for a hub id. Raises ModelError for a file, or a path with nothing there."""
    path = Path(name)
    if os.path.isdir(name):
        if not os.access(name, os.R_OK | os.X_OK):
            raise ModelError(f"{role} '{name}' cannot be read: you have no permission to list this folder.")
        return path
    if os.path.islink(name) and not os.path.exists(name):
        raise ModelError(f"{role} '{name}' is a link to {os.readlink(path)}, which does not exist.")
    if os.path.exists(name):
        raise ModelError(f"{role} '{name}' is a file: give the folder of a saved transformers model.")
    if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelError(
            f"{role} '{name}' is neither a local folder nor a model that could be fetched from the hub: "
            "there is no such folder."
        )
    return None


def read_json(folder: Path, file: str, role: str, name: str) -> dict[str, Any]:
    """A JSON object in a model's folder. Raises ModelError naming model and file if it is damaged or unreadable."""
    try:
        text = (folder / file).read_bytes()
        value = json.loads(text)
    except OSError as error:
        raise _damaged(role, name, file, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        reason = "is empty" if not text.strip() else "is cut off or no JSON"
        reason = "is a pointer of Git LFS, not the file itself" if text.startswith(POINTER) else reason
        raise _damaged(role, name, file, reason) from error
    if not isinstance(value, dict):
        raise _damaged(role, name, file, f"holds a {type(value).__name__}, not an object")
    return value


def check_json(folder: Path, files: Iterable[str], role: str, name: str) -> None:
    """Raise ModelError if one of these files is there and damaged."""
    for file in files:
        if os.path.lexists(folder / file):
            read_json(folder, file, role, name)


def check_weights(folder: Path, role: str, name: str, *, allow_bin: bool = False, adapter: bool = False) -> None:
    """Raise ModelError unless the weights of a model (or of an adapter) are there, whole and safe to read.

    The header of every safetensors file is read, and its length compared with the file's; no tensor is loaded.
    """
    safe, index, pickled = (ADAPTER_SAFETENSORS, "", ADAPTER_PICKLED) if adapter else (SAFETENSORS, INDEX, PICKLED)
    if os.path.lexists(folder / safe):
        _check_header(folder, safe, role, name)
        return
    if index and os.path.lexists(folder / index):
        _check_shards(folder, index, role, name, pickles=False)
        return
    unsafe = [file for file in pickled if os.path.lexists(folder / file)]
    if not unsafe:
        others = sorted(path.name for pattern in OTHER_FORMATS for path in folder.glob(pattern))
        found = f" It has {', '.join(others[:3])}, which is not read." if others else ""
        raise ModelError(f"{role} '{name}' has no weights: {safe} is missing.{found} {AGAIN}")
    if not allow_bin:
        raise ModelError(f"{role} '{name}' {BIN.format(files=', '.join(unsafe))}")
    if unsafe[0].endswith(".json"):
        _check_shards(folder, unsafe[0], role, name, pickles=True)
    else:
        _check_pickle(folder, unsafe[0], role, name)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any(os.path.lexists(folder / file) for file in (*VOCABULARIES, "tokenizer_config.json"))


def check_tokenizer(folder: Path, role: str, name: str) -> None:
    """Raise ModelError if a tokenizer's files are missing or damaged."""
    if not has_tokenizer(folder):
        raise ModelError(
            f"{role} '{name}' has no tokenizer: {VOCABULARIES[0]} is missing. Save the tokenizer of this model there."
        )
    check_json(folder, TOKENIZER_FILES, role, name)
    for file in VOCABULARIES:
        if os.path.lexists(folder / file):
            _start(folder, file, role, name)


@contextmanager
def explained(role: str, name: str, what: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a model into one line: a ModelError naming the model."""
    import torch

    try:
        yield
    except (RlkdError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files raise errors of every kind
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise ModelError(
                f"{role} '{name}' comes with code of its own, which rlkd never runs. Choose a model whose "
                "architecture is part of transformers."
            ) from error
        if "use_safetensors=True" in reason:  # of a hub model without them
            raise ModelError(f"{role} '{name}' {BIN.format(files='pytorch_model.bin')}") from error
        if not Path(name).is_dir() and isinstance(error, (OSError, ValueError)):
            raise ModelError(
                f"{role} '{name}' is neither a local folder nor a model that could be fetched from the hub: "
                f"{reason[:200]}"
            ) from error
        raise ModelError(
            f"{role} '{name}': {what} cannot be loaded ({type(error).__name__}: {reason[:200]}). {AGAIN}"
        ) from error


def saved_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of the weights in a local model's safetensors files, by name."""
    tensors = (_header(path) for path in folder.glob("*.safetensors"))
    return {name: entry["shape"] for held in tensors for name, entry in held.items()}


def weights_files(folder: Path) -> dict[str, str]:
    """Name -> sha256 of the files that hold a local model's weights; computed once while a file does not change."""
    files = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".bin") and path.is_file())
    return {path.name: _sha256(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@lru_cache(maxsize=1024)
def _sha256(path: Path, size: int, modified: int) -> str:
    return sha256(path)


def _check_shards(folder: Path, index: str, role: str, name: str, *, pickles: bool) -> None:
    shards = read_json(folder, index, role, name).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise _damaged(role, name, index, "has no weight_map from weights to files")
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise _damaged(role, name, index, f"names '{shard}', which is not a file of this folder")
        if not os.path.lexists(folder / shard):
            raise ModelError(f"{role} '{name}': {shard} is missing, which {index} names. {AGAIN}")
        if pickles:
            _check_pickle(folder, shard, role, name)
            continue
        held = _check_header(folder, shard, role, name)
        if lost := sorted(weight for weight, file in shards.items() if file == shard and weight not in held):
            raise _damaged(role, name, shard, f"lacks {lost[0]}, which {index} places there")


def _check_header(folder: Path, file: str, role: str, name: str) -> dict[str, Any]:
    try:
        return _header(folder / file)
    except OSError as error:
        raise _damaged(role, name, file, f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise _damaged(role, name, file, str(error)) from error


def _header(path: Path) -> dict[str, Any]:
    """Tensors of a safetensors file by name. Raises ValueError with what is wrong."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(POINTER))
        if size == 0:
            raise ValueError("is empty")
        if start == POINTER:
            raise ValueError("is a pointer of Git LFS, not the file itself (git lfs pull)")
        # The length of a header may begin with these bytes; the header itself follows it.
        if start.startswith((b"PK", b"\x80")) and start[8:9] != b"{":
            raise ValueError("is a pickle under the name of a safetensors file, and is not read")
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > size - 8:
            raise ValueError("is cut off or no safetensors file")
        file.seek(8)
        try:
            tensors = json.loads(file.read(length))
            tensors.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        except (ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError):
            raise ValueError("has a damaged header") from None
    if not tensors:
        raise ValueError("holds no weights")
    if end != size - 8 - length:
        raise ValueError(f"has {size - 8 - length} bytes of weights where its header says {end}")
    return tensors


def _check_pickle(folder: Path, file: str, role: str, name: str) -> None:
    if not _start(folder, file, role, name).startswith((b"PK", b"\x80")):
        raise _damaged(role, name, file, "is no file of torch")


def _start(folder: Path, file: str, role: str, name: str) -> bytes:
    """The first bytes of a file. Raises ModelError if it is empty, or stands for one that was not downloaded."""
    try:
        with (folder / file).open("rb") as opened:
            start = opened.read(len(POINTER))
    except OSError as error:
        raise _damaged(role, name, file, f"cannot be read: {error.strerror}") from error
    if not start or start == POINTER:
        raise _damaged(role, name, file, "is a pointer of Git LFS, not the file itself" if start else "is empty")
    return start


def _damaged(role: str, name: str, file: str, reason: str) -> ModelError:
    return ModelError(f"{role} '{name}': {file} {reason}. {AGAIN}")
