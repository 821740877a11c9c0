"""Data sets of the hub, loaded or streamed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import datasets

from ..errors import DataError
from ..templates.aliases import hub_id
from .files import allowed_sources
from .tables import first_line


def load_hub(source: str, split: str, subset: str | None, revision: str | None = None, *, streaming: bool) -> Any:
    """A data set of the hub, by its id or former name (see `aliases`). Raises DataError if it cannot be loaded."""
    try:
        how: dict[str, Any] = {"revision": revision, "streaming": streaming, "trust_remote_code": False}
        return datasets.load_dataset(hub_id(source), subset, split=split, **how)
    # The library, the hub client and the HTTP stack each have their own errors; to the user all mean the same.
    except Exception as error:
        home = f"'{source}'" if hub_id(source) == source else f"'{source}' ({hub_id(source)} on the hub)"
        wanted = home + (f", subset '{subset}'" if subset else "") + f", split '{split}'"
        raise DataError(
            f"{wanted} is neither a local path nor a data set that could be loaded from the hub.\n"
            f"  {type(error).__name__}: {first_line(error)}\n"
            f"Check the name, the subset and the split. Local data: {allowed_sources()}."
        ) from error


class HubRows:
    """Rows of a hub data set, streamed; from the local cache if the hub cannot be reached."""

    cells = False

    def __init__(self, source: str, split: str, subset: str | None, only: Collection[str] | None = None):
        self.source, self.split, self.subset = source, split, subset
        self.files: list[Path] = []
        try:
            self.rows = load_hub(source, split, subset, streaming=True)
        except DataError:
            self.rows = load_hub(source, split, subset, streaming=False)
        features = getattr(self.rows, "features", None)
        self.kinds = {name: str(getattr(kind, "dtype", kind)) for name, kind in (features or {}).items()}
        if only is not None and features:
            self.rows = self.rows.select_columns([name for name in features if name in only])

    @property
    def names(self) -> dict[str, None]:
        return dict.fromkeys(self.columns())

    def where(self, place: int) -> str:
        return f"'{self.source}', row {place}"

    def records(self) -> Iterator[tuple[int, Any]]:
        number = 0
        try:
            for row in self.rows:
                number += 1
                yield number, row
        # As in `load_hub`: a download raises errors of many kinds.
        except Exception as error:
            raise DataError(
                f"{self.where(number + 1)} cannot be read: {type(error).__name__}: {first_line(error)}. "
                "What was written so far is kept: repeat the command to continue."
            ) from error

    def parse(self, place: int, raw: Any) -> dict[str, Any]:
        return raw

    def columns(self) -> dict[str, str]:
        """Column -> type, also of columns that are not read; from the data set's card or from its first row."""
        if not self.kinds:
            first: dict[str, Any] = next(iter(self.rows), {})
            self.kinds = {name: type(value).__name__ for name, value in first.items()}
        return self.kinds

    def count(self, limit: int | None) -> int | None:
        """The number of rows according to the hub, at most `limit`; None if the hub does not give it."""
        known = (self.rows.info.splits or {}).get(self.split)
        if known is None or not known.num_examples:
            return None
        return min(known.num_examples, limit or known.num_examples)

    def identity(self) -> dict[str, Any]:
        """Repository, subset, split and the commit that is read, None if the hub cannot be reached."""
        from huggingface_hub import HfApi

        try:
            commit = HfApi().dataset_info(hub_id(self.source)).sha
        except Exception:  # offline
            commit = None
        return {"dataset": self.source, "subset": self.subset, "split": self.split, "commit": commit}
