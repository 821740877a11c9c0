"""A classifying teacher's outputs, computed once: memory-mapped arrays by row index, so rows may come in any order."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from ...io.files import explained
from ...io.files import sha256 as file_sha256
from ...tensors import pad_stack
from ..digests import configuration_digest, tokenizer_digest, weights_digest
from .classifiers import EncoderOutputs

logger = logging.getLogger(__name__)

CacheKind = Literal["logits", "cls", "hidden"]
FORMAT = 2
META_FILE = "meta.json"
# Outputs of a batch of rows, for the rows' indices.
Compute = Callable[[list[int]], EncoderOutputs]


class TeacherOutputs:
    """Outputs of every row of a data set.

    logits  [rows, C]                      the logits alone
    cls     [rows, K, D]                   and [CLS] of the K matched layers
    hidden  [tokens of all rows, K, D]     and every token of the matched layers: 4 K D bytes a token
    """

    def __init__(self, folder: Path):
        meta = json.loads((folder / META_FILE).read_text())
        self.kind: CacheKind = meta["kind"]
        self.logits = np.load(folder / "logits.npy", mmap_mode="r")
        self.offsets = np.load(folder / "offsets.npy")
        self.states = None if self.kind == "logits" else np.load(folder / "states.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.logits)

    def batch(self, index: Sequence[int], length: int) -> EncoderOutputs:
        """Logits [B, C] and matched layers [B, L, D] (`hidden`), [B, 1, D] (`cls`) or none, of the rows of `index`.

        length is L, the batch's padded length; padding is 0.
        """
        logits = torch.from_numpy(self.logits[list(index)])
        if self.states is None:
            return EncoderOutputs(logits, [], [])
        if self.kind == "cls":
            states = torch.from_numpy(self.states[list(index)])[:, None]  # [B, 1, K, D]
        else:
            spans = [np.array(self.states[self.offsets[i] : self.offsets[i + 1]]) for i in index]
            grid = pad_stack([torch.from_numpy(span) for span in spans])
            states = torch.nn.functional.pad(grid, (0, 0, 0, 0, 0, length - grid.shape[1]))
        return EncoderOutputs(logits, list(states.unbind(2)), [])


def cache_key(teacher: Any, tokenizer: Any, data_digest: str, max_length: int, **choices: Any) -> dict[str, Any]:
    """Everything the outputs depend on; each key has its own folder."""
    return {
        "format": FORMAT,
        "data": data_digest,
        "teacher": weights_digest(teacher),
        "configuration": configuration_digest(teacher),
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": max_length,
        **choices,
    }


def cached_outputs(
    root: Path, key: dict[str, Any], kind: CacheKind, lengths: list[int], compute: Compute, batch_rows: int
) -> TeacherOutputs:
    """The outputs cached under `root` for `key`, computed if they are missing or have changed since.

    Rows go through the teacher by length. They are written next to the final folder and renamed into place, so an
    interrupted run leaves nothing that looks complete.
    """
    key = {**key, "kind": kind}
    folder = root / sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    if folder.is_dir() and not _is_intact(folder, key):
        logger.warning("the teacher's outputs in %s are damaged: computing them again", folder)
        shutil.rmtree(folder)
    if not (folder / META_FILE).exists():
        # Not named by process: a process id can occur again, after a kill or in another container.
        partial = root / f"{folder.name}.partial-{uuid4().hex}"
        partial.mkdir(parents=True)
        try:
            _write(partial, kind, lengths, compute, batch_rows)
            (partial / META_FILE).write_text(json.dumps({**key, "files": _checksums(partial)}, indent=2))
            partial.rename(folder)
        except OSError:
            if not (folder / META_FILE).exists():  # else another run was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return TeacherOutputs(folder)


def _is_intact(folder: Path, key: dict[str, Any]) -> bool:
    try:
        return json.loads((folder / META_FILE).read_text()) == {**key, "files": _checksums(folder)}
    except (OSError, ValueError):
        return False


def _checksums(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.npy"))}


def _write(folder: Path, kind: CacheKind, lengths: list[int], compute: Compute, batch_rows: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    arrays: dict[str, np.memmap] = {}

    def array(name: str, rows: int, like: Tensor) -> np.memmap:
        if name not in arrays:
            path = folder / f"{name}.npy"
            arrays[name] = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, *like.shape))
            _reserve(path)
        return arrays[name]

    for start in range(0, len(order), batch_rows):
        index = order[start : start + batch_rows]
        out = compute(index)
        logits = out.logits.float().cpu()
        array("logits", len(lengths), logits[0])[index] = logits.numpy()
        if kind == "logits":
            continue
        states = torch.stack(out.hidden, dim=2).float().cpu()  # [B, L, K, D]
        if kind == "cls":
            array("states", len(lengths), states[0, 0])[index] = states[:, 0].numpy()
            continue
        for i, row in zip(index, states, strict=True):
            array("states", int(offsets[-1]), row[0])[offsets[i] : offsets[i + 1]] = row[: lengths[i]].numpy()
    for written in arrays.values():
        written.flush()
    np.save(folder / "offsets.npy", offsets)


def _reserve(path: Path) -> None:
    """Give a sparse file its space: writing to a mapping of a full disk would kill the process. Raises RlkdError if the
    disk is full.
    """
    size = path.stat().st_size
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise explained(error, path, size) from error
