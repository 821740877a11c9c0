"""Paths that are URLs: what is no input is refused, for nothing is written to object storage."""

from __future__ import annotations

import re

from ..errors import ConfigError
from .redaction import redacted

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # a Path has one slash
COPY_COMMANDS = {"s3": "aws s3 sync", "gs": "gcloud storage rsync -r", "gcs": "gcloud storage rsync -r"}


def is_remote(source: object) -> bool:
    """Whether a source names files by a URL."""
    return URL.match(str(source)) is not None


def refuse_remote(path: object, what: str = "path") -> None:
    """Raise ConfigError if a path that is not an input is a URL; what, the setting that names it."""
    if (found := URL.match(str(path))) is None:
        return
    scheme = found[1].lower()
    copy = COPY_COMMANDS.get(scheme, "rclone copy")
    raise ConfigError(
        f"{what} = '{redacted(str(path))}': object storage is only read, and only rows and label folders "
        f"(dataset, pseudo_labels and the like): name a local folder, and copy it with `{copy}`"
    )
