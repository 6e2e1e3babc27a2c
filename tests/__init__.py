"""Before anything imports torch, here or in a process that a test starts: one thread, unless the environment says more.
If the environment pretends another processor (ATEN_CPU_CAPABILITY), compiled code has a cache of its own: Inductor's is
not told apart by it, and code for other vectors does not compile, or computes something else.

Test processes share the machine's cores, and threads of two processes that wait for one another on the same cores take
ten times as long.
"""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
if pretended := os.environ.get("ATEN_CPU_CAPABILITY"):
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"torchinductor-{pretended}"))
