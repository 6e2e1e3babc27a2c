"""AdamW in 32 and 8 bits on fp32 and bf16 weights: nothing is lost to rounding, and a resumed run steps the same."""

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from dgpo_fast.config.command_line import configure
from dgpo_fast.config.options import Optimizer as OptimizerConfig
from dgpo_fast.errors import UserError
from dgpo_fast.learning.optimizers import Bf16Optimizer, load_optimizer, make_optimizer, optimizer_tensors, state_bytes
from dgpo_fast.learning.rounding import join_fp32, random_16bit, split_fp32, stochastic_bf16
from dgpo_fast.run.checkpoint import load_newest
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.train import train
from tests.checkpoints import save_checkpoint

CPU = torch.device("cpu")
SHAPES = {"large": (96, 80), "odd": (67, 63), "small": (40,)}
finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**126), max_value=2.0**126)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in SHAPES.items():
        made[name] = nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(dtype))
        made[name].grad_dtype = torch.float32
    return made


def gradients() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def take_steps(optimizer: object, weights: dict[str, nn.Parameter], steps: list[dict[str, Tensor]]) -> None:
    for step in steps:
        for name, weight in weights.items():
            weight.grad = step[name].clone()
        optimizer.step()  # type: ignore[attr-defined]
        optimizer.zero_grad(set_to_none=True)  # type: ignore[attr-defined]


@settings(deadline=None)
@given(st.lists(finite, min_size=1, max_size=40))
def test_an_fp32_number_is_its_two_halves(values: list[float]) -> None:
    """Taking apart loses nothing, and the upper half is a nearest bf16 number."""
    value = torch.tensor(values, dtype=torch.float32)
    high, low = split_fp32(value)
    assert torch.equal(join_fp32(high, low).view(torch.int32), value.view(torch.int32))
    assert torch.equal((high.float() - value).abs(), (value.bfloat16().float() - value).abs())


