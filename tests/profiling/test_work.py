"""FLOPs and bytes: against counts by hand, torch's own flop counter and SD3.5-Medium's known size."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.config.options import Policy
from dgpo_fast.engine.compile import StaticBatches
from dgpo_fast.models.datasheet import find_datasheet
from dgpo_fast.models.work import FUSED_ATTENTION, ModelWork, WorkCounter, WorkMeter
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.trainer import Trainer
from tests.engine.cases import EngineCase, make_config
from tests.objective_configs import grpo_case
from tests.sd3 import medium, sample_shape, transformer_in


def test_a_matmul_by_hand() -> None:
    """2·m·k·n FLOPs; both factors read once and the product written; a transpose moves nothing."""
    left, right = torch.ones(3, 5), torch.ones(7, 5)
    with WorkCounter() as counter:
        left @ right.T
    assert dict(counter.work.flops) == {"matmul": 2 * 3 * 5 * 7}
    assert dict(counter.work.bytes) == {"matmul": 4 * (3 * 5 + 5 * 7 + 3 * 7)}


def test_bytes_of_an_expanded_tensor_are_its_storages() -> None:
    with WorkCounter() as counter:
        torch.ones(1, 5, dtype=torch.bfloat16).expand(1000, 5) + torch.ones(1000, 5, dtype=torch.bfloat16)
    ones = 2 * (5 + 5000)
    assert dict(counter.work.bytes) == {"other": ones + 2 * (5 + 5000 + 5000)}


def test_sd35_medium_has_its_known_flops() -> None:
    """TFLOP per sample at 512×512 and 205 text tokens, counted by others: 2.224, LoRA 2.270 + 2.721, decode 2.515."""
    with torch.device("meta"):
        transformer = medium().build_transformer()
    work = ModelWork(transformer, Policy(), torch.bfloat16, sample_shape((16, 64, 64), (205, 4096), 2048))
    tflop = {kind: work.count(kind).total_flops / 1e12 for kind in ("rollout", "policy forward", "backward", "decode")}
    expected = {"rollout": 2.224, "policy forward": 2.270, "backward": 2.721, "decode": 2.515}
    assert tflop == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("train", "merged"), [("lora", False), ("lora", True), ("full", False)])
def test_torchs_flop_counter_agrees(train: str, merged: bool, random_pipeline: Path) -> None:
    transformer = transformer_in(random_pipeline)
    shape = sample_shape((16, 8, 8), (21, 48), 32)
    policy = Policy(train=train, lora_rank=4)  # type: ignore[arg-type]
    work = ModelWork(transformer, policy, torch.float32, shape, merged=merged)
    for batch in (1, 3):
        with FUSED_ATTENTION, FlopCounterMode(display=False) as forward:
            out = shape.predict(work.policy, batch, torch.float32)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        assert work.count("policy forward", batch).total_flops == forward.get_total_flops() > 0
        assert work.count("backward", batch).total_flops == backward.get_total_flops() > 0
    assert work.count("rollout", 3).total_flops == 3 * work.count("rollout").total_flops
    is_one_product = work.count("policy forward").total_flops == work.count("reference forward").total_flops
    assert is_one_product == (merged or train == "full")


def test_rollouts_by_an_adapter_beside_a_merged_policy(random_pipeline: Path) -> None:
    transformer = transformer_in(random_pipeline)
    shape = sample_shape((16, 8, 8), (21, 48), 32)
    work, plain = (
        ModelWork(transformer, Policy(lora_rank=4), torch.float32, shape, adapted=True, merged=merged)
        for merged in (True, False)
    )
    assert work.count("rollout").total_flops == plain.count("policy forward").total_flops
    assert work.count("rollout").total_flops > work.count("policy forward").total_flops


@pytest.mark.parametrize(("micro_batch", "policy_forwards"), [(8, 24), (2, 48)])
def test_samples_of_an_iteration(micro_batch: int, policy_forwards: int, workspace: Path) -> None:
    """12 images, 4 guided steps, 2 timesteps; a group larger than the micro-batch takes one more policy forward, which
    is executed and not useful."""
    trainer = Trainer(build(configure(["small.yaml", "--policy.micro-batch", str(micro_batch)])))
    trainer.open_logs(workspace, {})
    trainer.console.start_training(0, 1)
    trainer.step()
    samples, executed = trainer.work.last, trainer.work.last_executed
    training = {"reference forward": 24, "old forward": 24, "policy forward": 24, "backward": 24}
    assert samples == {"rollout": 12 * 4 * 2, "decode": 12, **training}
    assert executed == {**samples, "policy forward": policy_forwards}
    per_sample = trainer.work.flops_per_sample
    line = read_metrics(workspace / "metrics.jsonl")[0]
    for name, rows in (("achieved_tflops", samples), ("executed_tflops", executed)):
        flops = sum(per_sample[kind] * count for kind, count in rows.items())
        assert line[name] == pytest.approx(flops / line["iteration_s"] / 1e12)
    assert "mfu_percent" not in line, "a CPU has no datasheet here"


@pytest.mark.parametrize(("whole", "policy", "backward"), [(True, 2, 2), (False, 2, 1)])
def test_guided_flow_grpo_agrees_with_torchs_counter(
    whole: bool, policy: int, backward: int, random_pipeline: Path
) -> None:
    """Matrix products of a gradient: an unconditional velocity that is a constant has a forward and no backward."""
    case = grpo_case(random_pipeline, unconditional_gradient=whole)
    meter = WorkMeter(case.models, case.config.policy, tuple(case.batch.x0.shape[1:]))
    with meter.training(), FlopCounterMode(display=False) as counter:
        case.gradient(micro_batch=5)
    samples, trained = meter.take(), len(case.batch.x0) * (case.batch.schedule.steps - 1)
    expected = {"reference forward": 2 * trained, "policy forward": policy * trained, "backward": backward * trained}
    assert samples == expected
    work = meter.model_work()
    counted = {kind: work.count(kind).flops for kind in samples}
    flops = sum(count * (counted[k]["matmul"] + counted[k]["convolution"]) for k, count in samples.items())
    assert flops == counter.get_total_flops() > 0


@pytest.mark.parametrize("kind", ["blocks", "selective"])
def test_what_checkpointing_computes_again(kind: str, random_pipeline: Path) -> None:
    """Blocks: all that the policy's blocks compute, and nothing of what lies around them; selective: less."""
    case = EngineCase(random_pipeline, make_config(checkpointing=kind))
    shape = sample_shape((16, 8, 8), (21, 48), 32)
    work = ModelWork(case.models.base, case.config.policy, torch.float32, shape, checkpoint=case.engine.checkpoint)
    forward, again = work.count("policy forward").total_flops, work.recomputed_flops()
    assert (0.8 if kind == "blocks" else 0.1) * forward < again < (1.0 if kind == "blocks" else 0.8) * forward
    assert work.count("backward").total_flops == work._count("backward", 1).total_flops, "its blocks are as before"


