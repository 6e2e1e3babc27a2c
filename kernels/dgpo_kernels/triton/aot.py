"""Compiles every kernel ahead of time, with the block sizes it is launched with, and reads what the assembler made of
it.

Needs triton and its CUDA tools, but no GPU. ``python -m dgpo_kernels.triton.aot`` prints the table that the
documentation holds; ``--keep FILE NAME`` also keeps the numbers in a JSON file, under a name such as ``after``.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction

from dgpo_kernels.triton import group_loss, loss_partials, noise, policy_gradient, step
from dgpo_kernels.triton.launch import (
    BACKWARD_CONFIG,
    COMPILER_OPTIONS,
    FORWARD_CONFIG,
    MULTIPROCESSORS,
    NOISE_CONFIG,
    TileConfig,
)

ARCHITECTURES = (80, 90, 100)
# The budget. The kernels over tiles may take all the registers a thread can have: two programs of four warps an SM
# still hold more 16-byte loads in flight than the memory's latency asks for. What counts is that nothing spills. The
# solver steps, with little to hold, leave room for a full SM. The few words of shared memory are those of sums across
# warps.
MAX_REGISTERS = 255
MAX_STEP_REGISTERS = 64
MAX_SHARED_BYTES = 8 * 1024

REGISTERS_OF_AN_SM = 65536
BATCHES = (24, 48, 96, 192)
TILED = {"group noise": NOISE_CONFIG, "loss": FORWARD_CONFIG, "gradient": BACKWARD_CONFIG}
# Policy, reference, θ_old and the KL term.
ROWS_A_SAMPLE = 4

_INTEGERS = {"samples", "tiles", "numel", "quarter", "span"}
_FLOATS = {
    "guidance_scale",
    "inverse_numel",
    "two_over_numel",
    "beta",
    "log_lower",
    "log_upper",
    "kl_scale",
    "num_groups",
    "group_size",
}
_POINTERS = {"group_index": "*i64", "seed": "*i64", "draw": "*i64", "clipped": "*i1"}
_FLOAT32_POINTERS = {
    "sigma",
    "partials",
    "advantage",
    "given_scores",
    "losses",
    "scores",
    "weights",
    "inverse_groups",
    "loss",
    "grad_loss",
    "coefficients",
    "x",
    "x_next",
    "x0_prev",
}


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched for one kind of call.

    wide: whether every access to a big tensor is to be 128 bits wide.
    max_registers: the bound given to the assembler, None for none.
    integers: type of sizes and strides, as Triton takes it from their values.
    warps_per_sm: that the launcher takes to fit on an SM; 0 if it does not ask.
    aligned: whether tensors and sizes are multiples of 16.
    """

    name: str
    kernel: JITFunction
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    tensor_type: str = "*bf16"
    float32: tuple[str, ...] = ()
    wide: bool = True
    max_registers: int | None = MAX_REGISTERS
    integers: str = "i32"
    aligned: bool = True
    warps_per_sm: int = 0


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: a thread's registers and local bytes, a program's shared bytes, access widths.

    instructions: in the machine code, loops once.
    loads_before_noise: 128-bit loads before the first round of Philox; None in a kernel that makes no noise.
    barriers: depth in loops of each barrier of a program; a loop around other loops counts as one more.
    """

    registers: int
    stack_bytes: int
    local_bytes: int
    spill_instructions: int
    shared_bytes: int
    load_bits: tuple[int, ...]
    store_bits: tuple[int, ...]
    instructions: int
    loads_before_noise: int | None
    barriers: tuple[int, ...]


_KERNELS = (
    (noise._group_noise_kernel, NOISE_CONFIG),
    (loss_partials._partials_kernel, FORWARD_CONFIG),
    (policy_gradient._gradient_kernel, BACKWARD_CONFIG),
)


def _tile(config: TileConfig, numel: int, itemsize: int = 2, channels: int = 0) -> tuple[dict[str, Any], int]:
    """The tile's constants, and the number of warps."""
    _, tiles, block, vector, num_warps = config.tiles(numel, itemsize)
    even = numel == 4 * tiles * block
    return {"CHANNELS": channels, "EVEN": even, "BLOCK": block, "VECTOR": vector}, num_warps


