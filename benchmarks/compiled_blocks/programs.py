"""The compiled parts of SD3.5-Medium at 512 × 512, as a bf16 run trains and runs them."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import FunctionCtx

from benchmarks.compiled_blocks.counting import Counted, count
from dgpo_fast.config.options import Policy
from dgpo_fast.engine.epilogue import use_epilogue
from dgpo_fast.engine.upsampling import in_phases
from dgpo_fast.models.families.sd3 import CLIP_TOKENS, SD3, sd35_medium
from dgpo_fast.models.merged_lora import use_merged_weights
from dgpo_fast.models.meta import FusedAttention
from dgpo_fast.models.policy import with_lora

DTYPE = torch.bfloat16
LATENT = (16, 64, 64)
IMAGE_TOKENS, TEXT_TOKENS = 1024, CLIP_TOKENS + 128
BLOCKS = {"dual": 13, "single": 10, "last": 1}
"""Kinds of block → how many of them the model has: with a second attention, with one, and the last one, whose text
tokens go nowhere."""
DECODER = "decoder"
PLAIN, FROZEN, LORA, MERGED, FULL = "plain", "frozen", "lora", "merged", "full"


@dataclass(frozen=True)
class Program:
    """One compiled graph.

    Attributes:
        part: a kind of block, or the decoder.
        weights: frozen, without and with the engine's savings; LoRA, with adapters and on merged weights; all trained.
            The last three have a backward.
        rows: samples at a time.
    """

    part: str
    weights: str
    rows: int


PROGRAMS = (
    *(Program(part, weights, 32) for weights in (PLAIN, FROZEN) for part in BLOCKS),
    *(Program(part, weights, 16) for weights in (LORA, MERGED, FULL) for part in BLOCKS),
    *(Program(DECODER, weights, 16) for weights in (PLAIN, FROZEN)),
)

_LIBRARY = torch.library.Library("compiled_blocks", "DEF")
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)", tags=_TAGS)
_LIBRARY.define(
    "attention_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.register_fake("compiled_blocks::attention", lib=_LIBRARY)
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("compiled_blocks::attention_backward", lib=_LIBRARY)
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Attention(torch.autograd.Function):
    """Attention as a flash kernel: one call forward, one backward, of (B, H, S, D) tensors."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = torch.ops.compiled_blocks.attention(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        return torch.ops.compiled_blocks.attention_backward(gradient, *ctx.saved_tensors)  # type: ignore[attr-defined]


def counted(program: Program, gpu: SimpleNamespace) -> Counted:
    """Launches of `program` on a GPU with these properties."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    module, activations = _decoder(program, mode) if program.part == DECODER else _block(program, mode)
    with mode:
        weights = {
            name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=DTYPE, requires_grad=tensor.requires_grad)
            for name, tensor in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items()
        }

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        held, given = tensors[: len(weights)], tensors[len(weights) :]
        with FusedAttention(_attention):
            out = torch.func.functional_call(
                module, dict(zip(weights, held, strict=True)), kwargs=dict(zip(activations, given, strict=True))
            )
        # The last block's text tokens go nowhere.
        return (out,) if isinstance(out, Tensor) else tuple(tensor for tensor in out if tensor is not None)

    return count(function, [*weights.values(), *activations.values()], mode, gpu)


def _block(program: Program, mode: FakeTensorMode) -> tuple[nn.Module, dict[str, Tensor]]:
    """A block behind the first one, and what it gets."""
    family = SD3(sd35_medium())
    architecture = family.architecture
    small = {**architecture.transformer, "num_layers": len(BLOCKS), "dual_attention_layers": (0,)}
    with torch.device("meta"):
        transformer = family.build_transformer(small)
    transformer.requires_grad_(program.weights == FULL)
    if program.weights in (LORA, MERGED):
        transformer = with_lora(transformer, Policy(), seed=0)
    if program.weights == MERGED:
        use_merged_weights(transformer)
    family.set_attention(transformer, "native")
    use_epilogue(transformer, program.weights == FROZEN)
    width, is_trained = architecture.transformer["caption_projection_dim"], program.weights in (LORA, MERGED, FULL)
    shapes = {"hidden_states": (IMAGE_TOKENS, width), "encoder_hidden_states": (TEXT_TOKENS, width), "temb": (width,)}
    # The embedding of the timestep comes before all adapters.
    trained = {name: is_trained and (name != "temb" or program.weights == FULL) for name in shapes}
    with mode:
        activations = {
            name: torch.empty(program.rows, *shape, dtype=DTYPE, requires_grad=trained[name])
            for name, shape in shapes.items()
        }
    return transformer.transformer_blocks[list(BLOCKS).index(program.part)], activations


def _decoder(program: Program, mode: FakeTensorMode) -> tuple[nn.Module, dict[str, Tensor]]:
    """The decoder in channels_last, and its latents."""
    with torch.device("meta"):
        module = SD3(sd35_medium()).build_vae().decoder.requires_grad_(False)
    nn.Module.to(module, memory_format=torch.channels_last)
    if program.weights == FROZEN:
        in_phases(module)
    with mode:
        latents = torch.empty(program.rows, *LATENT, dtype=DTYPE)
    return module, {"sample": latents}


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor]:
    assert mask is None, "Stable Diffusion 3 has no masks"
    return (_Attention.apply(query, key, value),)
