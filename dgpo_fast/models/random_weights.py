"""Pipelines with random weights, built from their configuration on the device: for benchmarks, without a download.

Its images and rewards are meaningless. Its shapes, arithmetic and memory are those of the trained pipeline.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, T5TokenizerFast

from dgpo_fast import tiny
from dgpo_fast.config.options import Config
from dgpo_fast.errors import UserError
from dgpo_fast.models.architecture import SD35_MEDIUM, TEXT_ENCODERS, Architecture, read_architecture, sd35_medium

CLIP_STD, T5_STD = 1.0, 0.2


class RandomTextPipeline(StableDiffusion3Pipeline):
    """A pipeline without text encoders. Random embeddings, a function of the prompt's text, stand in for theirs."""

    # Its own attributes are set after construction, since diffusers reads a pipeline's modules from the signature.
    clip_tokens: int
    text_dtype: torch.dtype

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str | list[str], *args: object, max_sequence_length: int = 256, **options: object
    ) -> tuple[Tensor, None, Tensor, None]:
        """As diffusers' own: (prompt (B, T, D), None, pooled (B, E), None), in the transformer's dtype and device.

        The T tokens are `clip_tokens` of CLIP's and `max_sequence_length` of T5's, in sizes like the trained
        encoders'. There are no negative prompts: the empty prompt is encoded as any other.
        """
        texts = [prompt] if isinstance(prompt, str) else prompt
        rows = [self._embed(text, max_sequence_length) for text in texts]
        return torch.stack([row[0] for row in rows]), None, torch.stack([row[1] for row in rows]), None

    def _embed(self, text: str, max_sequence_length: int) -> tuple[Tensor, Tensor]:
        config = self.transformer.config
        # Drawn on the CPU, so that a prompt's embedding is the same on every device.
        generator = torch.Generator().manual_seed(_hash(text))
        clip = CLIP_STD * torch.randn(self.clip_tokens, config.joint_attention_dim, generator=generator)
        t5 = T5_STD * torch.randn(max_sequence_length, config.joint_attention_dim, generator=generator)
        pooled = torch.randn(config.pooled_projection_dim, generator=generator)
        return torch.cat([clip, t5]).to(self.device, self.text_dtype), pooled.to(self.device, self.text_dtype)


def find_architecture(model: str) -> Architecture:
    """The architecture called `model`: "tiny", a folder, or Stable Diffusion 3.5-Medium's name.

    Raises UserError for any other name: the configuration would have to be downloaded.
    """
    source = Path(tiny.PIPELINE_DIR if model == "tiny" else model)
    if source.exists():
        return read_architecture(source)
    if model == SD35_MEDIUM:
        return sd35_medium()
    raise UserError(f"--random-weights: model '{model}' is no folder, and only {SD35_MEDIUM} is known without one")


def random_pipeline(
    architecture: Architecture, *, device: torch.device, dtype: torch.dtype, seed: int, text_encoders: bool = False
) -> StableDiffusion3Pipeline:
    """The pipeline of `architecture` with random weights on `device`, frozen and in eval mode.

    The same seed gives the same weights on the same kind of device.

    Args:
        architecture: sizes of all modules.
        device: where the weights are drawn and stay.
        dtype: of the weights.
        seed: of the weights.
        text_encoders: build them too; else random embeddings stand in (`RandomTextPipeline`).
    """
    with _weights(device, dtype, seed):
        transformer, vae = architecture.build_transformer(), architecture.build_vae()
        encoders = {name: architecture.build_text_encoder(name) for name in architecture.text_encoders if text_encoders}
    _scale(transformer, dtype)
    _scale(vae, dtype)
    tokenizers = _tokenizers(architecture) if text_encoders else {}
    absent = dict.fromkeys([*TEXT_ENCODERS, "tokenizer", "tokenizer_2", "tokenizer_3"])
    pipeline_class = StableDiffusion3Pipeline if text_encoders else RandomTextPipeline
    pipeline = pipeline_class(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(architecture.scheduler),
        **{**absent, **encoders, **tokenizers},
    )
    if isinstance(pipeline, RandomTextPipeline):
        pipeline.clip_tokens, pipeline.text_dtype = architecture.clip_tokens, dtype
    for module in (transformer, vae, *encoders.values()):
        module.requires_grad_(False).eval()
    return pipeline


def random_weights_note(config: Config) -> str:
    """What a run with random weights says; empty for any other."""
    if not config.random_weights:
        return ""
    text = "text encoders are random too" if config.random_text_encoders else "random embeddings stand for prompts"
    return f"RANDOM WEIGHTS: {config.model} was not loaded; {text}; its images and rewards are meaningless"


@contextmanager
def _weights(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Modules made inside are drawn on `device` in `dtype` from `seed`; torch's generators are left as they were."""
    before = torch.get_default_dtype()
    cards = [device] if device.type == "cuda" else []
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=cards), torch.device(device):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def _scale(module: nn.Module, dtype: torch.dtype) -> None:
    # torch draws weights with a third of the variance that keeps a signal's size, and then no layer would matter.
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3.0**0.5)
    # Tables such as the position embedding are computed in fp32; diffusers' own `to` would warn of nothing here.
    nn.Module.to(module, dtype)


def _tokenizers(architecture: Architecture) -> dict[str, PreTrainedTokenizerBase]:
    """The folder's tokenizers, or ones that read letter by letter if there is no folder."""
    kinds: dict[str, tuple[type[PreTrainedTokenizerBase], Callable[[], PreTrainedTokenizerBase]]] = {
        "tokenizer": (CLIPTokenizer, _clip_letters),
        "tokenizer_2": (CLIPTokenizer, _clip_letters),
        "tokenizer_3": (T5TokenizerFast, _t5_letters),
    }
    names = [name.replace("text_encoder", "tokenizer") for name in architecture.text_encoders]
    if architecture.folder is None:
        return {name: kinds[name][1]() for name in names}
    folder = architecture.folder
    return {name: kinds[name][0].from_pretrained(folder / name) for name in names}


def _clip_letters() -> PreTrainedTokenizerBase:
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pieces = {piece: rank for rank, piece in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    # The end token must have the largest number: it marks where CLIP reads its pooled output.
    vocabulary = {**pieces, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _t5_letters() -> PreTrainedTokenizerBase:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    return T5TokenizerFast(vocab=[(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
