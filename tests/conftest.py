"""One thread per test process: the suite runs in two of them, and tiny models gain nothing from more."""

import gc
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import messages

torch.set_num_threads(1)


# Files that take minutes go first, so that no process is left alone with one of them at the end.
LONGEST = (
    "test_benchmarks.py",
    "test_quoted_commands.py",
    "test_run_faults.py",
    "test_quickstart.py",
    "test_recipes.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


def _freeze():
    """Every training run collects garbage; going through all that was imported takes most of a tiny run's time."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish(session):
    _freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    if nextitem is not None and nextitem.path != item.path:
        _freeze()


def pytest_addoption(parser):
    messages.add_option(parser)


def pytest_configure(config):
    messages.configure(config)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    messages.finish(session)
