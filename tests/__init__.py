"""Before anything imports torch, here or in a process that a test starts: one thread, unless the environment says more.

Test processes share the machine's cores, and threads of two processes that wait for one another on the same cores take
ten times as long.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
