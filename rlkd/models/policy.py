"""The trained policy: a plain student model, its head in chunks, and a value head that never enters the saved
student.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..objectives.policy import token_logps, token_statistics
from ..records import given
from ..sharding import is_sharded, load_whole
from ..tensors import unpack
from .encoder_decoder import Layers
from .heads import HeadOverStates, RowLoss, TokenFunction
from .language_model import LanguageModel
from .loading import load_pretrained
from .saving import save_student

VALUE_HEAD_FILE = "value_head.safetensors"


class LayerProjections(nn.Module):
    """The layers of a student in the width of its teacher's: one linear map per layer where widths differ, else as they
    are. It is trained with the student and never saved with it.

    layers  numbers of layers of encoder and decoder; 0 for a part that is not compared;  scores, whether attention is
    seed    of the initial weights, which are drawn as nn.Linear draws them
    """

    def __init__(self, width: int, teacher_width: int, layers: Sequence[int], *, scores: bool, seed: int):
        super().__init__()
        self.scores = scores
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder, self.decoder = (
                nn.ModuleList(
                    nn.Linear(width, teacher_width, bias=False) for _ in range(n if width != teacher_width else 0)
                )
                for n in layers
            )

    @property
    def parts(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        """The maps of encoder and decoder."""
        return self.encoder, self.decoder

    @property
    def learned(self) -> bool:
        """Whether widths differ."""
        return any(len(maps) for maps in self.parts)

    def forward(self, layers: Sequence[Layers]) -> list[Layers]:
        """Encoder's and decoder's layers, with hidden states [B, L, teacher's width]."""
        found = []
        for maps, part in zip(self.parts, layers, strict=True):
            hidden = (
                tuple(project(h) for project, h in zip(maps, part.hidden, strict=True)) if len(maps) else part.hidden
            )
            found.append(replace(part, hidden=hidden))
        return found


class Policy(nn.Module):
    """The student as a policy over valid tokens, optionally with a critic.

    One forward runs model and head for given answers; what a loss needs from the logits is passed in as a function of
    one chunk of them. Under DistributedDataParallel this forward is the only entry that carries gradients.

    lm       the student as a LanguageModel; student is the transformers model in it
    critic   add a value head on the D inputs of the vocabulary head
    """

    def __init__(self, lm: LanguageModel, *, critic: bool = False):
        super().__init__()
        self.lm = lm
        self.student = lm.model
        self.projections: LayerProjections | None = None  # of a trainer that compares layers with the teacher's
        self.value_head = nn.Linear(lm.width, 1) if critic else None
        if self.value_head is not None:
            # Starts at 0: the residual critic then equals the teacher's own value.
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            self.value_head.to(lm.device)

    @property
    def config(self) -> Any:
        return self.student.config

    def forward(
        self,
        input_ids: Tensor,
        input_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        statistics: TokenFunction = token_statistics,
        token_args: tuple[Tensor, ...] = (),
        labels: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
        loss: RowLoss | None = None,
    ) -> tuple[Any, ...]:
        """Token statistics and critic values of given answers, or a loss made of them.

        Args: input_ids, input_mask [B, P]; answer_ids, answer_mask [B, R]; statistics, a function of
        (logits [n, V], ids [n], *token_args [n, ...]) returning a tuple of [n]; token_args, tensors [B, R, ...];
        labels, the same four tensors of other answers [B', R']; loss, called with rows, their statistics and values
        [b, R].
        Returns: one [B, R] tensor per statistic and the values [B, R] (zeros without a critic), 0 at padding; with a
        loss what `Head.loss` returns instead, and gradients go through it alone, and with `projections` the layers in
        the teacher's width, too; with labels also their log-probabilities [B', R']. All in the same forward, as
        DistributedDataParallel allows only one.
        """
        layers = None
        if loss is not None and self.projections is not None:
            layers = self.lm.layers(  # type: ignore[attr-defined]
                input_ids, input_mask, answer_ids, answer_mask, scores=self.projections.scores
            )
            hidden = layers[1].hidden[-1][answer_mask]
        else:
            hidden = self._hidden(input_ids, input_mask, answer_ids, answer_mask)
        token_args = tuple(a[answer_mask] for a in token_args)
        head = self.lm.head()
        limits = head.rules.limits(answer_ids, answer_mask)
        token_args = (answer_ids[answer_mask], *token_args)
        found: tuple[Any, ...]
        if loss is None:
            outputs = head.map(statistics, hidden, *token_args, limits=limits)
            found = tuple(unpack(o, answer_mask) for o in outputs), self._values(hidden, answer_mask)
        else:

            def of_rows(rows: slice, outputs: tuple[Tensor, ...], values: Tensor) -> tuple[Tensor, Any]:
                mask = answer_mask[rows]
                return loss(rows, tuple(unpack(o, mask) for o in outputs), unpack(values, mask))

            values, row_tokens = self._values(hidden, answer_mask)[answer_mask], answer_mask.sum(1).tolist()
            found = head.loss(
                statistics, of_rows, hidden, *token_args, row_tokens=row_tokens, values=values, limits=limits
            )
            if layers is not None:
                found = (*found, given(self.projections)(layers))
        return found if labels is None else (*found, self.forward(*labels)[0][0])

    def values(self, input_ids: Tensor, input_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
        """The critic's values alone, [B, R], as `forward` gives them, without the vocabulary."""
        return self._values(self._hidden(input_ids, input_mask, answer_ids, answer_mask), answer_mask)

    @torch.no_grad()
    def score(
        self, input_ids: Tensor, input_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor
    ) -> tuple[Tensor, HeadOverStates]:
        """Log-probability of each answer token, [B, R], and the next-token distributions, kept as head inputs."""
        hidden, head = self._hidden(input_ids, input_mask, answer_ids, answer_mask), self.lm.head()
        limits = head.rules.limits(answer_ids, answer_mask)
        (logps,) = head.map(token_logps, hidden, answer_ids[answer_mask], limits=limits)
        given_limits = None if limits is None else unpack(limits, answer_mask)
        return unpack(logps, answer_mask), HeadOverStates(unpack(hidden, answer_mask), head, given_limits)

    def _hidden(self, input_ids: Tensor, input_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
        """The head's inputs at the answers' tokens, [N, D]."""
        states = self._prompt_states(input_ids, input_mask)
        return self.lm.answer_hidden(states, answer_ids, answer_mask, self._batch_tokens)

    @property
    def _batch_tokens(self) -> int | None:
        """Each forward of a sharded layer gathers its weights, so all processes must run as many: one for all rows."""
        return None if is_sharded(self) and torch.is_grad_enabled() else 4096

    def _values(self, hidden: Tensor, answer_mask: Tensor) -> Tensor:
        if self.value_head is None:
            return torch.zeros(answer_mask.shape, device=answer_mask.device)
        return unpack(self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1), answer_mask)

    def _prompt_states(self, input_ids: Tensor, input_mask: Tensor) -> list[Tensor]:
        """The state of each row's prompt; one that several rollouts share is computed once."""
        rows = zip(input_ids.tolist(), input_mask.tolist(), strict=True)
        prompts = [tuple(token for token, valid in zip(*row, strict=True) if valid) for row in rows]
        unique = list(dict.fromkeys(prompts))
        computed = self.lm.prompt_states([list(prompt) for prompt in unique], self._batch_tokens)
        states = dict(zip(unique, computed, strict=True))
        return [states[prompt] for prompt in prompts]

    @property
    def _no_split_modules(self) -> list[str]:
        """The class names of the student's layers: FSDP2 shards them one by one."""
        present = {type(module).__name__ for module in self.student.modules()}
        return sorted(present & set(self.student._no_split_modules or ()))

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass: called by the Trainer for `gradient_checkpointing`."""
        self.student.gradient_checkpointing_enable(**options)

    def frozen_copy(self) -> Policy:
        """An independent copy without gradients: the behaviour policy or the reference policy. Parameters that are not
        trained (PEFT's base model) are the same in both.
        """
        untrained = {id(p): p for p in self.parameters() if not p.requires_grad}
        return copy.deepcopy(self, untrained).eval().requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        """Write the bare student as `from_pretrained` loads it."""
        save_student(self.student, folder)

    def save_value_head(self, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the critic, if there is one, next to a saved student. weights: of a sharded policy, whole."""
        from safetensors.torch import save_file

        if self.value_head is not None:
            own = self.value_head.state_dict()
            whole = own if weights is None else {name: weights[f"value_head.{name}"] for name in own}
            save_file(whole, Path(folder) / VALUE_HEAD_FILE)

    def load(self, folder: str | Path) -> None:
        """Load in place what `save` and `save_value_head` wrote. Raises OSError if the folder lacks the critic this
        policy has.
        """
        from safetensors.torch import load_file

        device = next(self.parameters()).device
        if hasattr(self.student, "peft_config"):
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(self.student, load_peft_weights(str(folder), device=str(device)))
        else:
            config, dtype = copy.deepcopy(self.config), next(self.student.parameters()).dtype
            loaded = load_pretrained(type(self.student), str(folder), "student", config=config, dtype=dtype)
            load_whole(self.student, loaded.state_dict())
        if self.value_head is not None:
            load_whole(self.value_head, load_file(Path(folder) / VALUE_HEAD_FILE, device=str(device)))
