"""Runs a module and counts what passes through SD3's transformer.

python -m benchmarks.flow_factory.counted FILE MODULE …
"""

import json
import resource
import runpy
import sys
from pathlib import Path

import torch
from diffusers.models.embeddings import PatchEmbed


def main() -> None:
    """Runs the module with the arguments that follow it; FILE gets forwards, rows and the peak memory in MiB."""
    file, module = Path(sys.argv[1]), sys.argv[2]
    counts = {"forwards": 0, "rows": 0, "rows_with_gradient": 0}

    def count(called: torch.nn.Module, args: tuple) -> None:
        if isinstance(called, PatchEmbed):  # the first layer of each forward, once
            counts["forwards"] += 1
            counts["rows"] += len(args[0])
            counts["rows_with_gradient"] += len(args[0]) * torch.is_grad_enabled()

    torch.nn.modules.module.register_module_forward_pre_hook(count)
    sys.argv = [module, *sys.argv[3:]]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        file.write_text(json.dumps(counts | {"peak_mib": peak}), encoding="utf-8")


if __name__ == "__main__":
    main()
