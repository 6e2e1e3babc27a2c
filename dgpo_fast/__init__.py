"""Direct Group Preference Optimization (DGPO) for text-to-image diffusion models.

Nothing heavy is imported here: `python -m dgpo_fast.train` is the way in.
"""

import os

__version__ = "0.1.0"

# OpenMP's threads spin where they wait for one another. While another program has the core of one of them, the others
# spin in vain and keep it from finishing. After a short spin they give their cores away. The OpenMP library reads this
# when torch loads it, and worker processes inherit it.
if os.environ.keys().isdisjoint({"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}):
    os.environ["GOMP_SPINCOUNT"] = "3000"
