"""Seeds of the named streams of draws of a run.

Every draw is a function of (seed, stream, position) alone. No generator carries state from one iteration to the next,
so a resumed run and a run on other processes draw what an uninterrupted one draws.
"""

import hashlib


def stream_seed(seed: int, stream: str) -> int:
    """A 63-bit seed for one named stream of draws; different streams of one run are independent."""
    digest = hashlib.blake2b(f"{seed}:{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
