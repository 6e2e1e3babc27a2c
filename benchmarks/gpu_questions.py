"""What is asked of a GPU first, each in a minute or two, at the size of SD3.5-Medium with random numbers.

    python -m benchmarks.gpu_questions rates         matrix products: 8192³ and the model's own, in a burst and lasting
    python -m benchmarks.gpu_questions attention     every attention kernel inside compiled operations, both directions
    python -m benchmarks.gpu_questions blocks        each kind of block without a gradient, compiled and eager
    python -m benchmarks.gpu_questions group_kernel  the two launches of the loss's forward, apart

The answers go to `benchmarks/results/gpu/questions.json`, each as soon as it is there.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from benchmarks.compiled_blocks.programs import BLOCKS, DTYPE, IMAGE_TOKENS, LATENT, TEXT_TOKENS
from dgpo_fast.config.command_line import run_command
from dgpo_fast.engine.attention import Timing, time_attention
from dgpo_fast.engine.compile import BACKEND, RECOMPILE_LIMIT, REFUSALS, reason
from dgpo_fast.engine.epilogue import use_epilogue
from dgpo_fast.engine.timing import best_ms
from dgpo_fast.errors import UserError
from dgpo_fast.models.families.sd3 import SD3, sd35_medium
from dgpo_fast.models.family import AttentionShape
from dgpo_fast.profiling.machine import versions
from dgpo_fast.profiling.power import PowerMeter
from dgpo_fast.profiling.rates import measure_rates, product_tflops
from dgpo_fast.run.metrics import write_json

RESULT = Path(__file__).parent / "results/gpu/questions.json"
ROWS = (16, 32, 64, 96)
DRAWN, LEARNT = 64, 32
"""Rows of a guided rollout's forward, and of a micro-batch."""
TIMED_S = 0.3
FLASH_4 = "flash4"
"""FlashAttention 4, which torch puts in the place of its own flash kernel."""
Rows = list[dict[str, Any]]


def rates(device: torch.device) -> Rows:
    """TFLOP/s in a burst and lasting: of a large square product, and of those of the two streams of tokens."""
    whole = measure_rates(device, DTYPE)
    found: Rows = [{"product": f"{whole.matmul_size}³", **asdict(whole)}]
    width = sd35_medium().transformer["caption_projection_dim"]
    for rows in ROWS[:3]:
        for stream, tokens in (("image", IMAGE_TOKENS), ("text", TEXT_TOKENS)):
            for inner, out in ((width, width), (width, 4 * width), (4 * width, width)):
                lasting, burst = product_tflops(device, DTYPE, rows * tokens, inner, out)
                name = f"{rows} rows of {tokens} {stream} tokens, {inner} → {out}"
                found.append({"product": name, "matmul_tflops": lasting, "matmul_burst_tflops": burst})
    return found


def attention_times(shapes: tuple[AttentionShape, ...], device: torch.device) -> Rows:
    """Milliseconds of all attention of a forward, and of a forward with its backward, by kernel."""
    timings = [*time_attention(shapes, device, DTYPE, compiled=True), flash_4(shapes, device)]
    tflop = sum(4 * one.calls * one.batch * one.heads * one.tokens**2 * one.head_dim for one in shapes) / 1e12
    rows: Rows = []
    for timing in timings:
        row = {"rows": shapes[0].batch, **asdict(timing)}
        if timing.forward_ms:
            row["forward_tflops"] = 1e3 * tflop / timing.forward_ms
        if timing.backward_ms:
            row["both_tflops"] = 3.5e3 * tflop / timing.backward_ms
        rows.append(row)
    return rows


def flash_4(shapes: tuple[AttentionShape, ...], device: torch.device) -> Timing:
    """FlashAttention 4, if it is installed and torch knows it."""
    try:
        from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

        activate_flash_attention_impl("FA4")
    except REFUSALS as error:
        return Timing(FLASH_4, obstacle=reason(error))
    try:
        (timing,) = time_attention(shapes, device, DTYPE, compiled=True, names=("native_flash",))
    finally:
        restore_flash_attention_impl()
    return replace(timing, name=FLASH_4)