def variants() -> Iterator[Variant]:
    """The kernels at SD3.5's size (65,536 elements a sample), and the fullest at that of a small model (768)."""

    def variant(name: str, kernel: JITFunction, constants: dict[str, Any], warps: int, **options: Any) -> Variant:
        fitting = {function: config.warps_per_sm for function, config in _KERNELS}.get(kernel, 0)
        return Variant(name, kernel, tuple(constants.items()), warps, warps_per_sm=fitting, **options)

    predictions = {"": (False, 0), ", old": (True, 0), ", old, kl = ref": (True, 1), ", old, kl": (True, 2)}
    for numel in (65536, 768):
        tile, warps = _tile(NOISE_CONFIG, numel)
        x0 = {"SIGMA_STRIDE": 1, "HAS_X0": True, **tile}
        yield variant(f"group_noise, N = {numel}", noise._group_noise_kernel, x0, warps)
        tile, warps = _tile(FORWARD_CONFIG, numel)
        for name, (old, kl) in predictions.items():
            flags = {"HAS_OLD": old, "KL": kl, **tile}
            flags |= ({} if old else {"old": None}) | ({} if kl == 2 else {"kl": None})
            if numel == 65536 or kl == 2:
                yield variant(f"loss{name}, N = {numel}", loss_partials._partials_kernel, flags, warps)
        tile, warps = _tile(BACKWARD_CONFIG, numel)
        for name, has_kl in (("", False), (", kl", True)):
            flags = {"HAS_KL": has_kl, **tile} | ({} if has_kl else {"kl": None})
            if numel == 65536 or has_kl:
                yield variant(f"gradient{name}, N = {numel}", policy_gradient._gradient_kernel, flags, warps)
    tile, warps = _tile(NOISE_CONFIG, 65536, itemsize=4)
    x0 = {"SIGMA_STRIDE": 1, "HAS_X0": True, **tile}
    yield variant("group_noise, float32", noise._group_noise_kernel, x0, warps, tensor_type="*fp32")
    store = {"SIGMA_STRIDE": 0, "HAS_X0": False, "x0": None, "sigma": None, **tile}
    yield variant("philox_normal, float32", noise._group_noise_kernel, store, warps, tensor_type="*fp32")
    tile, warps = _tile(FORWARD_CONFIG, 65536, itemsize=4)
    flags = {"HAS_OLD": True, "KL": 2, **tile}
    yield variant("loss, old, kl, float32", loss_partials._partials_kernel, flags, warps, tensor_type="*fp32")
    tile, warps = _tile(FORWARD_CONFIG, 65536)
    flags = {"HAS_OLD": True, "KL": 2, **tile}
    yield variant("loss, old, kl, x0 float32", loss_partials._partials_kernel, flags, warps, float32=("x0",))
    tile, warps = _tile(FORWARD_CONFIG, 65536, channels=16)
    flags = {"HAS_OLD": True, "KL": 2, **tile}
    yield variant("loss, old, kl, channels_last", loss_partials._partials_kernel, flags, warps, wide=False)
    # Sizes that Triton treats apart: odd ones, one (a constant to it), and those beyond 32 bits.
    tile, warps = _tile(FORWARD_CONFIG, 1031)
    odd = {"HAS_OLD": True, "KL": 2, **tile}
    yield variant("loss, old, kl, odd N", loss_partials._partials_kernel, odd, warps, wide=False, aligned=False)
    tile, warps = _tile(FORWARD_CONFIG, 1)
    strides = dict.fromkeys(("policy_stride", "ref_stride", "x0_stride", "old_stride", "kl_stride"), 1)
    single = {"HAS_OLD": True, "KL": 2, "numel": 1, "quarter": 1, **strides, **tile}
    yield variant("loss, old, kl, N = 1", loss_partials._partials_kernel, single, warps, wide=False, aligned=False)
    tile, warps = _tile(BACKWARD_CONFIG, 2**32)
    huge = {"HAS_KL": True, **tile}
    yield variant("gradient, kl, N = 2³²", policy_gradient._gradient_kernel, huge, warps, integers="i64")
    whole = {
        **{"HAS_OLD": True, "HAS_KL": True, "CLIP": True, "COUNT_GROUPS": True, "COUNT_SIZES": True},
        **{"SCORES_GIVEN": False, "SCORES_ONLY": False, "given_scores": None, **group_loss.GROUP_BLOCKS},
    }
    yield variant("group loss", group_loss._group_loss_kernel, whole, group_loss.GROUP_WARPS, wide=False)
    known = whole | {"COUNT_GROUPS": False, "COUNT_SIZES": False}
    yield variant("group loss, sizes given", group_loss._group_loss_kernel, known, group_loss.GROUP_WARPS, wide=False)
    given = whole | {"SCORES_GIVEN": True, "COUNT_GROUPS": False, "COUNT_SIZES": False}
    del given["given_scores"]
    yield variant("group loss, scores given", group_loss._group_loss_kernel, given, group_loss.GROUP_WARPS, wide=False)
    block = {"GUIDED": True, "BLOCK": step.BLOCK}
    yield variant("guided Euler step", step._euler_kernel, block, step.NUM_WARPS, max_registers=None)
    block |= {"HAS_PREV": True}
    yield variant(
        "guided DPM-Solver++(2M) step",
        step._dpmpp_2m_kernel,
        block,
        step.NUM_WARPS,
        float32=("x0",),
        max_registers=None,
    )


