"""What a forward of an encoder gives to the terms of the loss, and the student with the projections they need."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..loading import load_pretrained
from .attention import AttentionMap, AttentionSource, LayerAttention, RecordedAttention, recorded_attention

# What a term may need of a model: its logits; [CLS] of every layer; every token of every layer; what its first layer
# reads; the order within attention rows; attention maps with a gradient; queries, keys and values of the last layer;
# the feed-forward networks before their activation function; the gradient of a logit by the word embeddings.
Need = Literal["logits", "cls", "hidden", "embeddings", "tree", "attention", "relations", "neurons", "gradient"]
ATTENTION_NEEDS: frozenset[Need] = frozenset({"tree", "attention", "relations"})
INNER_WIDTHS = ("hidden_dim", "intermediate_size")  # as configurations call the neurons of a feed-forward network
PROJECTIONS_FILE = "projections.safetensors"


class EncoderOutputs(NamedTuple):
    """Outputs of one forward. All but the logits are empty unless they are needed.

    logits      [B, C]; of words [B, L, C] as the model gives them, for the loss [words, C]
    hidden      outputs of the layers [B, L, D], layer 1 first; of a student, with the teacher's width
    plain       the same before any projection
    embeddings  what layer 1 reads: none, or one of [B, L, D]
    attention   of every layer, layer 1 first
    relations   queries, keys and values of the last layer: three of [B, L, H d]
    neurons     responses of every layer's feed-forward network before its activation function [B, L, F]
    inputs      word embeddings, in the graph: none, or one of [B, L, E]
    gradient    of the teacher's chosen logit by its inputs, normalised: none, or one of [B, L, E]
    """

    logits: Tensor
    hidden: Sequence[Tensor] = ()
    plain: Sequence[Tensor] = ()
    embeddings: Sequence[Tensor] = ()
    attention: Sequence[LayerAttention] = ()
    relations: Sequence[Tensor] = ()
    neurons: Sequence[Tensor] = ()
    inputs: Sequence[Tensor] = ()
    gradient: Sequence[Tensor] = ()


def run_encoder(
    model: Any, inputs: dict[str, Tensor], needs: Collection[str] = (), attention: AttentionSource | None = None
) -> EncoderOutputs:
    """One forward of a sequence classifier on input_ids, attention_mask [B, L] and the like.

    needs: of `Need`; attention is the value of `prepare_attention` for the model, or None where none is needed.
    """
    reads, states = bool(ATTENTION_NEEDS.intersection(needs)), bool({"cls", "hidden", "embeddings"}.intersection(needs))
    maps = reads and attention == "eager"
    with (
        recorded_attention() as record,
        _recorded_neurons(model, "neurons" in needs) as neurons,
        _recorded_inputs(model, "gradient" in needs) as words,
        # The fast kernels cannot be differentiated twice.
        sdpa_kernel(SDPBackend.MATH) if "gradient" in needs else nullcontext(),
    ):
        out = model(**inputs, output_hidden_states=states, output_attentions=maps)
    read: Sequence[LayerAttention] = []
    if reads:
        read = [AttentionMap(a) for a in out.attentions] if maps else record
    layers = list(out.hidden_states[1:]) if states else []
    last = read[-1] if "relations" in needs else None
    return EncoderOutputs(
        out.logits,
        hidden=layers,
        plain=layers,
        embeddings=[out.hidden_states[0]] if "embeddings" in needs else [],
        attention=read,
        relations=last.vectors() if isinstance(last, RecordedAttention) else [],
        neurons=neurons,
        inputs=words,
    )


def matched_outputs(out: EncoderOutputs, layers: Sequence[int]) -> EncoderOutputs:
    """The outputs of these layers (from 1) of a teacher; relations are those of the last of them."""

    def chosen(of_layers: Sequence[Any]) -> list[Any]:
        return [of_layers[k - 1] for k in layers] if of_layers else []

    attention = chosen(out.attention)
    if out.relations:
        out = out._replace(relations=attention[-1].vectors())
    return out._replace(
        hidden=chosen(out.hidden), plain=chosen(out.plain), attention=attention, neurons=chosen(out.neurons)
    )


@contextmanager
def _recorded_neurons(model: Any, wanted: bool) -> Iterator[list[Tensor]]:
    record: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: record.append(out)) for layer in feed_forwards(model)
             ] if wanted else []  # fmt: skip
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _recorded_inputs(model: Any, wanted: bool) -> Iterator[list[Tensor]]:
    """The word embeddings as the model reads them; of a frozen model as leaves that want a gradient."""
    record: list[Tensor] = []

    def keep(_: Any, __: Any, out: Tensor) -> Tensor:
        out = out if out.requires_grad else out.detach().requires_grad_()
        record.append(out)
        return out

    hook = model.get_input_embeddings().register_forward_hook(keep) if wanted else None
    try:
        yield record
    finally:
        if hook is not None:
            hook.remove()


def feed_forwards(model: Any) -> list[nn.Linear]:
    """The first linear map of every layer's feed-forward network, in order; one where layers share it (ALBERT).

    It is told by its sizes. Empty where none is found, e.g. in gated networks, which have no such neurons.
    """
    width, linear = width_of(model.config), [module for module in model.modules() if isinstance(module, nn.Linear)]
    for inner in (getattr(model.config, name, 0) for name in INNER_WIDTHS):
        found = [one for one in linear if (one.in_features, one.out_features) == (width, inner)]
        if found and inner != width:
            return found
    return []


def inner_width(model: Any) -> int:
    """Neurons of a feed-forward network; 0 if none is found."""
    found = feed_forwards(model)
    return found[0].out_features if found else 0


def width_of(config: Any) -> int:
    """Width of a model's hidden states; those of a bidirectional network join both directions."""
    return int(getattr(config, "output_width", config.hidden_size))


