"""Samples in the whole batches of a run: its settings', or what a process has if that is less."""

from dataclasses import dataclass
from math import prod

from dgpo_fast.config.bounds import size_of
from dgpo_fast.config.options import Config
from dgpo_fast.distributed.placement import largest_share, place
from dgpo_fast.objectives.levels import frozen_batch
from dgpo_fast.objectives.registry import traits

DECODED_LATENTS = 16 * 64 * 64
"""Latent pixels that are decoded at a time, 16 pictures of 512 × 512: the decoder then holds no tensor of 2³¹ elements,
beyond which kernels reckon in 64 bits."""
TILE = (128, 256)
"""Of the bf16 products that cuBLAS makes at these sizes on an H100 or H200."""


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
    share = largest_share(rollout.groups, rollout.group_size, processes)
    # Each process draws whole files of offline groups alone.
    drawn = rollout.groups * rollout.group_size if config.data.source == "offline" else share
    groups = max(len(held.parts) for held in place(rollout.groups, rollout.group_size, processes))
    trained = min(share, groups * config.kept_images)
    return BatchSizes(
        rollout=min(most, drawn),
        evaluation=shown_at_once(config, processes),
        frozen=frozen_samples(config, trained),
        policy=min(most, trained),
        training=min(config.policy.micro_batch_size, trained),
        groups=groups,
    )


def shown_at_once(config: Config, processes: int) -> int:
    """Held-out images in a forward: with no more pixels than a rollout's have, if they are larger."""
    learnt, shown, most = config.rollout.resolution, config.evaluation.resolution, config.rollout.batch_size
    if learnt is not None and shown is not None:
        most = max(1, min(most, most * prod(size_of(learnt)) // prod(size_of(shown))))
    return min(most, -(-config.evaluation.images // processes))


def frozen_samples(config: Config, trained: int) -> int:
    """Samples of a forward of reference or θ_old on a process that trains on `trained` samples an iteration."""
    needs = traits(config)
    return min(frozen_batch(config.rollout, pairs=needs.guided_base), needs.levels_at_once * trained)


def wave_fill(vectors: int, width: int, multiprocessors: int) -> float:
    """Share of a GPU that is busy in a matrix product of (vectors, …) by (…, width), between 0 and 1.

    The product is cut into tiles. All multiprocessors compute a tile each, in one wave after another, and the last wave
    takes as long as the others however few tiles it has. So few rows leave much of a GPU idle: of SD3.5-Medium's text
    stream on 132 multiprocessors, 16 rows of 205 tokens fill 59 % of their waves, 32 rows 79 % and 64 rows 94 %.

    Args:
        vectors: of all rows of a forward: rows · tokens.
        width: of the output.
        multiprocessors: of the GPU.
    """
    tiles = -(-vectors // TILE[0]) * -(-width // TILE[1])
    return tiles / (-(-tiles // multiprocessors) * multiprocessors)


def rows_line(config: Config, sizes: BatchSizes, text_tokens: int, width: int, multiprocessors: int) -> str:
    """How well the rows of a training forward fill a GPU, in one line; see `wave_fill`."""
    needs = traits(config)
    frozen, trained = sizes.frozen * (1 + needs.guided_base), sizes.training * (1 + needs.guided_policy)
    fills = [wave_fill(rows * text_tokens, width, multiprocessors) for rows in (frozen, trained)]
    return (
        f"forwards of {frozen} rows with frozen weights and of {trained} in training (policy.micro_batch): the text "
        f"stream's products fill {fills[0]:.0%} and {fills[1]:.0%} of their time on {multiprocessors} multiprocessors"
    )


def decode_batch(config: Config, latent: tuple[int, ...]) -> int:
    """Pictures that are decoded at a time, of (C, H, W) `latent`s."""
    _, height, width = latent
    return config.engine.decode_batch or min(config.rollout.batch_size, max(1, DECODED_LATENTS // (height * width)))
