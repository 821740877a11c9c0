"""One thread per test process: the suite runs in two of them, and tiny models gain nothing from more."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