def test_padding_and_recomputation_are_executed_and_not_useful(random_pipeline: Path) -> None:
    """Batches padded to 5 and 16 rows: 12 samples at 2 levels, and a rollout of 7 in batches of 5."""
    case = EngineCase(random_pipeline, make_config(checkpointing="blocks"))
    meter = WorkMeter(
        case.models, case.config.policy, case.sampler.shape, drawn=lambda rows: 5, checkpoint=case.engine.checkpoint
    )
    StaticBatches([10], training=[16]).attach(case.models.policy)
    with meter.training():
        case.gradient()
    text = case.encoder(["a cat"]).repeat_interleave(7)
    for rows in (slice(0, 5), slice(5, 7)):
        meter.sampled(text[rows], forwards=8, useful=len(text[rows]))
    useful = meter.take()
    assert useful["policy forward"] == useful["backward"] == 24 and useful["rollout"] == 7 * 8
    executed = meter.last_executed
    assert executed["policy forward"] == executed["backward"] == executed["recomputed forward"] == 4 * 16
    assert executed["rollout"] == 10 * 8 and "recomputed forward" not in useful
    assert meter.flops(executed) > meter.flops(useful)


def test_flops_are_counted_once(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first iteration, an iteration's FLOPs are a few multiplications."""
    trainer = Trainer(build(configure(["small.yaml"])))
    trainer.open_logs(workspace, {})
    trainer.console.start_training(0, 2)
    trainer.step()
    monkeypatch.setattr(trainer.work, "model_work", None)
    trainer.step()
    assert [line["achieved_tflops"] > 0 for line in read_metrics(workspace / "metrics.jsonl")] == [True, True]


def test_datasheets_are_found_by_torchs_names() -> None:
    names = {
        "NVIDIA H200": 989,
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA GH200 480GB": 989,
        "NVIDIA L4": 121,
        "NVIDIA L40S": 362,
        "NVIDIA A10": 125,
    }
    for name, peak in names.items():
        sheet = find_datasheet(name)
        assert sheet and sheet.peak_tflops(torch.bfloat16) == peak, name
        assert sheet.peak_tflops(torch.float32) < peak
    for name in ("NVIDIA A10G", "NVIDIA L40", "NVIDIA H200 MIG 1g.18gb", "AMD Instinct MI300X", "Tesla T4"):
        assert find_datasheet(name) is None, name
