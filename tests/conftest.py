"""Tiny models gain nothing from threads and lose much when test processes share the cores.

Without a GPU the Triton kernels are tested in Triton's interpreter, which must be chosen before they are first imported.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
