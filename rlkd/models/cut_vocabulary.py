"""A model with the part of its vocabulary that some texts use: same pieces, same logits, a smaller embedding."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .chat import copy_chat, frame
from .languages import has_languages
from .vocabulary import valid_vocab

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Of configurations and generation configurations, beside all that end so: lists of ids that are forbidden.
ID, FORBIDDEN = ("_token_id", "_token_ids"), ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
BATCH = 1000
Texts = Callable[[], Iterable[str]]  # read several times


def kept_ids(tokenizer: Any, texts: Texts, configs: Collection[Any]) -> list[int]:
    """The ids to keep, in order: those of the texts and of the chat template around them, special tokens with a name,
    ids that the configurations name, the characters of all these pieces, and the pieces that they are merged from.

    Raises ModelError for tokenizers that cannot be cut.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"a {type(tokenizer).__name__} is written in Python and cannot be cut: use a fast tokenizer")
    if has_languages(tokenizer):
        raise ModelError("the vocabulary of a model that translates is not cut: all its languages are part of it")
    state, ids, valid = _state(tokenizer), tokenizer.get_vocab(), valid_vocab(tokenizer)
    read = chain(_batches(texts()), [frame(tokenizer)] if frame(tokenizer) else [])
    keep = {token for batch in read for row in tokenizer(batch, verbose=False)["input_ids"] for token in row}
    keep |= {ids[token] for name in NAMED if (token := getattr(tokenizer, name, None)) in ids}
    keep |= {ids[token] for token in _of_processor(state.get("post_processor")) if token in ids}
    keep |= {i for config in configs for i in _named_ids(config) if i < valid}
    pieces = _pieces(state["model"])
    if state["model"]["type"] == "Unigram":  # its penalty of an unknown character is relative to the lowest score
        vocabulary = state["model"]["vocab"]
        keep.add(min(range(len(vocabulary)), key=lambda i: vocabulary[i][1]))
    if state["model"].get("byte_fallback"):
        keep |= {i for piece, i in pieces.items() if len(piece) == 6 and piece.startswith("<0x")}
    if "ByteLevel" in json.dumps(state.get("pre_tokenizer")):
        from tokenizers.pre_tokenizers import ByteLevel

        keep |= {pieces[byte] for byte in ByteLevel.alphabet() if byte in pieces}
    keep |= {pieces[one] for piece, i in pieces.items() if i in keep for one in _characters(piece) if one in pieces}
    return sorted(_with_parts(keep, state["model"], pieces))


