"""What is switched off, or on, to see what it is worth."""

from collections.abc import Iterable

SAVINGS: dict[str, list[str]] = {
    "all settings of the engine": [
        "--engine.compile",
        "off",
        "--engine.cuda-graphs",
        "off",
        "--engine.attention",
        "native",
        "--engine.linear",
        "torch",
        "--engine.epilogue",
        "off",
        "--engine.decoder",
        "plain",
        "--engine.overlap",
        "False",
        "--engine.batch-timesteps",
        "False",
        "--engine.share-first-level",
        "off",
        "--engine.skip-equal-groups",
        "False",
        "--engine.keep-memory",
        "False",
    ],
    "engine.compile": ["--engine.compile", "off"],
    "engine.cuda_graphs": ["--engine.cuda-graphs", "off"],
    "engine.attention": ["--engine.attention", "native"],
    "engine.linear": ["--engine.linear", "torch"],
    "engine.epilogue": ["--engine.epilogue", "off"],
    "engine.decoder": ["--engine.decoder", "plain"],
    "engine.overlap": ["--engine.overlap", "False"],
    "engine.batch_timesteps": ["--engine.batch-timesteps", "False"],
    "engine.share_first_level": ["--engine.share-first-level", "off"],
    "engine.skip_equal_groups": ["--engine.skip-equal-groups", "False"],
    "policy.behaviour": ["--policy.behaviour", "adapter"],
    "policy.forward": ["--policy.forward", "adapter"],
}
"""Name of a saving → what switches it off."""
EQUAL_GROUPS = "engine.skip_equal_groups"
CHANGES: dict[str, list[str]] = {
    "policy.micro_batch auto": ["--policy.micro-batch", "auto"],
    "engine.rollout_precision fp8": ["--engine.rollout-precision", "fp8"],
}
"""What is not on by default. fp8 is inexact: other images are drawn."""
FOR_DEVICE = {
    "engine.cuda_graphs": "cuda",
    "engine.overlap": "cuda",
    "engine.epilogue": "cuda",
    "policy.forward": "cuda",
    "engine.linear": "cpu",
    "engine.share_first_level": "cuda",  # in fp32, "auto" leaves it off with the recipe's solver
    "policy.micro_batch auto": "cuda",
    "engine.rollout_precision fp8": "cuda",
}


def names(settings: Iterable[str], device: str) -> list[str]:
    """Those of the named settings that there are on "cuda" or "cpu"."""
    return [name for name in settings if FOR_DEVICE.get(name, device) == device]
