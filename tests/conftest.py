"""Tiny models gain nothing from threads and lose much when test processes share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

torch.set_num_threads(1)
