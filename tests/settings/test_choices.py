"""Every choice that rlkd offers is checked: in the fields of all dataclasses and in the arguments of public names.

The choices are found by introspection, so that one added later is not forgotten.
"""

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any
from unittest.mock import MagicMock

import pytest

import rlkd
from rlkd.checks import choices_of, field_types, members_of, resolved
from rlkd.errors import ConfigError

TYPO = "typo!"


def choices(annotation: Any, namespace: dict[str, Any]) -> list[Any]:
    """The choices of a type, perhaps given as text; none if other text is allowed too."""
    try:
        hint = resolved(eval(annotation, namespace) if isinstance(annotation, str) else annotation)
    except NameError:  # imported for type checkers only
        return []
    return [] if str in members_of(hint) else choices_of(hint)


def sections() -> Iterator[type]:
    """The dataclasses of all modules."""
    for found in pkgutil.walk_packages(rlkd.__path__, "rlkd."):
        module = importlib.import_module(found.name)
        for name, item in vars(module).items():
            if isinstance(item, type) and is_dataclass(item) and item.__module__ == found.name and name[0] != "_":
                yield item


def fixed(kind: type) -> set[str]:
    """The fields that take no value."""
    return {field.name for field in fields(kind) if not field.init}


def field_choices() -> list[Any]:
    """Those of the fields that rlkd declares."""
    return [
        pytest.param(kind, name, id=f"{kind.__name__}.{name}")
        for kind in sections()
        for base in kind.__mro__
        if base.__module__.startswith("rlkd.")
        for name, annotation in inspect.get_annotations(base).items()
        if name not in fixed(kind) and choices(annotation, vars(sys.modules[base.__module__]))
    ]


def callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public functions, constructors and methods, but those that dataclasses generate."""
    for name in rlkd.__all__:
        item = getattr(rlkd, name)
        if isinstance(item, type):
            if "__init__" in vars(item) and not is_dataclass(item):
                yield name, item
            methods = {method: getattr(member, "__func__", member) for method, member in vars(item).items()}
            yield from ((f"{name}.{m}", f) for m, f in methods.items() if inspect.isfunction(f) and m[0] != "_")
        elif callable(item):
            yield name, item


def arguments(function: Callable[..., Any]) -> dict[str, list[Any]]:
    """The choices of every argument, and of those without choices an empty list."""
    code = inspect.unwrap(function.__init__ if isinstance(function, type) else function)
    namespace = getattr(code, "__globals__", {})
    found = inspect.signature(function).parameters.values()
    return {p.name: choices(p.annotation, namespace) for p in found if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def argument_choices() -> list[Any]:
    return [
        pytest.param(function, argument, id=f"{name}({argument})")
        for name, function in callables()
        for argument, offered in arguments(function).items()
        if offered
    ]


FIELDS, ARGUMENTS = field_choices(), argument_choices()


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_fields_refuse_other_values(kind, name):
    types = field_types(kind)
    required = {
        f.name: next(iter(choices_of(types[f.name])), MagicMock())
        for f in fields(kind)
        if f.init and f.default is f.default_factory
    }
    value = [TYPO] if str(types[name]).startswith("list") else TYPO
    with pytest.raises(ConfigError) as caught:
        kind(**{**required, name: value})
    assert str(caught.value).startswith(f"{name} = {value!r}: allowed are ")


@pytest.mark.parametrize(("function", "name"), ARGUMENTS)
def test_arguments_refuse_other_values(function, name):
    """Before anything is done with the other arguments."""
    parameters = inspect.signature(function).parameters
    required = {
        argument: offered[0] if offered else MagicMock()
        for argument, offered in arguments(function).items()
        if parameters[argument].default is inspect.Parameter.empty
    }
    with pytest.raises(ConfigError) as caught:
        function(**{**required, name: TYPO})
    assert str(caught.value).startswith(f"{name} = {TYPO!r}: allowed are ")


@pytest.mark.parametrize("name", ["lr_scheduler_type", "optim", "eval_strategy", "save_strategy", "log_level"])
def test_fields_of_transformers_refuse_other_values(name, tmp_path):
    with pytest.raises(ConfigError, match=rf"^{name} = 'typo!': allowed are '"):
        rlkd.SupervisedArguments(output_dir=str(tmp_path), **{name: TYPO})


def test_the_choices_are_found():
    names = {parameters.id for parameters in [*FIELDS, *ARGUMENTS]}
    assert names >= {"PPOArguments.kl_in", "TKDArguments.preset", "TKDArguments.tree_exclude", "Teacher.combination"}
    assert names >= {"LabelledDataArguments.metrics", "load_templates(truncation)", "load_task(task)"}
    assert len(names) > 40
