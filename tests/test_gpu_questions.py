"""`python -m benchmarks.gpu_questions`, on a CPU and a small model."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_questions
from benchmarks.compiled_blocks.programs import BLOCKS
from dgpo_fast.config.command_line import run_command
from dgpo_fast.engine import attention
from dgpo_fast.models.architecture import read_architecture
from dgpo_fast.models.families.sd3 import SD3
from dgpo_fast.models.family import AttentionShape
from dgpo_fast.profiling.rates import Rates, product_tflops

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short measurements, and graphs without code generation."""
    torch._dynamo.reset()
    monkeypatch.setattr(gpu_questions, "BACKEND", "aot_eager")
    monkeypatch.setattr(gpu_questions, "TIMED_S", 0.0)
    monkeypatch.setitem(attention.TIMED_S, "cpu", 0.0)


def test_blocks_of_each_kind(random_pipeline: Path) -> None:
    """Compiled and eager, at each number of rows; the whole is the sum over the model's blocks."""
    rows = gpu_questions.block_times(SD3(read_architecture(random_pipeline)), CPU, (1, 2), tokens=16, text_tokens=5)
    assert [(row["blocks"], row["rows"]) for row in rows] == [(how, n) for how in ("compiled", "eager") for n in (1, 2)]
    for row in rows:
        times = row["ms_a_sample"]
        assert list(times) == list(BLOCKS) and min(times.values()) > 0
        assert row["all_ms_a_sample"] == pytest.approx(sum(BLOCKS[kind] * ms for kind, ms in times.items()))


def test_every_kernel_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that cannot run say why, FlashAttention 4 too, which no test machine has."""
    rows = gpu_questions.attention_times((AttentionShape(2, 8, 2, 16, calls=3, text=3),), CPU)
    by_name = {row["name"]: row for row in rows}
    assert set(by_name) == {*attention.CANDIDATES["cpu"], gpu_questions.FLASH_4}
    native = by_name["native"]
    assert native["rows"] == 2 and native["forward_ms"] > 0 and native["both_tflops"] > 0
    flops = 4 * 3 * 2 * 2 * 8**2 * 16
    assert native["forward_tflops"] == pytest.approx(flops / 1e9 / native["forward_ms"])
    assert by_name[gpu_questions.FLASH_4]["obstacle"] and by_name[gpu_questions.FLASH_4]["forward_ms"] is None


def test_products_of_both_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lasting and burst rates of a square product and of three of each stream at three numbers of rows."""
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(gpu_questions, "measure_rates", lambda *_: Rates(700.0, 790.0, 8192, 4000.0, 1024))
    monkeypatch.setattr(
        gpu_questions, "product_tflops", lambda device, dtype, *shape: asked.append(shape) or (600.0, 660.0)
    )
    rows = gpu_questions.rates(CPU)
    assert len(rows) == 1 + 3 * 2 * 3 and (64 * 205, 1536, 6144) in asked
    assert all(row["matmul_tflops"] < row["matmul_burst_tflops"] for row in rows)


def test_products_of_any_shape() -> None:
    lasting, burst = product_tflops(CPU, torch.float32, 8, 32, 16)
    assert lasting == burst > 0


def test_without_a_gpu_it_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["", "rates"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_command(gpu_questions.main) == 2
    assert capsys.readouterr().err == "error: gpu_questions: torch finds no CUDA GPU here\n"
