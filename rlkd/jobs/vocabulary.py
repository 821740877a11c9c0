"""`rlkd train-vocabulary` and `rlkd cut-vocabulary`: from rows to a tokenizer, and a model, in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data.rows import check_columns, not_text
from ..errors import ConfigError
from ..models.saving import check_new, new_folder, save_student
from ..models.spec import ModelSpec
from .wiring import RowSource, row_source


@dataclass(frozen=True)
class Corpus:
    """The texts of some columns, row by row, read anew by every pass; missing values are left out."""

    sources: tuple[RowSource, ...]
    columns: tuple[str, ...]

    @classmethod
    def of(cls, datasets: Sequence[str], columns: Sequence[str], settings: Mapping[str, Any]) -> Corpus:
        """settings: of all of them, as in `row_source`. Raises DataError if a column is missing."""
        sources = tuple(row_source({**settings, "dataset": dataset}) for dataset in datasets)
        wanted = {f"column {i}": name for i, name in enumerate(columns, 1)}
        for source in sources:
            check_columns(list(replace(source, limit=1).table()[1]), wanted, source.dataset)
        return cls(sources, tuple(columns))

    def __iter__(self) -> Iterator[str]:
        """Raises DataError for values that are not text."""
        for source in self.sources:
            rows, _ = source.table(self.columns)
            for row in rows:
                for name in self.columns:
                    values = row[name] if isinstance(row[name], list) else [row[name]]
                    for value in values:
                        if not isinstance(value, str | None):
                            raise not_text(source.dataset, name, f"{value!r:.40}", lists=True)
                        if value:
                            yield value


def train_vocabulary(corpus: Corpus, size: int, out: Path) -> str:
    """Train a tokenizer (`models.new_vocabulary`) and write it to the new folder `out`; what was made, in words.

    Raises ConfigError or DataError as `train_tokenizer`, ConfigError if `out` holds something.
    """
    from ..models.new_vocabulary import train_tokenizer

    check_new(out)
    tokenizer = train_tokenizer(corpus, size)
    with new_folder(out) as folder:
        tokenizer.save_pretrained(folder)
    texts, tokens = _tokens(tokenizer, corpus)
    return f"{len(tokenizer):,} tokens; {texts:,} texts have {tokens / texts:.1f} tokens on average"


def cut_vocabulary(name: str, corpus: Corpus, out: Path, *, allow_bin: bool = False) -> str:
    """Write the model with the part of its vocabulary that the corpus uses to the new folder `out`; what was cut, in
    words.

    Raises ModelError for a model that cannot be cut, ConfigError if the texts use all tokens, or `out` holds something.
    """
    from ..models.cut_vocabulary import configs_of, cut_model, cut_tokenizer, kept_ids, parameters_of

    check_new(out)
    spec = ModelSpec(name, "model", allow_bin=allow_bin)
    spec.check()
    tokenizer, model = spec.tokenizer, spec.load()
    keep = kept_ids(tokenizer, lambda: corpus, configs_of(model))
    if len(keep) == len(tokenizer):
        raise ConfigError(f"the texts use all {len(keep):,} tokens of '{name}': there is nothing to cut")
    small, cut = cut_tokenizer(tokenizer, keep, lambda: corpus), cut_model(model, keep)
    with new_folder(out) as folder:
        save_student(cut, folder)
        small.save_pretrained(folder)
    (before, held), (after, holds) = parameters_of(model), parameters_of(cut)
    return (
        f"{len(tokenizer):,} tokens became {len(keep):,}, {before:,} parameters {after:,}; embedding and head were "
        f"{held / before:.0%} of them and are {holds / after:.0%}"
    )


def _tokens(tokenizer: Any, corpus: Corpus) -> tuple[int, int]:
    """Texts, and their tokens."""
    lengths = [len(tokenizer(text, verbose=False)["input_ids"]) for text in corpus]
    return len(lengths), sum(lengths)
