"""All settings that trade speed for memory, as one setting."""

from dataclasses import replace

from dgpo_fast.config.options import Config

BATCH = 8
"""Images per forward of the rollout: enough to keep a small card busy at 512 × 512."""


def with_low_memory(config: Config) -> Config:
    """`config` with the least memory, if `low_memory` is set. What it learns stays the same.

    The behaviour weights are an adapter instead of a merged copy; blocks are checkpointed; images are decoded one at a
    time; the slow average is in CPU memory; rollouts are not recorded; the micro-batch is the largest that fits.
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