def block_times(family: SD3, device: torch.device, rows: Sequence[int], tokens: int, text_tokens: int) -> Rows:
    """Milliseconds a sample of one block of each kind, and of all blocks of the model."""
    kinds = {"num_layers": len(BLOCKS), "dual_attention_layers": (0,)}
    small = {**family.architecture.transformer, **kinds}
    found: Rows = []
    for how in ("compiled", "eager"):
        with torch.device(device):
            transformer = family.build_transformer(small).to(DTYPE).requires_grad_(False)
        family.set_attention(transformer, "native")
        use_epilogue(transformer, how == "compiled")
        for batch in rows:
            times = _one_block_each(transformer, how == "compiled", batch, tokens, text_tokens, device)
            whole = sum(BLOCKS[kind] * ms for kind, ms in times.items())
            found.append({"blocks": how, "rows": batch, "ms_a_sample": times, "all_ms_a_sample": whole})
    return found


@torch.no_grad()
def _one_block_each(
    transformer: SD3Transformer2DModel, compiled: bool, batch: int, tokens: int, text_tokens: int, device: torch.device
) -> dict[str, float]:
    width = transformer.config.caption_projection_dim

    def inputs(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=device, dtype=DTYPE)

    given = {"hidden_states": inputs(tokens, width), "encoder_hidden_states": inputs(text_tokens, width)}
    given["temb"] = inputs(width)
    calls: list[Callable[[], object]] = []
    for block in transformer.transformer_blocks:
        run = torch.compile(block, fullgraph=True, dynamic=False, backend=BACKEND) if compiled else block
        calls.append(lambda run=run: run(**given))  # type: ignore[misc]
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        times = best_ms(calls, device, TIMED_S)
    return {kind: ms / batch for kind, ms in zip(BLOCKS, times, strict=True)}


def group_kernel_times() -> Rows:
    """Microseconds of the launch that reads the predictions, and of the one that makes the loss of their sums."""
    from dgpo_kernels.triton.group_loss import group_loss
    from dgpo_kernels.triton.loss_partials import loss_partials

    from benchmarks.test_kernel_speed import GROUP_SIZE, gpu_times_us

    found: Rows = []
    one, two = (torch.tensor(value, device="cuda") for value in (1, 2))
    numel = torch.Size(LATENT).numel()
    for batch in (24, 48, 96, 192):
        policy, ref, old, x0 = torch.randn(4, batch, *LATENT, device="cuda").to(DTYPE).unbind()
        advantage, index = torch.randn(batch, device="cuda"), torch.arange(batch, device="cuda") // GROUP_SIZE
        reads = partial(loss_partials, policy, ref, x0, old, ref, True, index, one, two)
        sums = (reads(), numel, advantage, index, None, True, True, 100.0, 0.01, 0.02 / batch, None, None)
        times = {"loss_partials_us": reads, "group_loss_us": partial(group_loss, *sums)}
        found.append({"batch": batch, **{name: median(gpu_times_us(call)) for name, call in times.items()}})
    return found


def answered(question: str, device: torch.device) -> Rows:
    """The answer to one of the questions at SD3.5-Medium's size."""
    family = SD3(sd35_medium())
    if question == "rates":
        return rates(device)
    if question == "blocks":
        return block_times(family, device, ROWS, IMAGE_TOKENS, TEXT_TOKENS)
    if question == "group_kernel":
        return group_kernel_times()
    shapes = [family.attention_shapes(rows, LATENT, TEXT_TOKENS) for rows in (DRAWN, LEARNT)]
    return [row for of_rows in shapes for row in attention_times(of_rows, device)]


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_questions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("questions", nargs="+", choices=("rates", "attention", "blocks", "group_kernel"))
    return made


def main(args: list[str]) -> int:
    """Asks, prints and writes."""
    questions = parser().parse_args(args).questions
    if not torch.cuda.is_available():
        raise UserError("gpu_questions: torch finds no CUDA GPU here")
    device = torch.device("cuda")
    about = {"device": torch.cuda.get_device_name(), **versions(device, PowerMeter(device).driver)}
    report = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    for question in questions:
        rows = answered(question, device)
        report[question] = {**about, "date": datetime.now(UTC).isoformat(timespec="seconds"), "rows": rows}
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        write_json(RESULT, report)
        print("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
