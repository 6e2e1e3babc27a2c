"""LoRA files: found, read and merged into a pipeline."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.models.loading import first_line, require_finite, text_encoders

PEFT_CONFIG = "adapter_config.json"
"""In a folder that PEFT has written."""


def find_lora(path: Path) -> Path:
    """The LoRA at `path`, a .safetensors file or the folder it lies in. Raises UserError if there is none."""
    if path.is_file() and path.suffix == ".safetensors":
        return path
    files = sorted(path.glob("*.safetensors"))
    named = path / "pytorch_lora_weights.safetensors"
    if named in files or len(files) == 1:
        return named if named in files else files[0]
    found = "several .safetensors files are there: name one" if files else "no .safetensors file is there"
    raise UserError(f"LoRA '{path}': {found if path.exists() else 'no such file or folder'}")


def changes_text_encoders(lora: Path) -> bool:
    """Whether the LoRA in this file is for text encoders too."""
    return any("text_encoder" in name for name in _tensors(lora))


@torch.no_grad()
def merge_lora(pipeline: StableDiffusion3Pipeline, lora: Path) -> None:
    """Merges a LoRA into the pipeline's weights, in place, as a run merges its own: in fp32, rounded once.

    Args:
        pipeline: with its text encoders, if the LoRA changes them.
        lora: a .safetensors file.

    Raises UserError if that is no LoRA, or not one for this pipeline.
    """
    transformer, dtype = pipeline.transformer, pipeline.transformer.dtype
    transformer.float()
    try:
        is_pefts = (lora.parent / PEFT_CONFIG).is_file()
        tensors = _from_peft(lora) if is_pefts else _tensors(lora)
        require_finite(f"LoRA '{lora}'", tensors.items())
        factors = sum("lora" in name and "alpha" not in name for name in tensors)
        if is_pefts:
            pipeline.load_lora_weights(tensors)
        else:  # the file's header may have the alphas
            pipeline.load_lora_weights(lora.parent, weight_name=lora.name, use_safetensors=True, local_files_only=True)
        models = (transformer, *text_encoders(pipeline))
        found = sum("lora_" in name for model in models for name, _ in model.named_parameters())
        if not factors or found < factors:
            raise ValueError(f"{factors - found} of its {factors} matrices fit no layer")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    except UserError:
        raise
    except Exception as error:  # the loaders of a file in any of many formats fail in any way
        raise UserError(f"LoRA '{lora}' cannot be loaded into this model: {first_line(error)}") from error
    transformer.to(dtype).requires_grad_(False).eval()


def _from_peft(lora: Path) -> dict[str, Tensor]:
    """The factors of a folder of PEFT's by diffusers' names, with their scale (alpha / rank) in the second one."""
    config = _read_peft_config(lora.parent / PEFT_CONFIG)
    tensors: dict[str, Tensor] = {}
    for name, tensor in _tensors(lora).items():
        layer, found, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
        if not found:
            raise UserError(f"LoRA '{lora}': {name} is no factor of a LoRA")
        if factor.startswith("B"):
            rank = tensor.shape[1]
            alphas = config.get("alpha_pattern") or {}
            alpha = alphas.get(get_pattern_key(list(alphas), layer), config.get("lora_alpha", rank))
            tensor = tensor * (alpha / (rank**0.5 if config.get("use_rslora") else rank))
        prefix = "" if layer.startswith(("transformer.", "text_encoder")) else "transformer."
        tensors[f"{prefix}{layer}.lora_{factor}"] = tensor
    return tensors


def _read_peft_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: is of no LoRA: only LoRAs are read")
    if config.get("use_dora"):
        raise UserError(f"{path}: is of a DoRA (use_dora), whose magnitudes no merge here knows: train a plain LoRA")
    return config


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"LoRA '{file}' cannot be read: {first_line(error)}") from error
