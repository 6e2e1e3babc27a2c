"""Pipelines with random weights, built from their configuration on the device: for benchmarks, without a download.

Its images and rewards are meaningless. Its shapes, arithmetic and memory are those of the trained pipeline.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedTokenizerBase, T5Config, T5TokenizerFast

from dgpo_fast import tiny
from dgpo_fast.config.options import Config
from dgpo_fast.errors import UserError
from dgpo_fast.models.architecture import TEXT_ENCODER, Architecture, read_architecture
from dgpo_fast.models.families import known_models
from dgpo_fast.models.family import Family


def find_architecture(model: str) -> Architecture:
    """The architecture called `model`: "tiny", a folder, or a name on the hub whose sizes a family knows.

    Raises UserError for any other name: the configuration would have to be downloaded.
    """
    source = Path(tiny.PIPELINE_DIR if model == "tiny" else model)
    if source.exists():
        return read_architecture(source)
    known = known_models()
    if model in known:
        return known[model]()
    raise UserError(
        f"--random-weights: model '{model}' is no folder, and only these are known without one: {', '.join(known)}"
    )


def random_pipeline(
    family: Family, *, device: torch.device, dtype: torch.dtype, seed: int, text_encoders: bool = False
) -> DiffusionPipeline:
    """The pipeline of `family`'s model with random weights on `device`, frozen and in eval mode.

    The same seed gives the same weights on the same kind of device.

    Args:
        family: knows the sizes of all modules.
        device: where the weights are drawn and stay.
        dtype: of the weights.
        seed: of the weights.
        text_encoders: build them too; else `Family.random_condition` stands in.

    Raises UserError if tokenizers would have to be downloaded.
    """
    architecture = family.architecture
    tokenizers = _tokenizers(architecture) if text_encoders else {}  # refused before anything is built
    with _weights(device, dtype, seed):
        transformer, vae = family.build_transformer(), family.build_vae()
        encoders = {name: architecture.build_text_encoder(name) for name in architecture.text_encoders if text_encoders}
    _scale(transformer, dtype)
    _scale(vae, dtype)
    made = cast(Any, family.pipeline_class)(
        transformer=transformer,
        vae=vae,
        scheduler=_scheduler(architecture),
        **{**dict.fromkeys(family.text_parts), **encoders, **tokenizers, **_own_settings(family)},
    )
    for module in (transformer, vae, *encoders.values()):
        module.requires_grad_(False).eval()
    return made


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


def _scheduler(architecture: Architecture) -> Any:
    kind = getattr(diffusers, architecture.scheduler.get("_class_name", ""), FlowMatchEulerDiscreteScheduler)
    return kind.from_config(architecture.scheduler)


def _own_settings(family: Family) -> Mapping[str, Any]:
    """Of model_index.json: what is no part, such as whether a model is distilled."""
    taken = inspect.signature(family.pipeline_class).parameters
    return {name: value for name, value in family.architecture.index.items() if name in taken and _is_setting(value)}


def _is_setting(value: object) -> bool:
    return not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], str | None))


def _tokenizers(architecture: Architecture) -> dict[str, PreTrainedTokenizerBase]:
    """The folder's tokenizers, or ones that read letter by letter if there is no folder."""
    names = {name: name.replace(TEXT_ENCODER, "tokenizer") for name in architecture.text_encoders}
    if architecture.folder is None:
        letters = {name: LETTERS.get(type(config)) for name, config in architecture.text_encoders.items()}
        unknown = next((name for name, make in letters.items() if make is None), None)
        if unknown is not None:
            raise UserError(
                f"--random-text-encoders: the tokenizer of {unknown} of {architecture.name} is in no folder: leave "
                "this out, or give --model a folder"
            )
        return {names[name]: make() for name, make in letters.items() if make is not None}
    folder, index = architecture.folder, architecture.index
    return {name: getattr(transformers, index[name][1]).from_pretrained(folder / name) for name in names.values()}


def _clip_letters() -> PreTrainedTokenizerBase:
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pieces = {piece: rank for rank, piece in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    # The end token must have the largest number: it marks where CLIP reads its pooled output.
    vocabulary = {**pieces, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _t5_letters() -> PreTrainedTokenizerBase:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    return T5TokenizerFast(vocab=[(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0)


LETTERS: dict[type, Callable[[], PreTrainedTokenizerBase]] = {CLIPTextConfig: _clip_letters, T5Config: _t5_letters}
