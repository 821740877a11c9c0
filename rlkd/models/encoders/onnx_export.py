"""A classifier as ONNX, through torch's own exporter, compared with PyTorch before it is kept."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...choices import ProblemType
from ...errors import ConfigError, ModelError
from ...io.files import make_folder
from ...io.folders import refuse_other_contents
from ...tensors import length_mask
from ..loading import load_config, load_pretrained
from ..vocabulary import load_tokenizer
from .labels import auto_class, head_of, problem_of

MODEL_FILE = "model.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Agreement(NamedTuple):
    """How far the two runtimes differ: the largest |difference| of logits, and the share of rows with the same label
    (or labels), None for outputs that are numbers.
    """

    largest_difference: float
    same_label: float | None
    rows: int

    def __str__(self) -> str:
        labels = "" if self.same_label is None else f", same label in {self.same_label:.1%}"
        return f"logits within {self.largest_difference:.1e} of PyTorch's{labels} of {self.rows} random rows"


class _Logits(nn.Module):
    """The model as a function of tensors in a fixed order, which the exporter wants."""

    def __init__(self, model: Any, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def require_onnx() -> None:
    """Raises ConfigError if a package of the extra `onnx` is missing."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"ONNX needs {', '.join(missing)}: pip install 'rlkd[onnx]'")


def export_onnx(
    model: str | Path, folder: str | Path, *, tolerance: float = 1e-4, allow_bin: bool = False
) -> Agreement:
    """Write `folder`/model.onnx, the configuration and the tokenizer of a saved sequence or token classifier.

    Inputs input_ids, attention_mask (and token_type_ids) [batch, tokens], both of any size; output logits
    [batch, labels], of a token classifier [batch, tokens, labels], in float32. The file is compared with PyTorch on
    ragged batches of random tokens, and kept only if no logit differs by more than `tolerance` (times the largest
    logit, if that is above 1).
    Raises ConfigError without the extra, or if the folder holds something else; ModelError if the model is not a
    classifier, cannot be exported, or disagrees with PyTorch.
    """
    require_onnx()
    refuse_other_contents(Path(folder), "the folder", signs=(MODEL_FILE,))
    config, tokenizer = load_config(str(model), "model"), load_tokenizer(str(model), "model")
    classifier = _load(str(model), config, allow_bin)
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in tokenizer.model_input_names]
    names = [name for name in names if name != "token_type_ids" or getattr(config, "type_vocab_size", 0) > 1]
    folder = Path(folder)
    make_folder(folder)
    written = folder / f"{MODEL_FILE}.new"
    try:
        _write(classifier, names, written)
        agreement = _compare(classifier, names, written, tolerance)
        written.replace(folder / MODEL_FILE)
    finally:
        written.unlink(missing_ok=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return agreement


def _load(name: str, config: Any, allow_bin: bool) -> Any:
    kinds = config.architectures or []
    if head_of(config) is None:
        raise ModelError(
            f"'{name}' is a {', '.join(kinds) or 'model without a head'}, not a sequence or token classifier. Models "
            "that generate: rlkd export --to ctranslate2."
        )
    model = load_pretrained(auto_class(config), name, "model", config=config, dtype=torch.float32, allow_bin=allow_bin)
    return model.eval()


def _write(model: Any, names: list[str], path: Path) -> None:
    example = _batch(model.config, [5, 3], names, seed=0)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    try:
        with _quiet():
            torch.onnx.export(
                _Logits(model, names),
                tuple(example.values()),
                path,
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=(tuple({0: batch, 1: tokens} for _ in names),),
                external_data=False,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ModelError(f"torch cannot export a '{model.config.model_type}' model to ONNX: {reason}") from error


def _compare(model: Any, names: list[str], path: Path, tolerance: float) -> Agreement:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest, scale, equal, rows, kind = 0.0, 1.0, 0, 0, problem_of(model.config)
    for seed, lengths in enumerate([[1], [7], [2, 9, 4], [16, 3, 11, 1, 8], [30, 30]]):
        batch = _batch(model.config, lengths, names, seed)
        with torch.inference_mode():
            expected = model(**batch).logits
        (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in batch.items()})
        logits = torch.from_numpy(found)
        largest = max(largest, float((logits - expected).abs().max()))
        scale = max(scale, float(expected.abs().max()))
        equal, rows = equal + _same_labels(logits, expected, kind), rows + len(lengths)
    agreement = Agreement(largest, None if kind == "regression" else equal / rows, rows)
    if not largest <= tolerance * scale:
        raise ModelError(
            f"ONNX and PyTorch differ by {largest:.2g} in a logit, more than {tolerance * scale:.2g} ({agreement}). "
            "Nothing was written."
        )
    return agreement


def _same_labels(logits: Tensor, expected: Tensor, problem_type: ProblemType) -> int:
    """The number of rows whose label, or labels, are the same."""
    if problem_type == "multi_label_classification":
        return int(((logits > 0) == (expected > 0)).all(-1).sum())
    return int((logits.argmax(-1) == expected.argmax(-1)).view(len(logits), -1).all(-1).sum())  # of words, all tags


def _batch(config: Any, lengths: list[int], names: list[str], seed: int) -> dict[str, Tensor]:
    """Random tokens, padded on the right as in training."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [min(n, getattr(config, "max_position_embeddings", n) - 2) for n in lengths]
    mask = length_mask(lengths).long()
    ids = torch.randint(0, config.vocab_size, mask.shape, generator=draw)
    pad = config.pad_token_id or 0
    ids = torch.where(ids == pad, (pad + 1) % config.vocab_size, ids)  # no padding inside a text
    return {
        name: {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}.get(name, torch.zeros_like(ids))
        for name in names
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about its own deprecations and about a missing torchvision, which is not needed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