class EncoderStudent(nn.Module):
    """The student and, where widths differ, one trainable projection per compared layer, never saved with the student.

    Args: widths, the teacher's, of what is compared element by element: hidden, embeddings, neurons. Under
    DistributedDataParallel this forward is the only entry that carries gradients.
    """

    def __init__(
        self,
        student: Any,
        *,
        widths: Mapping[str, int] | None = None,
        attention: AttentionSource | None = None,
    ):
        super().__init__()
        self.student, self.attention = student, attention
        width, layers = width_of(student.config), student.config.num_hidden_layers
        own = {
            "hidden": (width, layers),
            "embeddings": (width, 1),
            "neurons": (inner_width(student), layers),
        }
        self.projections = nn.ModuleDict(
            {
                part: nn.ModuleList(nn.Linear(own[part][0], theirs, bias=False) for _ in range(own[part][1]))
                for part, theirs in (widths or {}).items()
                if theirs != own[part][0]
            }
        ).to(next(student.parameters()).device)

    @property
    def config(self) -> Any:
        return self.student.config

    def forward(self, inputs: dict[str, Tensor], needs: Collection[str] = ()) -> EncoderOutputs:
        """Outputs of the student; those that are compared element by element have the teacher's widths."""
        out = run_encoder(self.student, inputs, needs, self.attention)
        if not self.projections:
            return out
        projected = {
            part: [project(x) for project, x in zip(cast(nn.ModuleList, maps), getattr(out, part), strict=True)]
            for part, maps in self.projections.items()
            if getattr(out, part)
        }
        # Part of every backward pass, as DistributedDataParallel requires of all parameters.
        unused = sum(p.sum() for p in self.projections.parameters())
        return out._replace(logits=out.logits + 0.0 * unused, **projected)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Called by the Trainer for `gradient_checkpointing`."""
        self.student.gradient_checkpointing_enable(**options)

    def save_projections(self, folder: str | Path) -> None:
        """Write the projections next to a checkpoint's student, if there are any."""
        from safetensors.torch import save_file

        if self.projections:
            save_file(self.projections.state_dict(), Path(folder) / PROJECTIONS_FILE)

    def load(self, folder: str | Path) -> None:
        """Load in place a saved student, and the projections if they are next to it."""
        from safetensors.torch import load_file

        dtype = next(self.student.parameters()).dtype
        loaded = load_pretrained(
            type(self.student), str(folder), "student", config=copy.deepcopy(self.config), dtype=dtype
        )
        self.student.load_state_dict(loaded.state_dict())
        path = Path(folder) / PROJECTIONS_FILE
        if self.projections and path.exists():
            self.projections.load_state_dict(load_file(path))
