"""What `python -m dgpo_fast.compare` was is a benchmark now."""

import sys

if __name__ == "__main__":
    print("error: the comparison moved: run python -m benchmarks.compare in a checkout", file=sys.stderr)
    raise SystemExit(2)
