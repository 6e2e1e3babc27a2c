"""What is recorded, compiled and padded has as many rows as a process has samples, where it has fewer than a batch."""

from dataclasses import replace
from pathlib import Path

import torch

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.engine import Engine
from dgpo_fast.engine.batches import BatchSizes, batch_sizes, decode_batch, rows_line, wave_fill
from dgpo_fast.trainer import Trainer
from tests.engine.cases import EngineCase, make_config


def test_the_recipe_on_one_and_on_eight_gpus() -> None:
    """8 groups of 16 in batches of 32 pairs: a GPU of eight draws 16, and predicts 4 timesteps of them, 64 rows, at
    once."""
    config = configure(["sd35m-geneval", "--policy.micro-batch", "48", "--evaluation.images", "128"])
    assert batch_sizes(config, 1) == BatchSizes(rollout=32, evaluation=32, frozen=64, policy=32, training=48, groups=8)
    assert batch_sizes(config, 8) == BatchSizes(rollout=16, evaluation=16, frozen=64, policy=16, training=16, groups=1)
    assert batch_sizes(config, 16) == BatchSizes(rollout=8, evaluation=8, frozen=32, policy=8, training=8, groups=1)


def test_frozen_forwards_have_a_rollouts_rows() -> None:
    """A guided rollout of 32 has 64 rows: single predictions fill as many, pairs are of 32 samples."""
    for args, frozen in (([], 64), (["--dgpo.kl-guidance-scale", "4.5"], 32), (["--rollout.guidance-scale", "1"], 32)):
        assert batch_sizes(configure(["sd35m-geneval", "--policy.micro-batch", "16", *args]), 1).frozen == frozen


def test_waves_of_the_text_stream() -> None:
    """205 tokens by 1536 on an H200: 26 · 6 tiles of 16 rows take two waves of 132, of which the second has 24."""
    fill = {rows: wave_fill(rows * 205, 1536, 132) for rows in (16, 32, 64)}
    assert fill == {16: 156 / 264, 32: 312 / 396, 64: 618 / 660}
    config = configure(["sd35m-geneval", "--policy.micro-batch", "32"])
    line = rows_line(config, batch_sizes(config, 1), text_tokens=205, width=1536, multiprocessors=132)
    assert line == (
        "forwards of 64 rows with frozen weights and of 32 in training (policy.micro_batch): the text stream's "
        "products fill 94% and 79% of their time on 132 multiprocessors"
    )
    assert wave_fill(1, 1, 132) == 1 / 132 and wave_fill(128 * 132, 256, 132) == 1


def test_offline_groups_are_drawn_by_one_process() -> None:
    config = configure(["sd35m-geneval", "--policy.micro-batch", "16", "--data.source", "offline"])
    assert batch_sizes(config, 8).rollout == 32 and batch_sizes(config, 8).training == 16


def test_forwards_are_padded_to_a_process_s_share(random_pipeline: Path) -> None:
    """Three groups of 4 in batches of 5 on three processes: rollouts have pairs of 4, micro-batches of 8 have 4."""
    case = EngineCase(random_pipeline, make_config())
    tokens = case.encoder.text_tokens()
    engine = Engine(case.config, case.models, case.pipeline, tokens, print, processes=3)
    drawn, trained = engine._batches(case.models.behaviour), engine._batches(case.models.policy)
    with torch.no_grad():
        assert drawn.padded(6) == 8
    assert trained.padded(3) == 4
    alike = [each._workload((16, 8, 8), (16, 8, 8), tokens, case.pipeline) for each in (engine, case.engine)]
    assert alike[0] == alike[1], "kernels are chosen alike"


def test_constant_velocities_of_the_policy_are_padded(random_pipeline: Path) -> None:
    """Those of the empty prompt, three steps of 12 samples in batches of 5; with a gradient, samples are single."""
    config = make_config(objective="flow_grpo", batch_timesteps=True)
    for whole, micro in ((True, 16), (False, 8)):
        flow_grpo = replace(config.flow_grpo, unconditional_gradient=whole)
        case = EngineCase(random_pipeline, replace(config, flow_grpo=flow_grpo))
        trained = case.engine._batches(case.models.policy)
        assert trained.padded(3) == micro
        if not whole:
            with torch.no_grad():
                assert trained.padded(1) == 5


def test_a_run_draws_no_more_than_it_has(workspace: Path) -> None:
    """Rollouts are recorded at the sampler's size: 12 samples an iteration and 10 held-out images, in batches of 50."""
    trainer = Trainer(build(configure(["small.yaml", "--rollout.batch-size", "50", "--evaluation.images", "10"])))
    trainer.close()
    assert (trainer.draw.batch_size, trainer.eval_draw.batch_size) == (12, 10)


def test_the_decoder_holds_no_tensor_beyond_32_bits() -> None:
    """SD3's decoder has 256 channels at full resolution: at most 2³⁰ elements unless the settings ask for more."""
    config = make_config()
    large = replace(config, rollout=replace(config.rollout, batch_size=32))
    assert [decode_batch(large, (16, side, side)) for side in (8, 64, 128, 256)] == [32, 16, 4, 1]
    assert decode_batch(replace(large, engine=replace(large.engine, decode_batch=32)), (16, 64, 64)) == 32
