"""A classifying teacher's outputs, computed once: memory-mapped arrays by row index, so rows may come in any order."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from ...errors import ModelError
from ...io.files import explained
from ...io.files import sha256 as file_sha256
from ...tensors import pad_stack
from ..digests import configuration_digest, tokenizer_digest, weights_digest
from .attention import LayerAttention, RecordedAttention
from .outputs import EncoderOutputs

logger = logging.getLogger(__name__)

FORMAT = 3
PER_ROW = ("logits", "cls")  # the other parts have a line for each token, as have the logits of words
META_FILE = "meta.json"
# Outputs of a batch of rows, for the rows' indices.
Compute = Callable[[list[int]], EncoderOutputs]


class TeacherOutputs:
    """Outputs of every row of a data set, in one array for each part that is cached.

    logits      [rows, C]; of words [tokens of all rows, C]
    cls         [rows, K, D]               [CLS] of the K matched layers
    hidden      [tokens of all rows, K, D] every token of the matched layers: 4 K D bytes a token
    embeddings  [tokens, D]
    attention   [tokens, K, 2, H, d]       queries (times their scaling) and keys, from which maps are computed
    relations   [tokens, 3, H d]           queries, keys and values of the last matched layer
    neurons     [tokens, K, F]             on or off, one byte each
    gradient    [tokens, E]
    """

    def __init__(self, folder: Path):
        meta = json.loads((folder / META_FILE).read_text())
        self.offsets = np.load(folder / "offsets.npy")
        self.parts = {part: np.load(folder / f"{part}.npy", mmap_mode="r") for part in meta["parts"]}

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def batch(self, index: Sequence[int], length: int, device: str | torch.device = "cpu") -> EncoderOutputs:
        """Outputs of the rows of `index` as `_ask_teacher` would give them, of [CLS] alone [B, 1, D] where only that is
        cached. length is L, the batch's padded length; padding is 0. Logits of words are as long as the teacher's
        texts.
        """
        found = {part: self._tensor(part, index, length).to(device) for part in self.parts}
        out = EncoderOutputs(found.pop("logits"))
        if (states := found.get("hidden", found.get("cls"))) is not None:  # [B, L or 1, K, D]
            out = out._replace(hidden=list(states.unbind(2)), plain=list(states.unbind(2)))
        if "attention" in found:
            query, key = found["attention"].transpose(1, 4).unbind(3)  # [B, H, K, L, d]
            pairs = zip(query.unbind(2), key.unbind(2), strict=True)
            out = out._replace(attention=[RecordedAttention(q, k, k, (), 1.0) for q, k in pairs])
        split: dict[str, Any] = {part: found[part].unbind(2) for part in ("relations", "neurons") if part in found}
        whole: dict[str, Any] = {part: [found[part]] for part in ("embeddings", "gradient") if part in found}
        return out._replace(**split, **whole)

    def _tensor(self, part: str, index: Sequence[int], length: int) -> Tensor:
        """The rows of one part [B, ...], with padded tokens as the second axis where it has tokens."""
        array = self.parts[part]
        if part in PER_ROW and len(array) == len(self):  # a row has at least two tokens
            rows = torch.from_numpy(array[list(index)])
            return rows if part == "logits" else rows[:, None]
        spans = [np.array(array[self.offsets[i] : self.offsets[i + 1]]) for i in index]
        grid = pad_stack([torch.from_numpy(span).float() for span in spans])
        if part == "logits":
            return grid
        widened = grid.new_zeros(len(spans), length, *grid.shape[2:])
        widened[:, : grid.shape[1]] = grid
        return widened


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
    root: Path, key: dict[str, Any], parts: Collection[str], lengths: list[int], compute: Compute, batch_rows: int
) -> TeacherOutputs:
    """These parts of the outputs, cached under `root` for `key`, computed if they are missing or have changed since.

    Rows go through the teacher by length. They are written next to the final folder and renamed into place, so an
    interrupted run leaves nothing that looks complete.
    """
    kept = sorted({"logits", *parts} - ({"cls"} if "hidden" in parts else set()))
    key = {**key, "parts": kept}
    folder = root / sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    if folder.is_dir() and not _is_intact(folder, key):
        logger.warning("the teacher's outputs in %s are damaged: computing them again", folder)
        shutil.rmtree(folder)
    if not (folder / META_FILE).exists():
        # Not named by process: a process id can occur again, after a kill or in another container.
        partial = root / f"{folder.name}.partial-{uuid4().hex}"
        partial.mkdir(parents=True)
        try:
            _write(partial, kept, lengths, compute, batch_rows)
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


def _write(folder: Path, parts: Sequence[str], lengths: list[int], compute: Compute, batch_rows: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    arrays: dict[str, np.memmap] = {}

    def array(name: str, rows: int, like: Tensor) -> np.memmap:
        if name not in arrays:
            path = folder / f"{name}.npy"
            kind = np.bool_ if like.dtype == torch.bool else np.float32
            arrays[name] = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=(rows, *like.shape))
            _reserve(path)
        return arrays[name]

    for start in range(0, len(order), batch_rows):
        index = order[start : start + batch_rows]
        out = compute(index)
        for part in parts:
            values = _values(part, out, [lengths[i] for i in index]).detach().cpu()
            if part == "cls" or (part == "logits" and out.logits.dim() == 2):
                array(part, len(lengths), values[0])[index] = values.numpy()
                continue
            for i, row in zip(index, values, strict=True):
                array(part, int(offsets[-1]), row[0])[offsets[i] : offsets[i + 1]] = row[: lengths[i]].numpy()
    for written in arrays.values():
        written.flush()
    np.save(folder / "offsets.npy", offsets)


def _values(part: str, out: EncoderOutputs, lengths: list[int]) -> Tensor:
    """One part of a batch [B, ...] or [B, L, ...], as `TeacherOutputs` stores it."""
    if part == "logits":
        return out.logits.float()
    if part in ("cls", "hidden"):
        states = torch.stack([*out.hidden], dim=2).float()  # [B, L, K, D]
        return states[:, 0] if part == "cls" else states
    if part == "attention":
        return torch.stack([_query_key(layer, lengths) for layer in out.attention], dim=2)
    if part == "neurons":
        return torch.stack([*out.neurons], dim=2) > 0
    if part == "relations":
        return torch.stack([*out.relations], dim=2)
    (one,) = getattr(out, part)
    return torch.as_tensor(one).float()


def _query_key(layer: LayerAttention, lengths: list[int]) -> Tensor:
    """[B, L, 2, H, d]. Raises ModelError where scores also depend on something else, which is not cached."""
    if isinstance(layer, RecordedAttention):
        query, key = (x.transpose(1, 2).float() for x in (layer.query * layer.scaling, layer.key))
        plain = torch.stack([query, key], dim=2)
        # Of two real tokens nothing is added to the score and nothing masked: only padding is.
        whole = [bias.expand(len(lengths), -1, -1, -1) for bias in layer.biases]
        flat = [bias[i, :, :n, :n] for bias in whole for i, n in enumerate(lengths)]
        if all(bool(b.all()) if b.dtype == torch.bool else not b.any() for b in flat):
            return plain
    raise ModelError(
        "teacher: its attention scores depend on more than queries and keys (position biases, local attention, maps "
        "alone), so they cannot be cached. Set teacher_cache to none."
    )


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
