"""Memory is counted right, predicted before it is taken, chosen for, and its lack explained."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.config.options import Policy
from dgpo_fast.distributed import ALONE
from dgpo_fast.errors import UserError
from dgpo_fast.memory.__main__ import memory
from dgpo_fast.memory.advice import remedies
from dgpo_fast.memory.card import with_low_memory
from dgpo_fast.memory.cards import CARDS_GB, fit_on
from dgpo_fast.memory.live import LiveBytes
from dgpo_fast.memory.micro_batch import MemoryLine
from dgpo_fast.memory.plan import MemoryPlan
from dgpo_fast.memory.predict import Prediction, Predictor, readable
from dgpo_fast.memory.simulate import Simulation, Trained
from dgpo_fast.models.architecture import read_architecture
from dgpo_fast.models.families.sd3 import SD3
from dgpo_fast.models.forward import predict
from dgpo_fast.models.policy import PolicyModels
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.train import train
from dgpo_fast.trainer import Trainer
from tests.sd3 import family_in, medium, sample_shape

GB = 1e9

CPU = torch.device("cpu")


def test_live_bytes_by_hand() -> None:
    """Views and writes in place take nothing, what is dropped counts no more, and the peak is remembered."""
    existing = torch.zeros(100)
    with LiveBytes([existing]) as live:
        assert live.now == 400
        made = existing + 1
        assert (live.now, live.peak) == (800, 800)
        view = made[:50].reshape(5, 10)
        made.mul_(2)
        assert live.now == 800
        del made
        assert live.now == 800, "the view holds it"
        del view
        assert (live.now, live.peak) == (400, 800)
        (existing + 1).sum()
        assert (live.now, live.peak) == (400, 804)


def test_live_bytes_of_a_backward() -> None:
    """relu saves its output for the backward pass, and a gradient stays."""
    weight = torch.zeros(1000, requires_grad=True)
    with LiveBytes([weight]) as live:
        out = (weight * 2).relu()
        assert live.now == 3 * 4000 - 4000, "the product is gone, relu's output is kept"
        out.sum().backward()
        del out
        assert live.now == 2 * 4000, "the weight and its gradient"


SHAPE = sample_shape((16, 8, 8), (21, 48), 32)


def deeper(folder: Path, layers: int) -> SD3:
    architecture = read_architecture(folder)
    settings = {**architecture.transformer, "num_layers": layers, "dual_attention_layers": [0, 1]}
    return SD3(replace(architecture, transformer=settings))


def simulated(folder: Path, dtype: torch.dtype, trained: Trained, layers: int = 4) -> Simulation:
    return Simulation(deeper(folder, layers), trained, dtype, SHAPE)


TRAINED = {
    "lora fp32": (torch.float32, Trained("fp32", (4, Policy().lora_targets))),
    "lora bf16": (torch.bfloat16, Trained("bf16_master", (4, Policy().lora_targets))),
    "lora bf16, merged": (torch.bfloat16, Trained("bf16_master", (4, Policy().lora_targets), merged=True)),
    "full fp32": (torch.float32, Trained("fp32", None)),
    "full bf16": (torch.bfloat16, Trained("bf16_stochastic", None)),
    "full bf16 under autocast": (torch.bfloat16, Trained("fp32", None)),
}


@pytest.mark.parametrize("name", TRAINED)
def test_one_block_of_each_kind_stands_for_all(
    name: str, random_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum over kinds of blocks is what the whole depth takes."""
    dtype, trained = TRAINED[name]
    shallow = simulated(random_pipeline, dtype, trained, layers=7)
    monkeypatch.setattr(SD3, "one_of_each_block", lambda self: (dict(self.architecture.transformer), [1] * 7))
    whole = simulated(random_pipeline, dtype, trained, layers=7)
    assert len(shallow.policy.transformer_blocks) == 4 < len(whole.policy.transformer_blocks)
    for batch in (1, 5):
        mine, theirs = shallow.training(batch), whole.training(batch)
        assert mine.saved == pytest.approx(theirs.saved, rel=0.01)
        assert mine.peak == pytest.approx(theirs.peak, rel=0.03)


def tensors_alive() -> list[torch.Tensor]:
    """Every tensor that Python knows of."""
    return [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]


def real_peak(models: PolicyModels, batch: int) -> int:
    """Peak bytes of a forward and backward of real tensors, beside weights and gradients."""
    for weight in models.weights.values():
        weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
    text = SHAPE.text(batch, models.dtype, CPU)
    x_t = torch.randn(batch, *SHAPE.latent, dtype=models.dtype)
    policy: nn.Module = models.policy
    there = [*policy.parameters(), *policy.buffers(), *(weight.grad for weight in models.weights.values())]
    with LiveBytes([tensor for tensor in there if tensor is not None]) as live:
        start = live.now
        out = predict(models.policy, x_t, torch.tensor(500.0), text)
        out.backward(torch.ones_like(out))
    return live.peak - start


