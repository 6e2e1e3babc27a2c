"""What "auto" means on this device: every choice of the engine, made once, with the reason in words."""

import shutil
from dataclasses import asdict, dataclass, field

import torch

from dgpo_fast.config.options import Engine as EngineConfig
from dgpo_fast.engine import attention, compile, linear
from dgpo_fast.engine.attention import Timing
from dgpo_fast.engine.remembered import remembered
from dgpo_fast.errors import UserError
from dgpo_fast.models.family import AttentionShape
from dgpo_fast.objectives.first_level import input_error, is_shared, largest_error
from dgpo_fast.records import JsonObject

GRAPH_MEMORY_GIB = 40.0
COMPILED_SHARE = 0.83
"""Time of an iteration on a CPU with compiled blocks, of its time without (`benchmarks/compiling.py`)."""
COMPILING_IMAGES = 5610
"""Images that a CPU draws and trains on in the time that compiling takes (`benchmarks/compiling.py`)."""


@dataclass(frozen=True)
class Choices:
    """What the engine does. Two runs with the same choices compute the same, to the last bit on a CPU.

    Attributes:
        compile: transformer blocks, and the decoder, are compiled.
        cuda_graphs: rollouts are recorded and replayed.
        attention: kernel of forwards without a gradient.
        train_attention: kernel of the policy's forward and backward.
        linear: "torch" or "onednn".
        epilogue: frozen feed-forwards are one product with their GELU.
        decoder: "plain", "fast" or "phases".
        share_first_level: a group's samples share one row at the first noise level.
    """

    compile: bool
    cuda_graphs: bool
    attention: str
    train_attention: str
    linear: str
    epilogue: bool
    decoder: str
    share_first_level: bool

    def to_dict(self) -> JsonObject:
        """Ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Workload:
    """What choices depend on besides the settings.

    Attributes:
        device: the run's.
        dtype: of the forwards without a gradient.
        rollout_shapes, train_shapes: attention of one forward of the rollout, and of evaluations if their images are of
            another size, and of one micro-batch.
        width: of the transformer.
        images: drawn in the whole run.
        sharded: whether weights are cut over processes.
        shared_sigma: of the level at which a group's samples may share one row; None if there is none.
        attention_names: kernels that the model's attention can be switched to; None: all.
        own_decoder: whether the decoder is one whose layers are exchanged (`engine/decoder.py`).
    """

    device: torch.device
    dtype: torch.dtype
    rollout_shapes: tuple[AttentionShape, ...]
    train_shapes: tuple[AttentionShape, ...]
    width: int
    images: int
    sharded: bool = False
    shared_sigma: float | None = None
    attention_names: tuple[str, ...] | None = None
    own_decoder: bool = True

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass
class Reasons:
    """Why the choices are as they are.

    Attributes:
        lines: one for each choice that "auto" made.
        timings: attention kernels, for rollouts and for training.
    """

    lines: list[str] = field(default_factory=list)
    timings: dict[str, tuple[Timing, ...]] = field(default_factory=dict)


def choose(config: EngineConfig, workload: Workload) -> tuple[Choices, Reasons]:
    """Turns every "auto" of `config` into a choice. Raises UserError if a setting is not available here."""
    reasons = Reasons()
    compiled = _compile(config, workload, reasons)
    choices = Choices(
        compile=compiled,
        cuda_graphs=_cuda_graphs(config, workload, reasons),
        attention=_attention(config, workload, reasons, compiled, training=False),
        train_attention=_attention(config, workload, reasons, compiled, training=True),
        linear=_linear(config, workload, reasons),
        epilogue=_epilogue(config, workload, reasons),
        decoder=_decoder(config, workload),
        share_first_level=_share_first_level(config, workload, reasons),
    )
    return choices, reasons


def _compile(config: EngineConfig, workload: Workload, reasons: Reasons) -> bool:
    if config.compile == "off":
        return False
    problem = _no_compiler(workload)
    if config.compile == "on":
        if problem:
            raise UserError(f"engine.compile on: {problem}; use --engine.compile off")
        return True
    saving = "" if workload.on_gpu else f": it should save {_compiling_saves(workload.images):.0%} of the time"
    if not problem and not workload.on_gpu:
        problem = _not_worth_compiling(workload.images) or compile.obstacle()
    reasons.lines.append(f"blocks are not compiled: {problem}" if problem else f"blocks are compiled{saving}")
    return not problem


def _compiling_saves(images: int) -> float:
    """Share of the time of a run of `images` on a CPU, below 0 if compiling takes longer than it saves."""
    return 1 - COMPILED_SHARE - COMPILING_IMAGES / max(images, 1)


def _not_worth_compiling(images: int) -> str:
    least = round(COMPILING_IMAGES / (1 - COMPILED_SHARE))
    return f"on a CPU it only saves time in runs of {least:,} images or more" if _compiling_saves(images) < 0 else ""


def _no_compiler(workload: Workload) -> str:
    if workload.sharded:
        return "blocks with sharded weights cannot be compiled as one graph"
    if workload.on_gpu:
        from torch.utils._triton import has_triton

        return "" if has_triton() else "no triton for this GPU"
    return "" if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler (g++) is installed"


def _cuda_graphs(config: EngineConfig, workload: Workload, reasons: Reasons) -> bool:
    if config.cuda_graphs == "on" and not workload.on_gpu:
        raise UserError("engine.cuda_graphs on: needs a CUDA GPU; use --engine.cuda-graphs auto")
    if workload.sharded:
        if config.cuda_graphs == "on":
            raise UserError("engine.cuda_graphs on: not with sharded weights; use --engine.cuda-graphs auto")
        return False
    if config.cuda_graphs != "auto":
        return config.cuda_graphs == "on"
    if not workload.on_gpu:
        return False
    gib, roomy = memory_gib(workload.device), room_for_graphs(workload.device)
    reasons.lines.append(
        f"rollouts are {'' if roomy else 'not '}recorded as CUDA graphs: they keep their memory, of {gib:.0f} GiB"
    )
    return roomy


def room_for_graphs(device: torch.device) -> bool:
    """Whether rollouts are recorded on this device if the settings leave it open."""
    return device.type == "cuda" and memory_gib(device) >= GRAPH_MEMORY_GIB


def memory_gib(device: torch.device) -> float:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory / 2**30


def _attention(config: EngineConfig, workload: Workload, reasons: Reasons, compiled: bool, *, training: bool) -> str:
    purpose, shapes = ("training", workload.train_shapes) if training else ("rollouts", workload.rollout_shapes)
    names = workload.attention_names
    if config.attention != "auto":
        if names is not None and config.attention not in names:
            raise UserError(
                f"engine.attention {config.attention}: this model's attention runs by {' or '.join(names)} alone; "
                "use --engine.attention auto"
            )
        problem = attention.obstacle(config.attention, workload.device, workload.dtype, shapes)
        if compiled and not problem:
            problem = attention.graph_obstacle(config.attention, shapes[0], workload.device, workload.dtype)
        if problem:
            raise UserError(f"engine.attention {config.attention}: {problem}; use --engine.attention auto")
        return config.attention
    if not shapes or len(attention.candidates(workload.device, names)) < 2:
        return "native"
    timings = attention.timings(shapes, workload.device, workload.dtype, compiled, names)
    reasons.timings[purpose] = timings
    chosen = attention.fastest(timings, training=training)
    if compiled and chosen != "native":
        problem = attention.graph_obstacle(chosen, shapes[0], workload.device, workload.dtype, whole=True)
        if problem:
            reasons.lines.append(f"attention of {purpose} not by {chosen}, the fastest: {problem}")
            chosen = "native"
    times = ", ".join(_in_words(timing, training) for timing in timings)
    reasons.lines.append(f"attention of {purpose} by {chosen} ({times})")
    return chosen


def _in_words(timing: Timing, training: bool) -> str:
    milliseconds = timing.backward_ms if training else timing.forward_ms
    return f"{timing.name} {milliseconds:.3g} ms" if milliseconds is not None else f"{timing.name}: {timing.obstacle}"


def _decoder(config: EngineConfig, workload: Workload) -> str:
    """On a CPU in fp32, pictures are the same to the last bit with every version: phases round differently."""
    if not workload.own_decoder:
        if config.decoder not in ("auto", "plain"):
            raise UserError(
                f"engine.decoder {config.decoder}: not with this model's decoder; use --engine.decoder auto"
            )
        return "plain"
    if config.decoder != "auto":
        return config.decoder
    return "phases" if workload.on_gpu or workload.dtype != torch.float32 else "fast"


def _linear(config: EngineConfig, workload: Workload, reasons: Reasons) -> str:
    if config.linear == "torch":
        return "torch"
    fits = not workload.on_gpu and workload.dtype == torch.float32 and linear.available()
    if config.linear == "onednn":
        if not fits:
            raise UserError("engine.linear onednn: is for fp32 runs on a CPU; use --engine.linear auto")
        return "onednn"
    if not fits:
        return "torch"
    torch_ms, onednn_ms = remembered(
        {"linear": workload.width}, lambda spread: linear.time_linear(1024, workload.width, spread)
    )
    chosen = "onednn" if onednn_ms * linear.FASTER_BY < torch_ms else "torch"
    reasons.lines.append(f"linear layers by {chosen} (torch {torch_ms:.3g} ms, onednn {onednn_ms:.3g} ms)")
    return chosen


def _epilogue(config: EngineConfig, workload: Workload, reasons: Reasons) -> bool:
    if config.epilogue == "on" and config.rollout_precision == "fp8":
        raise UserError(
            "engine.epilogue on: float8 rollouts have no product with a GELU in it; use --engine.epilogue auto, which "
            "has it in all other forwards without a gradient"
        )
    if config.epilogue != "auto":
        return config.epilogue == "on"
    where = "inside the product before it" if workload.on_gpu else "after the product: it saves time only on a GPU"
    reasons.lines.append(f"GELU of forwards without a gradient {where}")
    return workload.on_gpu


def _share_first_level(config: EngineConfig, workload: Workload, reasons: Reasons) -> bool:
    sigma, setting = workload.shared_sigma, config.share_first_level
    if sigma is None:
        if setting == "on":
            raise UserError(
                "engine.share_first_level on: with this objective, the samples of a group differ at every noise level; "
                "use --engine.share-first-level auto"
            )
        return False
    shared, error = is_shared(setting, sigma, workload.dtype), input_error(sigma)
    dtype, limit = str(workload.dtype).removeprefix("torch."), largest_error(workload.dtype)
    apart = f"1 − σ is {error:.1e} there"
    if setting == "off":
        return False
    if error == 0:
        reasons.lines.append("one row a group at the first noise level: exact, since σ is 1 there")
    elif error < limit:
        reasons.lines.append(
            f"one row a group at the first noise level: {apart}, less than {dtype} rounds by ({limit:.1e})"
        )
    elif shared:
        reasons.lines.append(
            f"one row a group at the first noise level, INEXACT: {apart}, and its gradient is off by about as much"
        )
    else:
        reasons.lines.append(
            f"one row a sample at the first noise level: {apart}, more than {dtype} rounds by; "
            "--engine.share-first-level on trains with that error"
        )
    return shared