def compile_variant(variant: Variant, architecture: int) -> CompiledKernel:
    """Triton's compiled kernel for a compute capability such as 90."""
    constants = dict(variant.constants)
    kernel = variant.kernel
    signature: dict[str, str] = {}
    aligned = []
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in _INTEGERS or name.endswith("_stride"):
            bounds = name in ("samples", "tiles", "span")
            signature[name] = "i32" if bounds else variant.integers
            aligned += [] if bounds else [index]
        elif name in _FLOATS:
            signature[name] = "fp32"
        else:
            float32 = name in _FLOAT32_POINTERS or name in variant.float32
            signature[name] = _POINTERS.get(name, "*fp32" if float32 else variant.tensor_type)
            aligned.append(index)
    source = ASTSource(
        kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in aligned if variant.aligned}
    )
    target = GPUTarget("cuda", architecture, 32)
    options: dict[str, Any] = {"num_warps": variant.num_warps, **COMPILER_OPTIONS}
    options |= {"maxnreg": variant.max_registers} if variant.max_registers else {}
    return triton.compile(source, target=target, options=options)


def resources(variant: Variant, architecture: int) -> Resources:
    """Compiles a variant and reads its registers, memory and access widths from the machine code."""
    compiled = compile_variant(variant, architecture)
    machine_code = _disassemble(compiled.asm["cubin"])
    field = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", machine_code)}
    return Resources(
        registers=field["REG"],
        stack_bytes=field["STACK"],
        local_bytes=field["LOCAL"],
        spill_instructions=len(re.findall(r"\b(?:LDL|STL)\b", machine_code)),
        shared_bytes=max(field["SHARED"], compiled.metadata.shared),
        load_bits=_widths("LDG", machine_code),
        store_bits=_widths("STG", machine_code),
        instructions=len(_instructions(machine_code)),
        loads_before_noise=_loads_before_noise(machine_code),
        barriers=_barriers(machine_code),
    )


def _instructions(machine_code: str) -> list[tuple[int, str]]:
    """Address and text of each instruction, without the padding behind the last one."""
    found = [
        (int(place, 16), text) for place, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+?)\s*;", machine_code)
    ]
    while found and (found[-1][1] == "NOP" or found[-1][1].startswith("BRA")):
        found.pop()
    return found


def _loads_before_noise(machine_code: str) -> int | None:
    first_round = re.search(_PHILOX, machine_code)
    if first_round is None:
        return None
    return len(re.findall(r"\bLDG\S*\.128\b", machine_code[: first_round.start()]))


_PHILOX = r"-0x2daee0ad|0xd2511f53"


def _barriers(machine_code: str) -> tuple[int, ...]:
    """Of each barrier in turn, the number of loops around it that hold another loop."""
    instructions = _instructions(machine_code)
    jumps = [(place, re.search(r"\bBRA\b.* (0x[0-9a-f]+)$", text)) for place, text in instructions]
    loops = [(int(to[1], 16), place) for place, to in jumps if to and int(to[1], 16) < place]
    outer = [(a, b) for a, b in loops if any(a <= start and end < b for start, end in loops)]
    return tuple(sum(a <= place <= b for a, b in outer) for place, text in instructions if re.search(r"\bBAR\b", text))


def executed_barriers(barriers: tuple[int, ...], samples: int) -> int:
    """Barriers that the group kernel's program waits at: those in a loop once for each block of rows it adds up."""
    blocks = math.ceil(ROWS_A_SAMPLE * samples / group_loss.GROUP_BLOCKS["BLOCK_ROWS"])
    return sum(blocks**depth for depth in barriers)


