"""Full fine-tuning with sharded weights is full fine-tuning on one process."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch.distributed.device_mesh import init_device_mesh

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.config.options import Policy
from dgpo_fast.distributed import ALONE
from dgpo_fast.distributed.shards import Shards
from dgpo_fast.errors import UserError
from dgpo_fast.learning.optimizers import optimizer_tensors
from dgpo_fast.models.sharded import ShardedModels
from dgpo_fast.run import checkpoint
from dgpo_fast.run.checkpoint import CheckpointWriter, load_newest
from dgpo_fast.trainer import Trainer
from tests.distributed_runs import SCENARIOS, make_workspace, run
from tests.processes import run_together
from tests.sd3 import transformer_in

NAMES = [name for name in SCENARIOS if "sharded" in name]
RESUMED = "sharded=runs/2-sharded"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, random_pipeline: Path) -> dict[int, dict[str, Any]]:
    """processes → scenario → what came out."""
    folder, before = tmp_path_factory.mktemp("shards"), Path.cwd()
    make_workspace(folder, random_pipeline)
    os.chdir(folder)
    try:
        run_together(["-m", "tests.distributed_runs", *NAMES, RESUMED], 2)
        alone = {name: run(name, Path("runs/1") / str(n), ALONE) for n, name in enumerate(NAMES)}
        alone[RESUMED] = run("sharded", Path("runs/1/resumed"), ALONE, Path("runs/2-sharded"))
        saved = SD3Transformer2DModel.from_pretrained("runs/2-sharded/pipeline/transformer")
        weights = torch.cat([weight.detach().flatten() for weight in saved.parameters()])
        return {1: alone, 2: json.loads(Path("2.json").read_text()) | {"saved": weights.numpy()}}
    finally:
        os.chdir(before)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_and_weights_are_those_of_one_process(name: str, outcomes: dict) -> None:
    """After ten steps of the first scenario; shares are uneven, and a process may be without a sample."""
    for what, tolerance in {"latents": 1e-5, "gradient": 1e-6, "weights": 1e-5}.items():
        mine, alone = (np.array(outcomes[count][name][what], np.float64) for count in (2, 1))
        assert np.abs(alone).max() > 0
        assert np.abs(mine - alone).max() < tolerance * np.abs(alone).max(), what


def test_metrics_are_those_of_one_process(outcomes: dict) -> None:
    mine, alone = (outcomes[count]["sharded"]["metrics"] for count in (2, 1))
    assert len(mine) == len(alone) == 10
    for name in ("reward_mean", "grad_norm", "dsm_policy", "heldout_reward_mean"):
        seen = [[line[name] for line in lines if name in line] for lines in (mine, alone)]
        np.testing.assert_allclose(*seen, rtol=1e-3)


@pytest.fixture
def one_shard() -> Iterator[Shards]:
    """Shards of a group of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield Shards(init_device_mesh("cpu", (1,)), ALONE)
    torch.distributed.destroy_process_group()


def test_a_checkpoint_holds_what_was_there_when_it_was_asked_for(
    one_shard: Shards, random_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer's counters too, which its next step counts on in place while they are being written."""
    go, original = threading.Event(), checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *args: go.wait(60) and original(*args))
    transformer = transformer_in(random_pipeline).requires_grad_(False)
    models = ShardedModels(transformer, Policy(train="full"), one_shard)
    optimizer = torch.optim.AdamW(models.weights.values())

    def step() -> dict[str, torch.Tensor]:
        for weight in models.weights.values():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        return optimizer_tensors(optimizer)

    expected = {name: tensor.clone() for name, tensor in step().items()}
    writer = CheckpointWriter(tmp_path / "checkpoints", keep=1, info={})
    writer.save(1, {"optimizer": models.whole(optimizer_tensors(optimizer))}, copied=True)
    step()
    go.set()
    writer.wait()
    saved = load_newest(tmp_path / "checkpoints")[0].part("optimizer")
    assert saved.keys() == expected.keys() and all(saved[name].equal(expected[name]) for name in saved)


def test_others_are_met_before_the_forwards_that_need_them(outcomes: dict) -> None:
    """There a process that is lost is named and waiting is measured, whatever carries the shards."""
    shares = [f"the {what} of iteration {number}" for number in (1, 2) for what in ("groups", "learning")]
    assert outcomes[2]["sharded, pairs"]["met"] == ["the groups of the shards", *shares]


@pytest.mark.parametrize("count", [1, 2])
def test_a_checkpoint_of_shards_resumes_on(count: int, outcomes: dict) -> None:
    mine, alone = (np.array(outcome["weights"]) for outcome in (outcomes[count][RESUMED], outcomes[1]["sharded"]))
    assert np.abs(mine - alone).max() < 1e-5


def test_the_saved_pipeline_has_the_trained_weights(outcomes: dict) -> None:
    np.testing.assert_array_equal(outcomes[2]["saved"], np.array(outcomes[2]["sharded"]["weights"], np.float32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--policy.train", "lora"], "is for --policy.train full"),
        (["--optimizer.name", "adamw8bit"], "use --optimizer.name adamw"),
        (["--data.source", "offline"], "data.source offline needs unsharded weights"),
    ],
)
def test_what_cannot_be_sharded_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(
            build(
                configure(
                    [
                        "tiny-shapes",
                        "--device",
                        "cpu",
                        "--policy.train",
                        "full",
                        "--distributed.shard",
                        "full",
                        *settings,
                    ]
                )
            )
        )
