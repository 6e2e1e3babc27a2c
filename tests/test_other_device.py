"""Runs that go on elsewhere: on another device, in another precision, on other processes."""

import json
from pathlib import Path

import pytest
import torch

from dgpo_fast.build import build
from dgpo_fast.errors import UserError
from dgpo_fast.learning.optimizers import in_storage
from dgpo_fast.learning.rounding import join_fp32
from dgpo_fast.run.checkpoint import MANIFEST, load_newest
from dgpo_fast.run.depends import rounding_note
from dgpo_fast.run.start import resumed_config
from dgpo_fast.train import train
from dgpo_fast.trainer import Trainer
from tests.runs import untimed

EIGHT_BITS = ["--optimizer.name", "adamw8bit", "--policy.lora-rank", "128", "--optimizer.lr", "1e-3"]
"""Of factors with as many numbers as bitsandbytes keeps states of in 8 bits."""
RUN = Path("runs/run")


def as_on_a_gpu(folder: Path, processes: int) -> None:
    """Says of the newest checkpoint that it was written there."""
    manifest = sorted((folder / "checkpoints").iterdir())[-1] / MANIFEST
    content = json.loads(manifest.read_text())
    about = content.get("info", content)
    about["engine"]["device"], about["processes"] = "NVIDIA H200", processes
    manifest.write_text(json.dumps(content))


def resumed(*args: str) -> Trainer:
    trainer = Trainer(build(resumed_config(RUN, [*args, "--iterations", "9"])))
    trainer.resume(RUN)
    return trainer


@pytest.fixture
def written(workspace: Path) -> Path:
    """A run of two iterations in bf16, with optimizer states in 8 bits, as one GPU of two left it."""
    assert train(["small.yaml", "--precision", "bf16", *EIGHT_BITS, "--iterations", "2"]) == 0
    as_on_a_gpu(RUN, 2)
    return workspace


def test_a_state_in_bf16_and_8_bits_goes_on_in_fp32_and_back(written: Path) -> None:
    """Masters, averages and optimizer states to the last bit, there and back."""
    state = load_newest(RUN / "checkpoints")[0]
    optimizer = state.part("optimizer")
    assert any(tensor.dtype == torch.uint8 for tensor in optimizer.values())
    trainer = resumed("--precision", "fp32", "--device", "cpu")
    lower = [tensor for name, tensor in optimizer.items() if name.startswith("rounding/") and tensor.dim()]
    assert sum(int(tensor.count_nonzero()) for tensor in lower) > 1000
    for index, (name, weight) in enumerate(trainer.models.weights.items()):
        high, low = state.part("policy")[name], optimizer[f"rounding/{index}"]
        assert high.dtype == torch.bfloat16
        assert weight.dtype == torch.float32 and torch.equal(weight, join_fp32(high, low))
    trainer.save(RUN)
    in_fp32 = load_newest(RUN / "checkpoints")[0]
    for part in ("old", "slow"):
        assert all(torch.equal(tensor, in_fp32.part(part)[name]) for name, tensor in state.part(part).items())
    trainer.close()
    back = resumed("--precision", "bf16", "--device", "cpu")
    back.save(RUN)
    again = load_newest(RUN / "checkpoints")[0].tensors
    back.close()
    assert again.keys() == state.tensors.keys()
    apart = [name for name, tensor in state.tensors.items() if not torch.equal(tensor, again[name])]
    assert apart in ([], ["optimizer/rounding/steps"]), "only stochastic rounding counts its steps"


def test_it_goes_on_to_its_end_and_says_what_cannot_be_equal(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["--resume", str(RUN), "--precision", "fp32", "--iterations", "3"]) == 0
    said = capsys.readouterr().out
    assert "the number of processes (2 → 1), the precision (bfloat16 → float32), the device (NVIDIA H200 → cpu)" in said
    assert (
        "weights, averages, optimizer states and draws of prompts and noise go on to the last bit; what follows "
        "cannot: sums over processes have another order, forwards are rounded to another precision, another device's "
        "kernels round otherwise\n"
    ) in said
    assert train(["--resume", str(RUN), "--precision", "bf16", "--iterations", "4"]) == 0
    losses = [line["loss"] for line in untimed(RUN)]
    assert train(["small.yaml", "--precision", "bf16", *EIGHT_BITS, "--iterations", "4", "--name", "whole"]) == 0
    assert losses == pytest.approx([line["loss"] for line in untimed(Path("runs/whole"))], rel=0.05)


def test_weights_of_before_the_first_step_have_no_lower_half() -> None:
    weights = {"a": torch.tensor([1.5]).bfloat16()}
    found, rest = in_storage(weights, {}, "fp32")
    assert torch.equal(found["a"], torch.tensor([1.5])) and rest == {}
    same, kept = in_storage(weights, {"rounding/0": torch.tensor([3])}, "bf16_master")
    assert same is weights and "rounding/0" in kept


def test_a_quantised_base_is_rounded_anew() -> None:
    about = {
        "processes": 1,
        "dtype": "float32",
        "engine": {"device": "cpu"},
        "config": {"policy": {"base_precision": "nf4"}},
    }
    assert rounding_note(about, about) == rounding_note({}, about) == ""
    elsewhere = {**about, "engine": {"device": "NVIDIA L4"}}
    assert rounding_note(about, elsewhere).endswith("kernels round otherwise, the base is rounded to nf4 anew")


def test_paged_states_go_on_where_there_are_no_pages(written: Path) -> None:
    """And no other optimizer takes them over."""
    config = RUN / "config.yaml"
    config.write_text(config.read_text().replace("name: adamw8bit", "name: paged_adamw8bit"))
    with pytest.raises(UserError, match="here use adamw8bit"):
        train(["--resume", str(RUN), "--iterations", "3"])
    with pytest.raises(UserError, match=r"'optimizer.name' cannot change within a run"):
        train(["--resume", str(RUN), "--iterations", "3", "--optimizer.name", "adamw"])
    assert train(["--resume", str(RUN), "--iterations", "3", "--optimizer.name", "adamw8bit"]) == 0
