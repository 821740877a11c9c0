"""`rlkd merge-adapter`, and the option that commands which load models share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..models.spec import Dtype

AllowBin = Annotated[
    bool,
    typer.Option(
        "--allow-bin", help="Load pickled weights (.bin, with weights_only) where a model has no safetensors."
    ),
]


def merge_adapter(
    adapter: Annotated[str, typer.Argument(help="A PEFT adapter, as a run with use_peft saves it: folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the merged model and its tokenizer to.")],
    dtype: Annotated[Dtype, typer.Option(help="Precision of the merged weights.")] = "float32",
    allow_bin: AllowBin = False,
) -> None:
    """Merge an adapter into its base model: a plain model that any program reads."""
    from ..models.saving import merge_adapter

    merge_adapter(adapter, out, dtype=dtype, allow_bin=allow_bin)
    typer.echo(out)
