"""Everything that trades speed for memory, as one setting."""

from dataclasses import replace

from dgpo_fast.config import Config

BATCH = 8
"""Images a forward of the rollout: enough to keep a small card busy at 512 × 512."""


def with_low_memory(config: Config) -> Config:
    """`config` as it takes least memory, where `low_memory` asks for that; what it learns stays the same.

    Adapters are switched, so that there is no merged copy; blocks are checkpointed; pictures are decoded one at a time;
    averages are kept by the CPU; no rollout is recorded; the micro-batch is the largest that fits. Text encoders
    that do not fit beside the model pass layer by layer in any case.
    """
    if not config.low_memory:
        return config
    return replace(
        config,
        policy=replace(config.policy, behaviour="adapter", micro_batch="auto"),
        engine=replace(config.engine, checkpointing="blocks", decode_batch=1, cuda_graphs="off"),
        ema=replace(config.ema, offload=True),
        rollout=replace(config.rollout, batch_size=min(config.rollout.batch_size, BATCH)),
    )
