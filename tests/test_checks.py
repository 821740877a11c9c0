"""Ranges and choices, checked from their declarations; how YAML and flags use them: `tests/settings/test_config.py`."""

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Annotated, Literal

import pytest
from annotated_types import Gt

from rlkd.checks import Count, Fraction, OneOf, check_choice, check_settings
from rlkd.errors import ConfigError

REGISTRY = {"max": 1, "lse": 2}


class Colour(Enum):
    """As transformers declares choices: an Enum or the text of its value."""

    red = "RED"
    blue = "BLUE"


@dataclass
class Section:
    """One field of every kind."""

    where: Literal["loss", "reward"] = "loss"
    bits: Literal[0, 4, 8] = 0
    maybe: Literal["a", "b"] | None = None
    steps: Literal["auto"] | int = "auto"
    colour: Colour | str = "RED"
    named: Annotated[str, OneOf(REGISTRY)] = "max"
    several: list[Annotated[str, OneOf(("self", "cls"))]] = field(default_factory=list)
    free: str = "anything"
    lam: Fraction = 0.5
    beams: Count | None = None
    rate: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self):
        check_settings(self)


@pytest.mark.parametrize(
    "given",
    [
        {"where": "reward", "bits": 8, "maybe": "b", "steps": 3},
        {"colour": "BLUE"},
        {"colour": Colour.blue},
        {"named": StrEnum("Typer", [("lse", "lse")]).lse},
        {"several": ["cls", "self", "cls"]},
        {"several": ()},
        {"lam": 0, "beams": 1, "rate": 1e-9},
        {"lam": 1.0, "beams": None},
    ],
)
def test_allowed(given):
    assert Section(**given).where in ("loss", "reward")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"where": "rewards"}, "where = 'rewards': allowed are 'loss', 'reward'. Did you mean 'reward'?"),
        ({"where": None}, "where = None: allowed are 'loss', 'reward'."),
        ({"where": ["loss"]}, "where = ['loss']: allowed are 'loss', 'reward'."),
        ({"bits": 5}, "bits = 5: allowed are 0, 4, 8."),
        ({"bits": False}, "bits = False: allowed are 0, 4, 8."),
        ({"maybe": "c"}, "maybe = 'c': allowed are 'a', 'b', null."),
        ({"steps": "never"}, "steps = 'never': allowed are 'auto', whole numbers."),
        ({"colour": "red"}, "colour = 'red': allowed are 'RED', 'BLUE'."),
        ({"named": "maxx"}, "named = 'maxx': allowed are 'max', 'lse'. Did you mean 'max'?"),
        ({"several": ["cls", "x"]}, "several = ['cls', 'x']: allowed are lists of 'self', 'cls'."),
        ({"several": ["clss"]}, "several = ['clss']: allowed are lists of 'self', 'cls'. Did you mean 'cls'?"),
        ({"several": "cls"}, "several = 'cls': allowed are lists of 'self', 'cls'."),
        ({"lam": 1.5}, "lam = 1.5: must be at least 0 and at most 1"),
        ({"lam": float("nan")}, "lam = nan: must be at least 0 and at most 1"),
        ({"lam": "high"}, "lam = 'high': must be at least 0 and at most 1"),
        ({"beams": 0}, "beams = 0: must be at least 1"),
        ({"rate": 0}, "rate = 0: must be above 0"),
    ],
)  # fmt: skip
def test_refused(given, problem):
    with pytest.raises(ConfigError) as caught:
        Section(**given)
    assert str(caught.value) == problem


def test_all_problems_of_a_section_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        Section(rate=-1, named="x", bits=7)
    assert [line.split(" = ")[0] for line in str(caught.value).splitlines()] == ["bits", "named", "rate"]


def test_names_registered_later_are_allowed(monkeypatch):
    with pytest.raises(ConfigError, match=r"named = 'mine': allowed are 'max', 'lse'\.$"):
        Section(named="mine")
    monkeypatch.setitem(REGISTRY, "mine", 3)
    assert Section(named="mine").named == "mine"
    with pytest.raises(ConfigError, match=r"'max', 'lse', 'mine'\. Did you mean 'mine'\?"):
        Section(named="mne")


def test_arguments():
    Strategy = Literal["greedy", "beam"]
    assert check_choice("strategy", "beam", Strategy) is None
    assert check_choice("named", "lse", REGISTRY) is None
    with pytest.raises(ConfigError, match=r"^strategy = 'beem': allowed are 'greedy', 'beam'\. Did you mean 'beam'\?$"):
        check_choice("strategy", "beem", Strategy)
    with pytest.raises(ConfigError, match=r"^named = 3: allowed are 'max', 'lse'\.$"):
        check_choice("named", 3, REGISTRY)


def test_one_of_shows_its_names():
    assert repr(OneOf(REGISTRY)) == "OneOf('max', 'lse')"
