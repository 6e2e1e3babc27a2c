"""Others that read a saved LoRA: each merges the one in a folder into a pipeline."""

import json
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from dgpo_fast.models.lora import LORA_FILE


def by_diffusers(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    pipeline.load_lora_weights(folder)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def by_peft(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """Its functions, with the settings in the file's header."""
    with safe_open(folder / LORA_FILE, framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    settings = {name.removeprefix("transformer."): value for name, value in settings.items()}
    inject_adapter_in_model(LoraConfig(**settings), pipeline.transformer)
    factors = {n.removeprefix("transformer."): tensor for n, tensor in load_file(folder / LORA_FILE).items()}
    loaded_keys = set_peft_model_state_dict(pipeline.transformer, factors)
    assert not loaded_keys.unexpected_keys
    for module in list(pipeline.transformer.modules()):
        if hasattr(module, "base_layer"):
            module.merge()
    pipeline.unload_lora_weights()


def by_hand(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """A loader that reads no header, and scales by `.alpha` over the rank, or by 1 without it, as ComfyUI."""
    tensors = load_file(folder / LORA_FILE)
    for name, b in tensors.items():
        if name.endswith(".lora_B.weight"):
            stem = name.removesuffix(".lora_B.weight")
            alpha = tensors.get(f"{stem}.alpha", torch.tensor(float(b.shape[1])))
            weight = pipeline.transformer.get_parameter(f"{stem.removeprefix('transformer.')}.weight")
            weight.data += alpha / b.shape[1] * (b @ tensors[f"{stem}.lora_A.weight"])


READERS = [by_diffusers, by_peft, by_hand]