@settings(deadline=None)
@given(st.lists(finite, min_size=1, max_size=20), st.integers(0, 2**16 - 1))
def test_stochastic_rounding_takes_a_neighbour(values: list[float], bits: int) -> None:
    """The result is one of the two bf16 numbers around a value, and a bf16 number is left alone."""
    value = torch.tensor(values, dtype=torch.float32)
    rounded = stochastic_bf16(value, torch.full(value.shape, bits, dtype=torch.int32)).float()
    below = (value.view(torch.int32) & ~0xFFFF).view(torch.float32)
    above = ((value.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    exact = value == below
    assert ((rounded == below) | ((rounded == above) & ~exact)).all()


def test_the_mean_of_stochastic_rounding_is_right() -> None:
    """Over many draws the mean is the value, within five standard errors; nearest rounding is off by 0.3 ulp."""
    ulp, draws = 2.0**-7, 20_000
    value = torch.full((draws,), 1 + 0.3 * ulp)
    rounded = stochastic_bf16(value, random_16bit(0, 0, 0, 0, draws, CPU)).float()
    assert set(rounded.tolist()) == {1.0, 1 + ulp}
    spread = ulp * math.sqrt(0.3 * 0.7 / draws)
    assert abs(rounded.double().mean() - (1 + 0.3 * ulp)) < 5 * spread


def test_random_bits_are_uniform_and_keyed() -> None:
    """Every key changes them; the same keys give them again; a shorter draw is the start of no other one's middle."""
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (2**40, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    draws = [random_16bit(*key, count=4096, device=CPU) for key in keys]
    assert torch.equal(draws[0], random_16bit(*keys[0], count=4096, device=CPU))
    for first in range(len(draws)):
        assert draws[first].min() >= 0 and draws[first].max() < 2**16
        assert abs(draws[first].double().mean() - 2**15) < 5 * 2**16 / math.sqrt(12 * 4096)
        assert all((draws[first] == draws[other]).float().mean() < 0.01 for other in range(first))


def test_a_split_master_trains_as_fp32_does() -> None:
    """Step by step the bf16 weights are fp32 training's, rounded, and the fp32 numbers behind them are the same."""
    config = OptimizerConfig(lr=1e-4, weight_decay=0.1)
    full, half = parameters(), parameters(torch.bfloat16)
    plain, split = make_optimizer(full, config), make_optimizer(half, config, "bf16_master")
    stream = gradients()
    for _ in range(5):
        step = [next(stream)]
        take_steps(plain, full, step)
        take_steps(split, half, step)
        assert isinstance(split, Bf16Optimizer)
        for index, name in enumerate(SHAPES):
            assert half[name].dtype == torch.bfloat16
            assert torch.equal(split.rounding.widen(index, half[name].data), full[name].data)
    assert any(not torch.equal(half[name].float(), full[name]) for name in SHAPES)


def test_small_updates_survive_stochastic_rounding() -> None:
    """Updates of 1/50 of half an ulp: rounding to nearest never moves, rounding stochastically moves by their sum."""
    steps, lr = 100, 2.0**-7 / 100
    config = OptimizerConfig(lr=lr, weight_decay=0.0, beta2=0.9)
    weights = {"w": nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))}
    weights["w"].grad_dtype = torch.float32
    optimizer = make_optimizer(weights, config, "bf16_stochastic", seed=3)
    take_steps(optimizer, weights, [{"w": torch.full((64, 64), -1.0)}] * steps)
    moved = (weights["w"].float().mean() - 1).item()
    assert (torch.ones(()).bfloat16() + lr).item() == 1.0, "one update alone is lost"
    assert moved == pytest.approx(steps * lr, rel=0.05)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("storage", ["fp32", "bf16_master", "bf16_stochastic"])
def test_a_resumed_optimizer_steps_the_same(name: str, storage: str, tmp_path: Path) -> None:
    """Through a checkpoint's safetensors: weights and states after two more steps equal to the last bit."""
    dtype = torch.float32 if storage == "fp32" else torch.bfloat16
    config = OptimizerConfig(name=name, lr=1e-2)  # type: ignore[arg-type]
    stream = gradients()
    steps = [next(stream) for _ in range(5)]
    weights = parameters(dtype)
    optimizer = make_optimizer(weights, config, storage, seed=7)
    take_steps(optimizer, weights, steps[:3])
    save_checkpoint(tmp_path / "c", 3, {"policy": weights, "optimizer": optimizer_tensors(optimizer)}, keep=1)
    take_steps(optimizer, weights, steps[3:])

    state, _ = load_newest(tmp_path / "c")
    resumed = {key: nn.Parameter(tensor) for key, tensor in state.part("policy").items()}
    resumed = {key: resumed[key] for key in SHAPES}
    for weight in resumed.values():
        weight.grad_dtype = torch.float32
    again = make_optimizer(resumed, config, storage, seed=7)
    load_optimizer(again, state.part("optimizer"))
    take_steps(again, resumed, steps[3:])
    assert all(torch.equal(resumed[key], weights[key]) for key in SHAPES)
    tensors = [optimizer_tensors(one) for one in (optimizer, again)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[1][key], tensor) for key, tensor in tensors[0].items())


def test_eight_bit_states_take_what_is_said_and_train_alike() -> None:
    """uint8 moments with fp32 scales; sizes by the formula; weights near those of fp32 states."""
    config = OptimizerConfig(lr=1e-2)
    plain, small = parameters(), parameters()
    stream = gradients()
    steps = [next(stream) for _ in range(20)]
    optimizers = [make_optimizer(plain, config), make_optimizer(small, OptimizerConfig(lr=1e-2, name="adamw8bit"))]
    for optimizer, weights in zip(optimizers, (plain, small), strict=True):
        take_steps(optimizer, weights, steps)
    for name, optimizer in zip(("adamw", "adamw8bit"), optimizers, strict=True):
        tensors = optimizer_tensors(optimizer)
        moments = sum(t.nbytes for key, t in tensors.items() if not key.endswith(("step", "qmap1", "qmap2")))
        assert moments == sum(state_bytes(weight.numel(), name) for weight in plain.values())
    kinds = {key: tensor.dtype for key, tensor in optimizer_tensors(optimizers[1]).items()}
    assert kinds["0/state1"] == kinds["0/state2"] == torch.uint8
    assert kinds["0/absmax1"] == kinds["shared/qmap1"] == kinds["2/state1"] == torch.float32
    for name, start in parameters().items():
        travelled = (plain[name] - start).norm()
        assert (small[name] - plain[name]).norm() < 0.1 * travelled


def test_gradients_of_bf16_weights_add_up_in_fp32() -> None:
    """A thousand gradients of 1/1000: bf16 would stop at 0.25 or so."""
    weight = parameters(torch.bfloat16)["small"]
    for _ in range(1000):
        (weight * 1e-3).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert weight.grad.mean().item() == pytest.approx(1.0, rel=5e-3)