def waves() -> str:
    """How often each kernel over tiles fills an H200 at SD3.5's size, by the number of samples, as Markdown."""
    lines = ["| kernel | " + " | ".join(f"B = {samples}" for samples in BATCHES) + " |", "|---" * 5 + "|"]
    for name, config in TILED.items():
        _, tiles, _, _, warps = config.tiles(65536, 2)
        cells = []
        for samples in BATCHES:
            span = config.span_of(samples, tiles, warps, torch.device("cpu"))
            programs, slots = tiles * math.ceil(samples / span), MULTIPROCESSORS * (config.warps_per_sm // warps)
            cells.append(f"span {span}: {programs} programs, {programs / slots:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _widths(instruction: str, machine_code: str) -> tuple[int, ...]:
    """Bits of each global access of a kind in the machine code, sorted: 128, 64, 32 (the default), 16 or 8."""
    modifiers = re.findall(rf"\b{instruction}((?:\.\w+)+)", machine_code)
    found = [next((part for part in text.split(".") if part in _WIDTHS), "32") for text in modifiers]
    return tuple(sorted(_WIDTHS[part] for part in found))


_WIDTHS = {"256": 256, "128": 128, "64": 64, "32": 32, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


def _disassemble(cubin: bytes) -> str:
    """The machine code and its resource usage, as cuobjdump prints them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def faults(variant: Variant, found: Resources) -> list[str]:
    """What a kernel does that it must not: spill, use local memory, go over its budget, or access memory narrowly."""
    limit = MAX_REGISTERS if variant.max_registers else MAX_STEP_REGISTERS
    accesses = found.load_bits + found.store_bits
    checks = {
        "spills": found.spill_instructions == 0,
        "has a stack": found.stack_bytes == 0,
        "uses local memory": found.local_bytes == 0,
        f"takes {found.registers} registers": found.registers <= limit,
        f"takes {found.shared_bytes} shared bytes": found.shared_bytes <= MAX_SHARED_BYTES,
        f"has no 128-bit access: {accesses}": not variant.wide or max(accesses) == 128,
        "makes noise before its first loads": not variant.wide or found.loads_before_noise != 0 or not _reads(variant),
        "does not fit an SM as often as the launcher takes it to": _warps_fitting(found) >= variant.warps_per_sm,
        f"makes 16-bit accesses: {accesses}": not variant.wide or min(accesses) >= 32,
    }
    return [fault for fault, holds in checks.items() if not holds]


def _reads(variant: Variant) -> bool:
    """Whether a kernel that makes noise has data to load as well."""
    return dict(variant.constants).get("HAS_X0", True)


def _warps_fitting(found: Resources) -> int:
    """Warps of a kernel on an SM, by its registers."""
    return REGISTERS_OF_AN_SM // (32 * 8 * math.ceil(found.registers / 8))


def table(measured: dict[tuple[Variant, int], Resources]) -> str:
    """The kernels' resources as a Markdown table."""
    columns = ["kernel", "sm", "registers", "spilled bytes", "shared bytes", "128-bit loads", "before noise"]
    columns += ["128-bit stores", "instructions", "barriers"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (variant, architecture), found in measured.items():
        cells = [variant.name, f"{architecture}", f"{found.registers}"]
        cells += [f"{found.local_bytes + found.stack_bytes}", f"{found.shared_bytes}"]
        cells += [f"{found.load_bits.count(128)} of {len(found.load_bits)}"]
        cells += ["" if found.loads_before_noise is None else f"{found.loads_before_noise}"]
        cells += [f"{found.store_bits.count(128)} of {len(found.store_bits)}", f"{found.instructions}"]
        cells += [_barriers_in_words(variant, found.barriers)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _barriers_in_words(variant: Variant, barriers: tuple[int, ...]) -> str:
    """How many there are; of the group kernel, how many are waited at, by the number of samples."""
    if variant.kernel is not group_loss._group_loss_kernel:
        return f"{len(barriers)}"
    return ", ".join(f"{executed_barriers(barriers, samples)} at B = {samples}" for samples in (96, 192))


def main() -> None:
    """Prints the table for the architectures on the command line (default all); exits 1 if a kernel is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument("--keep", nargs=2, metavar=("FILE", "NAME"))
    options = parser.parse_args()
    measured = {(variant, sm): resources(variant, sm) for variant in variants() for sm in options.architectures}
    print(f"Triton {triton.__version__}\n\n{table(measured)}\n\n{waves()}")
    if options.keep:
        file = Path(options.keep[0])
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        rows = [
            {"kernel": v.name, "sm": sm, **asdict(found), "barriers": _barriers_in_words(v, found.barriers)}
            for (v, sm), found in measured.items()
        ]
        text = json.dumps(
            kept | {options.keep[1]: {"triton": triton.__version__, "kernels": rows, "waves": waves().splitlines()}}
        )
        file.write_text(text.replace('{"kernel"', '\n {"kernel"') + "\n", encoding="utf-8")
    found = [f"{v.name} on sm_{sm}: {', '.join(faults(v, r))}" for (v, sm), r in measured.items() if faults(v, r)]
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