@pytest.mark.parametrize("kind", ["blocks", "selective"])
@pytest.mark.parametrize("name", ["lora fp32", "full bf16"])
def test_checkpointing_saves_what_is_predicted(kind: str, name: str, random_pipeline: Path) -> None:
    dtype, trained = TRAINED[name]
    plain, checkpointed = (
        simulated(random_pipeline, dtype, replace(trained, checkpointing=each), layers=9) for each in ("none", kind)
    )
    small, large = checkpointed.training(6), plain.training(6)
    assert small.saved < (0.4 if kind == "blocks" else 0.7) * large.saved and small.peak < large.peak


@pytest.mark.parametrize("name", ["lora fp32", "lora bf16", "lora bf16, merged", "full fp32", "full bf16"])
def test_simulated_training_takes_what_the_real_one_does(name: str, random_pipeline: Path) -> None:
    """The meta device's activations are the CPU's to 3 %."""
    dtype, trained = TRAINED[name]
    simulation = simulated(random_pipeline, dtype, trained)
    transformer = deeper(random_pipeline, layers=4).build_transformer().requires_grad_(False)
    nn.Module.to(transformer, dtype)
    policy = Policy(
        train="full" if trained.lora is None else "lora",
        lora_rank=4,
        weights=trained.storage,  # type: ignore[arg-type]
        forward="merged" if trained.merged else "auto",
    )
    models = PolicyModels(transformer, policy, seed=0)
    assert simulation.training(6).peak == pytest.approx(real_peak(models, 6), rel=0.03)


LORA, BF16 = ["--policy.train", "lora"], ["--precision", "bf16"]
NOISY = [
    *LORA,
    "--objective",
    "flow_grpo",
    "--rollout.solver",
    "euler",
    "--rollout.noise-level",
    "0.7",
    "--ema.switch-ema-ref",
    "none",
    "--rollout.guidance-scale",
    "3",
]
RUNS = {
    "all weights, fp32": [],
    "LoRA, a clip and guidance": [*LORA, "--dgpo.clip-range", "0.01", "--rollout.guidance-scale", "3"],
    "small micro-batches, the decoder needs most": [*LORA, "--policy.micro-batch", "4"],
    "bf16, 8 bits": [*BF16, "--optimizer.name", "adamw8bit", "--policy.weights", "bf16_stochastic"],
    "bf16 LoRA, second adapter": [*BF16, *LORA, "--policy.behaviour", "adapter"],
    "bf16 LoRA, merged": [*BF16, *LORA, "--policy.forward", "merged"],
    "checkpointed blocks": [*LORA, "--engine.checkpointing", "blocks"],
    "steps of a rollout with noise": NOISY,
    "steps of a rollout with noise, no gradient of the unconditional velocity": [
        *NOISY,
        "--flow-grpo.unconditional-gradient",
        "false",
    ],
    "a regression from θ_old": ["--objective", "nft", "--ema.switch-ema-ref", "0", "--nft.timesteps", "2"],
    "centred rewards, an average for rollouts": [
        "--objective",
        "crd",
        "--crd.timesteps",
        "2",
        "--ema.switch-ema-ref",
        "none",
        "--ema.rollout-decay-per-step",
        "0.1",
    ],
    "low memory": [*LORA, "--low-memory"],
    "a base in 4 bits": [*LORA, "--policy.base-precision", "nf4", "--policy.behaviour", "adapter"],
    "a base in 8 bits": [*LORA, "--policy.base-precision", "int8", "--policy.forward", "merged"],
    "images of two by one": ["--rollout.resolution", "64x32"],
}


@pytest.mark.parametrize("name", RUNS)
def test_predicted_is_measured(name: str, tmp_path: Path) -> None:
    """Predicted bytes of tensors at the peak of the default CPU run are those measured, within 15 %."""
    small = ["--rollout.groups", "2", "--dgpo.timesteps", "1", "--evaluation.images", "2", "--device", "cpu"]
    config = configure(["tiny-shapes", *small, *RUNS[name]])
    others = tensors_alive()  # held, so that no storage of theirs makes room for one of the run's
    trainer = Trainer(build(config))
    trainer.open_logs(tmp_path, {})
    trainer.console.start_training(0, 2)
    trainer.step()  # the optimizer's states are there from here on
    now = [tensor for tensor in tensors_alive() if tensor.device == trainer.device]
    theirs = {tensor.untyped_storage()._cdata for tensor in others}
    mine = [tensor for tensor in now if tensor.untyped_storage()._cdata not in theirs]
    with LiveBytes(mine) as live:
        trainer.step()
    trainer.close()
    predicted = trainer.memory.predictor.predict(trainer.config, trainer.config.policy.micro_batch_size)
    assert predicted.peak == pytest.approx(live.peak, rel=0.15)