def cut_tokenizer(tokenizer: Any, keep: list[int], texts: Texts) -> Any:
    """The tokenizer with the ids `keep`, numbered from 0 in their order.

    Raises ModelError if it would split one of the texts otherwise than before.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state, new = _state(tokenizer), {old: i for i, old in enumerate(keep)}
    _cut_model(state["model"], new)
    state["added_tokens"] = [{**token, "id": new[token["id"]]} for token in state["added_tokens"] if token["id"] in new]
    _renumber(state.get("post_processor"), new)
    named = {name: token for name in NAMED if (token := getattr(tokenizer, name, None)) is not None}
    cut = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        model_input_names=tokenizer.model_input_names,
        **named,
    )
    copy_chat(tokenizer, cut)
    for batch in _batches(texts()):
        before, after = (t(batch, verbose=False)["input_ids"] for t in (tokenizer, cut))
        for text, old, now in zip(batch, before, after, strict=True):
            if [new.get(i) for i in old] != now:
                raise ModelError(
                    f"this {state['model']['type']} tokenizer cannot be cut: {text[:80]!r} would be split otherwise "
                    "than before"
                )
    return cut


def cut_model(model: Any, keep: list[int]) -> Any:
    """A copy of the model whose token i is token keep[i] of `model`: rows of embedding, head and biases are copied, so
    that its logits are those of the kept tokens. Raises ModelError if its vocabulary is not where it is looked for.
    """
    new = {old: i for i, old in enumerate(keep)}
    cut = copy.deepcopy(model)
    for config in configs_of(cut):
        _renumber_config(config, new)
    cut.config.vocab_size = len(keep)
    with torch.device("meta"):  # which tensors have an entry for each token, and in which dimension
        shapes = {name: tensor.shape for name, tensor in type(model)(copy.deepcopy(cut.config)).state_dict().items()}
    index = torch.tensor(keep, device=next(model.parameters()).device)
    done: dict[int, nn.Parameter] = {}  # tied tensors stay tied
    for name, tensor in list(cut.state_dict(keep_vars=True).items()):
        if tensor.shape == shapes[name]:
            continue
        owner, attribute = cut.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if id(tensor) not in done:
            (dimension,) = (d for d, (a, b) in enumerate(zip(tensor.shape, shapes[name], strict=True)) if a != b)
            rows = tensor.detach().index_select(dimension, index)
            done[id(tensor)] = nn.Parameter(rows, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else rows
        setattr(owner, attribute, done[id(tensor)])
    if len(cut.get_input_embeddings().weight) != len(keep):
        raise ModelError(
            f"a {type(model).__name__} has vocabularies in its parts' configurations, and cannot be cut: take a model "
            "of another family"
        )
    for module in cut.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings != len(module.weight):
            module.num_embeddings = len(keep)
            module.padding_idx = None if module.padding_idx is None else new.get(module.padding_idx)
        elif isinstance(module, nn.Linear):
            module.out_features = len(module.weight)
    return cut


# Tokenizers, as the JSON of the tokenizers library


def _state(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _batches(texts: Iterable[str]) -> Iterable[list[str]]:
    rows = iter(texts)
    while batch := list(islice(rows, BATCH)):
        yield batch


def _pieces(model: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = model["vocab"]
    return vocabulary if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}


def _characters(piece: str) -> list[str]:
    """Those of a piece, as they are and as WordPiece continues a word with them."""
    return [*piece, *(f"##{one}" for one in piece)]


def _with_parts(keep: set[int], model: Mapping[str, Any], pieces: Mapping[str, int]) -> set[int]:
    """The pieces, and all that BPE merges on the way to them: then the same merges apply to the same texts."""
    sources: dict[int, list[int]] = {}
    for left, right in _merges(model):
        if left + right in pieces:
            sources.setdefault(pieces[left + right], []).extend((pieces[left], pieces[right]))
    found, waiting = set(keep), list(keep)
    while waiting:
        for part in sources.get(waiting.pop(), ()):
            if part not in found:
                found.add(part)
                waiting.append(part)
    return found


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs; older files have them as one text."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ()))
    return [(left, right) for left, right in pairs]


def _cut_model(model: dict[str, Any], new: Mapping[int, int]) -> None:
    pieces = _pieces(model)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {piece: new[i] for piece, i in pieces.items() if i in new}
    else:
        model["vocab"] = [pair for i, pair in enumerate(model["vocab"]) if i in new]
        model["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
    if "merges" in model:
        held = model["vocab"]
        model["merges"] = [[a, b] for a, b in _merges(model) if {a, b, a + b} <= held.keys()]


def _of_processor(state: Any) -> set[str]:
    """The special tokens that a post-processor adds."""
    if isinstance(state, dict):
        own = set(state["special_tokens"]) if isinstance(state.get("special_tokens"), dict) else set()
        pairs = {state[name][0] for name in ("sep", "cls") if isinstance(state.get(name), list)}
        return own | pairs | {token for part in state.get("processors", ()) for token in _of_processor(part)}
    return set()


def _renumber(state: Any, new: Mapping[int, int]) -> None:
    """A post-processor's ids, in place."""
    if not isinstance(state, dict):
        return
    for token in (state.get("special_tokens") or {}).values():
        token["ids"] = [new[i] for i in token["ids"]]
    for name in ("sep", "cls"):
        if isinstance(state.get(name), list):
            state[name] = [state[name][0], new[state[name][1]]]
    for part in state.get("processors", ()):
        _renumber(part, new)


# Configurations


def configs_of(model: Any) -> list[Any]:
    """The configurations that name tokens: the model's, and that of its generation."""
    generation = getattr(model, "generation_config", None)
    return [model.config] if generation is None else [model.config, generation]


def _named_ids(config: Any) -> set[int]:
    """Ids of tokens with a role; forbidden ones need not be kept."""
    found: set[int] = set()
    for name, value in config.to_dict().items():
        if name.endswith(ID):
            found |= {value} if isinstance(value, int) else {i for i in value or () if isinstance(i, int)}
    return {i for i in found if i >= 0}


def _renumber_config(config: Any, new: Mapping[int, int]) -> None:
    for name, value in config.to_dict().items():
        if name.endswith(ID) and value is not None:
            setattr(config, name, new.get(value, value) if isinstance(value, int) else [new[i] for i in value])
        elif name in FORBIDDEN and value:
            rows = [row for row in value if set(row if isinstance(row, list) else [row]) <= new.keys()]
            setattr(config, name, [[new[i] for i in r] if isinstance(r, list) else new[r] for r in rows] or None)


def parameters_of(model: Any) -> tuple[int, int]:
    """(all parameters, those of embedding and head), tied ones once."""
    heads: dict[int, Tensor] = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            heads[id(module.weight)] = module.weight
    return sum(p.numel() for p in model.parameters()), sum(weight.numel() for weight in heads.values())
