"""One thread per test process: the suite runs in two of them, and tiny models gain nothing from more."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import messages

torch.set_num_threads(1)


def pytest_addoption(parser):
    messages.add_option(parser)


def pytest_configure(config):
    messages.configure(config)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    messages.finish(session)
