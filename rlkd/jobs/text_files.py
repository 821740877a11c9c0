"""How text files with rows are read: settings that the recipes of all trainers share."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class TextFileArguments:
    """What a text file does not say of itself; fields as in `TextFormat`, which checks them."""

    delimiter: str | None = field(
        default=None, metadata={"help": "Delimiter of .csv and .tsv files, one character or tab; null: found in them."}
    )
    encoding: str | None = field(
        default=None, metadata={"help": "Encoding of text files; null: UTF-8, or what a byte order mark says."}
    )
    columns: list[str] = field(
        default_factory=list, metadata={"help": "Column names of .csv and .tsv files without a header."}
    )