def test_a_failed_step_leaves_bf16_weights() -> None:
    """Whatever the inner optimizer raises, the weights are bf16 in their own memory afterwards."""
    weights = parameters(torch.bfloat16)
    optimizer = make_optimizer(weights, OptimizerConfig(), "bf16_stochastic")
    before = {name: (weight.data_ptr(), weight.detach().clone()) for name, weight in weights.items()}
    assert isinstance(optimizer, Bf16Optimizer)
    optimizer.inner.step = lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        take_steps(optimizer, weights, [next(gradients())])
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16 and weight.data_ptr() == before[name][0]
        assert torch.equal(weight, before[name][1])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="adamw8bit needs the package bitsandbytes: pip install bitsandbytes"):
        make_optimizer(parameters(), OptimizerConfig(name="adamw8bit"))


def test_paged_states_need_a_gpu() -> None:
    with pytest.raises(UserError, match="moves states between a GPU and the CPU; here use adamw8bit"):
        make_optimizer(parameters(), OptimizerConfig(name="paged_adamw8bit"))


SMALL = """
prompts: prompts.txt
rewards: [jpeg]
iterations: 3
name: run
device: cpu
precision: bf16
rollout: {group_size: 2, groups: 2, num_inference_steps: 2, max_sequence_length: 9}
dgpo: {timesteps: 2}
policy: {lora_rank: 8, micro_batch: 2}
optimizer: {lr: 1e-4}
evaluation: {images: 2, num_inference_steps: 2}
checkpoint: {every: 1, keep: 9}
"""


TRAINED = [("full", "bf16_stochastic", "adamw8bit"), ("lora", "auto", "adamw")]


@pytest.mark.parametrize(("what", "weights", "name"), TRAINED)
def test_a_run_in_bf16_resumes_exactly(
    what: str,
    weights: str,
    name: str,
    tmp_path: Path,
    random_pipeline: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na house\ntwo birds\n")
    (tmp_path / "small.yaml").write_text(SMALL)
    settings = ["--policy.train", what, "--policy.weights", weights, "--optimizer.name", name]
    settings = ["small.yaml", "--model", str(random_pipeline), *settings]
    assert train([*settings, "--name", "whole"]) == 0
    said = re.search(rf"{name}: ([0-9.]+) MiB of optimizer state", capsys.readouterr().out)
    assert train([*settings, "--iterations", "1"]) == 0
    with pytest.raises(UserError, match=r"'optimizer\.name' cannot change within a run"):
        train(["--resume", "runs/run", "--optimizer.name", "adamw" if name == "adamw8bit" else "adamw8bit"])
    assert train(["--resume", "runs/run", "--iterations", "3"]) == 0
    ends = [load_newest(tmp_path / "runs" / name / "checkpoints")[0].tensors for name in ("run", "whole")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], tensor) for key, tensor in ends[1].items())
    lines = [read_metrics(Path(f"runs/{name}/metrics.jsonl")) for name in ("run", "whole")]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    begun = load_file("runs/run/checkpoints/iteration-000000/state.safetensors")
    policy = {name.removeprefix("policy/"): one for name, one in begun.items() if name.startswith("policy/")}
    if what == "lora":
        assert all(one.any() == ("lora_B" not in name) for name, one in policy.items()), "it starts as the reference"
    else:
        reference = load_file(random_pipeline / "transformer/diffusion_pytorch_model.safetensors")
        assert policy.keys() == reference.keys() - {"pos_embed.pos_embed"}
        assert all(one.equal(reference[name].bfloat16()) for name, one in policy.items())
    assert any(not one.equal(ends[0][f"policy/{name}"]) for name, one in policy.items()), "and moves"
    assert {ends[0][key].dtype for key in ends[0] if key.startswith("policy/")} == {torch.bfloat16}
    names = ("/exp_avg", "/exp_avg_sq", "/state1", "/state2", "/absmax1", "/absmax2")
    moments = [tensor.nbytes for key, tensor in ends[0].items() if key.endswith(names)]
    assert said and float(said[1]) == pytest.approx(sum(moments) / 2**20, abs=0.06)


def test_bf16_weights_need_a_bf16_run() -> None:
    from dgpo_fast.build import build
    from dgpo_fast.trainer import Trainer

    config = configure(["--policy.weights", "bf16_master", "--precision", "fp32", "--device", "cpu"])
    with pytest.raises(UserError, match="is for runs in bf16: give --precision bf16"):
        Trainer(build(config))
