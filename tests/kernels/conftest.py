"""The Triton kernels run on a GPU where there is one, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, and other tests import Triton. So ``fused/`` is collected
where its tests can run, on a GPU or under ``TRITON_INTERPRET=1``, and ``test_kernels_interpreter.py`` runs it in a
process of its own otherwise.
"""

import os

import torch

collect_ignore = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["fused"]
