"""distill.json: which stages of a run folder are finished, and what they were made with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import ConfigError, DataError, cut
from ..io.files import write_text
from ..io.folders import refuse_other_contents
from ..io.redaction import redacted
from .plan import Stage

RECORD = "distill.json"
GROWS = "max_steps"  # of a warm-up whose regret was still falling


@dataclass
class Record:
    """stages: name -> {settings, finished}; a stage whose folder is gone was never made."""

    out: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, out: Path) -> Record:
        """The record in `out`, empty in a new folder. Raises ConfigError if it holds something else, DataError if the
        record is damaged.
        """
        refuse_other_contents(out, "--out", signs=(RECORD,))
        path = out / RECORD
        if not path.exists():
            if taken := [entry.name for entry in out.glob("*") if entry.is_dir() and not entry.name.startswith(".")]:
                raise ConfigError(f"--out {out} holds something else: {', '.join(taken[:4])}. Name a new folder.")
            return cls(out)
        try:
            stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
            known = {
                name: {"settings": dict(e["settings"]), "finished": bool(e["finished"])} for name, e in stages.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path} is damaged. Restore it, or name a new --out.") from None
        return cls(out, {name: entry for name, entry in known.items() if (out / name).exists()})

    def finished(self, stage: Stage) -> bool:
        return self.stages.get(stage.name, {}).get("finished", False)

    def set(self, stage: Stage, *, finished: bool) -> None:
        """Write that a stage has begun or is finished."""
        self.stages[stage.name] = {"settings": redacted(stage.record(self.out)), "finished": finished}
        content = {"rlkd": __version__, "stages": self.stages}
        write_text(self.out / RECORD, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def check(self, stages: Sequence[Stage]) -> None:
        """Raise ConfigError if a stage was made with other settings, or is missing and later ones are there."""
        for number, stage in enumerate(stages):
            if stage.name not in self.stages:
                continue
            before, now = self.stages[stage.name]["settings"], redacted(stage.record(self.out))
            changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
            if changed == [GROWS] and now[GROWS] > before[GROWS] and not self._saturated(stage):
                self.stages[stage.name]["finished"] = False  # and goes on
            elif changed:
                name = changed[0]
                raise ConfigError(
                    f"--out {self.out}: its stage {stage.name} was made with {name} = {_shown(before.get(name))}, now "
                    f"{_shown(now.get(name))}. Restore it, name a new --out, or have it and what follows made again: "
                    f"{self._removal(stages[number:])}"
                )
        first = next((k for k, stage in enumerate(stages) if not self.finished(stage)), len(stages))
        if self._there(stages[first + 1 :]):
            raise ConfigError(
                f"--out {self.out}: its stage {stages[first].name} is to be made, and what was made from it is there. "
                f"Remove that: {self._removal(stages[first + 1 :])}"
            )

    def readiness(self) -> dict[str, Any]:
        """What the warm-up says of its end; {} without one."""
        try:
            found = json.loads((self.out / "warm-up/run.json").read_text(encoding="utf-8"))
            return found.get("readiness") or {}
        except (OSError, ValueError):
            return {}

    def _saturated(self, stage: Stage) -> bool:
        return stage.name != "warm-up" or self.readiness().get("saturated", True)

    def _there(self, stages: Sequence[Stage]) -> list[str]:
        return [str(self.out / stage.name) for stage in stages if stage.name in self.stages]

    def _removal(self, stages: Sequence[Stage]) -> str:
        return f"rm -r {' '.join(self._there(stages))}"


def _shown(value: Any) -> str:
    return cut(json.dumps(value, ensure_ascii=False), 80)
