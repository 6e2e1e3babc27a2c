"""Samples in the whole batches of a run: its settings', or what a process has if that is less."""

from dataclasses import dataclass

from dgpo_fast.config.options import Config
from dgpo_fast.distributed.placement import largest_share, place
from dgpo_fast.objectives.registry import traits

DECODED_LATENTS = 16 * 64 * 64
"""Latent pixels that are decoded at a time, 16 pictures of 512 × 512: the decoder then holds no tensor of 2³¹ elements,
beyond which kernels reckon in 64 bits."""


@dataclass(frozen=True)
class BatchSizes:
    """Samples in whole batches of the process that has most of them, the same on all processes.

    Recordings, compiled code and padding use these sizes. With the settings' own sizes, a process with fewer samples
    would compute unused rows.

    Attributes:
        rollout: of a forward that draws images to learn from.
        evaluation: of one that draws held-out images.
        frozen: of one of reference or θ_old, for as many timesteps as are predicted at once.
        policy: of one of the policy without a gradient.
        training: of a micro-batch.
        groups: groups that a process holds, whole or in part: rows at a noise level that a group's samples share.
    """

    rollout: int
    evaluation: int
    frozen: int
    policy: int
    training: int
    groups: int


def batch_sizes(config: Config, processes: int) -> BatchSizes:
    """The sizes in a run of `config` that `processes` share."""
    rollout, most = config.rollout, config.rollout.batch_size
    trained = largest_share(rollout.groups, rollout.group_size, processes)
    # Each process draws whole files of offline groups alone.
    drawn = rollout.groups * rollout.group_size if config.data.source == "offline" else trained
    return BatchSizes(
        rollout=min(most, drawn),
        evaluation=min(most, -(-config.evaluation.images // processes)),
        frozen=min(most, traits(config).levels_at_once * trained),
        policy=min(most, trained),
        training=min(config.policy.micro_batch_size, trained),
        groups=max(len(share.parts) for share in place(rollout.groups, rollout.group_size, processes)),
    )


def decode_batch(config: Config, latent: tuple[int, ...]) -> int:
    """Pictures that are decoded at a time, of (C, H, W) `latent`s."""
    _, height, width = latent
    return config.engine.decode_batch or min(config.rollout.batch_size, max(1, DECODED_LATENTS // (height * width)))