def test_what_is_held_is_what_the_parts_of_a_run_hold(workspace: Path) -> None:
    """Weights, states and averages by name, to the byte; gradients as many in fp32."""
    for what, precision in (("lora", "same"), ("lora", "nf4"), ("full", "same")):
        few_bits = ["--policy.base-precision", precision]
        trainer = Trainer(build(configure(["small.yaml", "--policy.train", what, *few_bits])))
        trainer.open_logs(workspace, {})
        trainer.console.start_training(0, 1)
        trainer.step()
        held = trainer.memory.predictor.predict(trainer.config, 1).held
        models = trainer.models
        trained = sum(weight.nbytes for weight in models.weights.values())
        own = [*models.base.named_parameters(), *models.base.named_buffers()]
        base = [tensor for name, tensor in own if not name.endswith(".table")]  # 1 KiB for all layers
        assert held["base weights"] == sum(tensor.nbytes for tensor in base)
        assert held["behaviour weights"] == sum(tensor.nbytes for tensor in models.behaviour.parameters())
        assert held["trained weights"] == held["gradients"] == trained
        assert held["averages"] == 2 * trained == held["optimizer states"]


FULL_ON_80_GB = [
    "sd35m-geneval",
    "--policy.train",
    "full",
    "--optimizer.name",
    "adamw8bit",
    "--policy.micro-batch",
    "8",
]


@pytest.mark.parametrize("weights", ["bf16_master", "bf16_stochastic"])
def test_full_fine_tuning_of_sd35_medium_fits_80_gb(weights: str) -> None:
    """With 8-bit states and bf16 weights the sum stays below 80 GB; with fp32 weights and states it does not."""
    predictor = Predictor(medium(), torch.bfloat16)
    small = predictor.predict(configure([*FULL_ON_80_GB, "--policy.weights", weights]), 8)
    assert small.peak < 80 * GB
    numel = 2_243_171_520
    assert small.held["gradients"] == 4 * numel and small.held["averages"] == 8 * numel
    assert small.held["trained weights"] == 2 * numel == small.held["behaviour weights"]
    halves = 2 * numel if weights == "bf16_master" else 0
    assert small.held["optimizer states"] - halves == pytest.approx(2 * numel * (1 + 4 / 256), rel=1e-3)
    plain = [*FULL_ON_80_GB, "--policy.weights", "fp32", "--optimizer.name", "adamw"]
    assert predictor.predict(configure(plain), 8).peak > 80 * GB


def test_prompts_of_evaluations_stay_too() -> None:
    """Each beside those of training, until as much stays as may."""
    predictor = Predictor(medium(), torch.bfloat16)
    few = ["sd35m-geneval", "--iterations", "1", "--rollout.groups", "2", "--evaluation.images"]
    inputs = [predictor.inputs(configure([*few, images])) for images in ("8", "16", "400", "4000")]
    row = predictor.shape(configure([*few, "8"])).text_bytes(torch.bfloat16)
    assert inputs[1] - inputs[0] == 8 * row
    assert inputs[3] == inputs[2] < inputs[0] + 64 * 2**20


def test_shards_hold_their_part_and_are_a_remedy() -> None:
    """On eight processes an eighth of all weights, states and averages; named where memory runs out without them."""
    plain = configure([*FULL_ON_80_GB, "--policy.weights", "auto", "--optimizer.name", "adamw"])
    sharded = replace(plain, distributed=replace(plain.distributed, shard="full"))
    hybrid = replace(plain, distributed=replace(plain.distributed, shard="hybrid"))
    predictor = Predictor(medium(), torch.bfloat16, processes=16, local_processes=8)
    numel = 2_243_171_520
    for config, parts in ((sharded, 16), (hybrid, 8)):
        held = predictor.predict(config, 8).held
        assert held["trained weights"] == held["gradients"] == 4 * numel // parts
        assert held["optimizer states"] == held["averages"] == 8 * numel // parts
        assert 0 < held["blocks made whole"] < 0.1 * 2 * numel
    advice = [remedy.setting for remedy in remedies(predictor, plain, 8, None)]
    assert "--distributed.shard full" in advice
    assert not any("8bit" in remedy.setting for remedy in remedies(predictor, sharded, 8, None))


def test_sd35_medium_saves_two_gigabytes_a_sample() -> None:
    """Activations of a LoRA micro-batch at 512 × 512 in bf16, a known figure, from one second on the meta device."""
    predictor = Predictor(medium(), torch.bfloat16)
    config = configure(["sd35m-geneval"])
    training = MemoryLine.through(lambda size: predictor.predict(config, size).at("training"), 1, 2)
    assert training.per_sample / GB == pytest.approx(2.0, abs=0.1)


def test_sizes_in_words() -> None:
    assert [readable(n * 2**20) for n in (0.04, 7.53, 410.4, 3277)] == ["0.0 MiB", "7.5 MiB", "410 MiB", "3.2 GiB"]
    prediction = Prediction({"a": 3 * 2**20, "b": 1}, {"x": 2**20, "y": 5 * 2**20})
    assert prediction.line() == "predicted memory 8.0 MiB at its peak, in y: y 5.0 MiB, a 3.0 MiB"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_measured_on_a_gpu(random_pipeline: Path) -> None:
    """Two real steps are measured, the gradients are gone afterwards, and the prediction is near."""
    device = torch.device("cuda")
    family = family_in(random_pipeline)
    transformer = family.build_transformer().requires_grad_(False).to(device, torch.bfloat16)
    config = configure(["--model", str(random_pipeline), "--policy.train", "lora", "--policy.micro-batch", "auto"])
    config = replace(config, rollout=replace(config.rollout, max_sequence_length=9))
    memory = MemoryPlan(family, device, torch.bfloat16, ALONE, print)
    models = PolicyModels(transformer, config.policy, seed=0)
    chosen = memory.measure(memory.predict(config), models)
    assert chosen.policy.micro_batch == config.rollout.groups * config.rollout.group_size, "all of it fits"
    assert all(weight.grad is None for weight in models.weights.values())


def test_low_memory_learns_the_same(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One setting, recorded as those that it stands for; losses are those of the plain run, within rounding."""
    assert train(["small.yaml", "--policy.train", "lora", "--iterations", "3", "--name", "plain"]) == 0
    assert train(["small.yaml", "--policy.train", "lora", "--iterations", "3", "--low-memory", "--name", "low"]) == 0
    recorded = configure(["--config", "runs/low/config.yaml"])
    assert recorded.low_memory and recorded.policy.behaviour == "adapter" and recorded.ema.offload
    assert recorded.engine.checkpointing == "blocks" and recorded.engine.decode_batch == 1
    losses = [[line["loss"] for line in read_metrics(Path(f"runs/{name}/metrics.jsonl"))] for name in ("plain", "low")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert train(["--resume", "runs/low", "--iterations", "4"]) == 0


def test_low_memory_fits_a_small_card() -> None:
    """LoRA on SD3.5-Medium: less than half of what the recipe takes as it is, below 16 GB with micro-batches of one."""
    predictor = Predictor(medium(), torch.bfloat16)
    plain, low = (with_low_memory(configure(["sd35m-geneval", *more])) for more in ([], ["--low-memory"]))
    assert predictor.predict(low, 1).peak < min(0.5 * predictor.predict(plain, 16).peak, 16 * GB)


def test_the_cards_that_a_run_fits_on(capsys: pytest.CaptureFixture[str]) -> None:
    """One line a card: a larger one never fits less, and what is left open grows with it."""
    assert memory(["sd35m-geneval", "--random-weights"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("predicted memory ") and lines[1].split() == [
        "card",
        "micro-batch",
        *lines[1].split()[2:],
    ]
    fits = [line.endswith("yes") for line in lines[2:]]
    assert len(fits) == len(CARDS_GB) and fits == sorted(fits) and not fits[0] and fits[-1]
    assert "no; these save most: --" in lines[2]
    config = configure(["sd35m-geneval", "--low-memory"])
    small, large = (fit_on(config, medium(), torch.bfloat16, gb) for gb in (16, 80))
    assert small.fits and small.prediction.peak < 16 * GB and small.micro_batch < large.micro_batch
    sharded = configure(["sd35m-geneval", "--policy.train", "full", "--distributed.shard", "full"])
    alone, one_of_eight = (fit_on(sharded, medium(), torch.bfloat16, 80, processes) for processes in (1, 8))
    assert one_of_eight.prediction.held["gradients"] == alone.prediction.held["gradients"] // 8


@pytest.mark.parametrize("value", ["0", "many"])
def test_a_wrong_number_of_processes_is_named(value: str) -> None:
    with pytest.raises(UserError, match=f"--processes: a whole number from 1 up, not '{value}'"):
        memory(["--processes", value])
