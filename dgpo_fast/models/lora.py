"""LoRA files: found, read, merged into a pipeline, joined and written."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import pad

from dgpo_fast.errors import UserError
from dgpo_fast.models.family import Family, family_of
from dgpo_fast.models.loading import first_line, require_finite, text_encoder_names
from dgpo_fast.models.lora_names import (
    OTHER_ADAPTERS,
    PREFIXES,
    Target,
    candidates,
    is_of_text_encoder,
    split_name,
    targets,
)
from dgpo_fast.wording import one_line, resume_command

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG = "adapter_config.json"
"""In a folder that PEFT has written."""
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""Starts of PEFT's initialisations that take something out of the model's weights."""
DAMAGED = (ValueError, TypeError, AttributeError, re.error)


class Factors(NamedTuple):
    """What a LoRA adds to one layer: W + B·A, with its scale in B; a convolution's dimensions are flattened.

    Attributes:
        a: (rank, columns), fp32.
        b: (rows, rank), fp32.
    """

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Lora:
    """What a LoRA adds, by part of the pipeline ("transformer", "text_encoder", …) and by layer in diffusers' names."""

    parts: Mapping[str, Mapping[str, Factors]]

    @property
    def digest(self) -> str:
        """Of every number in it."""
        digest = hashlib.sha256()
        for part, layers in sorted(self.parts.items()):
            for layer, factors in sorted(layers.items()):
                digest.update(f"{part}.{layer}".encode())
                for factor in factors:
                    digest.update(f"{tuple(factor.shape)}".encode() + factor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def find_lora(path: Path) -> Path:
    """The LoRA at `path`, a .safetensors file or the folder it lies in. Raises UserError if there is none."""
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if not path.exists():
        raise UserError(f"LoRA '{path}': no such file or folder")
    if path.is_file():
        raise UserError(f"LoRA '{path}': not a .safetensors file, which is the only kind that is read")
    files = sorted(path.glob("*.safetensors"))
    named = path / LORA_FILE
    if named in files or len(files) == 1:
        return named if named in files else files[0]
    if files:
        raise UserError(f"LoRA '{path}': several .safetensors files are there: name one")
    if (path / "model_index.json").is_file():
        raise UserError(f"LoRA '{path}': a whole pipeline is there, no LoRA: use it as the model (--model {path})")
    if (path / "checkpoints").is_dir():
        raise UserError(
            f"LoRA '{path}': the run has not finished, so it has no LoRA yet: resume it with `{resume_command(path)}`"
        )
    raise UserError(f"LoRA '{path}': no .safetensors file is there")


def changes_text_encoders(file: Path) -> bool:
    """Whether the LoRA in this file is for text encoders too."""
    with _opened(file) as opened:
        return any(is_of_text_encoder(name) for name in opened.keys())  # noqa: SIM118


def start_from_lora(pipeline: DiffusionPipeline, path: str | None) -> Lora | None:
    """Merges the LoRA that a run starts from, if there is one, into the pipeline's transformer, and returns it.

    Raises UserError as `read_lora`, and if the LoRA changes text encoders: a run would neither use nor save that.
    """
    if path is None:
        return None
    file = find_lora(Path(path))
    if changes_text_encoders(file):
        raise UserError(
            f"LoRA '{file}' changes text encoders too, which no run trains: merge it into the model first "
            f"(dgpo-fast merge MODEL {path} FOLDER), then train from that folder (--model FOLDER)"
        )
    lora = read_lora(file, pipeline)
    merge(pipeline, lora)
    return lora


def merge_lora(pipeline: DiffusionPipeline, file: Path) -> Lora:
    """Reads the LoRA in `file`, merges it into the pipeline's weights in place, and returns it.

    Args:
        pipeline: with its text encoders, if the LoRA changes them.
        file: a .safetensors file.

    Raises UserError as `read_lora`.
    """
    lora = read_lora(file, pipeline)
    merge(pipeline, lora)
    return lora


@torch.no_grad()
def merge(pipeline: DiffusionPipeline, lora: Lora) -> None:
    """W + B·A, layer by layer and in place, as a run merges its own: in fp32, rounded once.

    Raises UserError if a weight is not finite then.
    """
    for part, layers in lora.parts.items():
        model = getattr(pipeline, part)
        for layer, factors in layers.items():
            weight = model.get_parameter(f"{layer}.weight")
            a, b = (factor.to(weight.device) for factor in factors)
            weight.copy_(torch.addmm(weight.float().flatten(1), b, a).view_as(weight))
            if not torch.isfinite(weight).all():
                dtype = str(weight.dtype).removeprefix("torch.")
                raise UserError(
                    f"the LoRA makes {part}.{layer} not finite in {dtype}: its scale is too large, use another LoRA"
                )


def read_lora(file: Path, pipeline: DiffusionPipeline) -> Lora:
    """The LoRA in a .safetensors file of diffusers, PEFT, kohya's scripts or another trainer, on the CPU.

    Args:
        file: with PEFT's adapter_config.json beside it, if PEFT has written it.
        pipeline: tells which layers there are.

    Raises UserError if that is no plain LoRA, or not one for this pipeline.
    """
    with _opened(file) as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header = opened.metadata() or {}
    _require_plain(file, tensors)
    peft_config = file.parent / PEFT_CONFIG
    settings = _read_peft_config(peft_config) if peft_config.is_file() else _header_settings(file, header)
    named: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        split = split_name(name)
        if split is None:
            raise UserError(f"LoRA '{file}': {name} is no factor of a LoRA")
        layer, kind = split
        named.setdefault(layer, {})[kind] = tensor.float()
    if not named:
        raise UserError(f"LoRA '{file}': nothing is in it")
    require_finite(f"LoRA '{file}'", ((f"{n}'s {kind}", t) for n, kinds in named.items() for kind, t in kinds.items()))
    models = {part: getattr(pipeline, part) for part in ("transformer", *text_encoder_names(pipeline))}
    originals = {"transformer": family_of(pipeline.transformer).lora_names}
    known = {part: targets(model, originals.get(part, {})) for part, model in models.items() if model is not None}
    parts: dict[str, dict[str, Factors]] = {}
    try:
        for name, kinds in named.items():
            part, target = _find(name, known)
            factors = _scaled(kinds, settings.get(part, {}), target.layers[0])
            for layer, own in _split(factors, target, models[part]):
                if layer in parts.setdefault(part, {}):
                    raise ValueError(f"{layer} has two pairs of factors")
                parts[part][layer] = own
    except DAMAGED as error:
        raise UserError(f"LoRA '{file}' cannot be loaded into this model: {one_line(error)}") from None
    return Lora(parts)


def join(first: Mapping[str, Factors], second: Mapping[str, Factors]) -> dict[str, Factors]:
    """One LoRA that adds to every layer what both add.

    All layers get the same rank, with zeros where one of the two adds nothing: a loader that reads no header may take
    one alpha for all layers, and only then is it the rank of each.
    """
    joined = {}
    for layer in sorted({*first, *second}):
        both = [factors[layer] for factors in (first, second) if layer in factors]
        joined[layer] = torch.cat([f.a.cpu() for f in both]), torch.cat([f.b.cpu() for f in both], dim=1)
    rank = max(len(a) for a, _ in joined.values())
    return {
        layer: Factors(pad(a, (0, 0, 0, rank - len(a))).contiguous(), pad(b, (0, rank - len(a))).contiguous())
        for layer, (a, b) in joined.items()
    }


def write_lora(folder: Path, layers: Mapping[str, Factors], config: Mapping[str, Any], family: Family) -> None:
    """Writes a LoRA of the transformer that every loader reads alike: scale in the factors, alpha = rank.

    Args:
        folder: gets `pytorch_lora_weights.safetensors`.
        layers: all of the same rank.
        config: PEFT's, of the adapter that was trained.
        family: of the model; its pipeline loads the file.
    """
    rank = len(next(iter(layers.values())).a)
    trained = {f"{layer}.lora_{n}.weight": t for layer, pair in layers.items() for n, t in zip("AB", pair, strict=True)}
    cast(Any, family.pipeline_class).save_lora_weights(
        folder,
        transformer_lora_layers=trained,
        transformer_lora_adapter_metadata={**config, "r": rank, "lora_alpha": rank, "target_modules": list(layers)},
    )


def _find(name: str, known: Mapping[str, Mapping[str, Target]]) -> tuple[str, Target]:
    """The part and the layers that a layer's name in a file means. Raises ValueError if there is none."""
    for part, layer in candidates(name):
        if layer in known.get(part, {}):
            return part, known[part][layer]
    for part, _ in candidates(name):
        if part not in known:
            raise ValueError(f"it has no {part}, which {name} is for")
    raise ValueError(f"it has no layer {name}")


def _scaled(kinds: Mapping[str, Tensor], settings: Mapping[str, Any], layer: str) -> Factors:
    """A layer's factors, with alpha / rank in the second one."""
    if not {"A", "B"} <= kinds.keys():
        raise ValueError(f"of {layer}, one of the two factors is missing")
    if any(kinds[kind].dim() < 2 or kinds[kind].numel() == 0 for kind in "AB"):
        raise ValueError(f"the factors of {layer} are no matrices")
    a, b = kinds["A"].flatten(1), kinds["B"].flatten(1)
    rank = len(a)
    if b.shape[1] != rank:
        raise ValueError(f"the factors of {layer} have ranks {rank} and {b.shape[1]}")
    if "alpha" in kinds:
        return Factors(a, b * (float(kinds["alpha"].mean()) / rank))
    alphas = settings.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), layer), settings.get("lora_alpha", rank))
    return Factors(a, b * (float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)))


def _split(factors: Factors, target: Target, model: nn.Module) -> list[tuple[str, Factors]]:
    """The factors of each layer that `target` means. Raises ValueError if they have other sizes."""
    weights = [model.get_parameter(f"{layer}.weight").flatten(1) for layer in target.layers]
    rows, columns = sum(map(len, weights)), weights[0].shape[1]
    a, b = factors
    if (len(b), a.shape[1]) != (rows, columns):
        raise ValueError(f"{target.layers[0]} is {rows} × {columns} there, and {len(b)} × {a.shape[1]} in the LoRA")
    if target.swapped:
        b = torch.cat(b.chunk(2)[::-1])
    pieces = b.split([len(weight) for weight in weights])
    return [(layer, Factors(a, piece)) for layer, piece in zip(target.layers, pieces, strict=True)]


def _require_plain(file: Path, names: Mapping[str, Tensor]) -> None:
    for name in names:
        kind = next((kind for mark, kind in OTHER_ADAPTERS.items() if mark in name), None)
        if kind is not None:
            raise UserError(f"LoRA '{file}' is of {kind} ({name}): only plain LoRAs are read")


def _header_settings(file: Path, header: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """PEFT's settings by part, as diffusers keeps them in a file's header."""
    try:
        flat = json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}"))
        found: dict[str, dict[str, Any]] = {}
        for name, value in flat.items():
            part, _, setting = name.partition(".")
            found.setdefault(part, {})[setting] = value
    except DAMAGED:
        raise UserError(f"LoRA '{file}': the settings in its header are damaged; use another copy") from None
    return found


def _read_peft_config(path: Path) -> dict[str, dict[str, Any]]:
    """The settings of a folder of PEFT's, for each part that it may be of."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: is of no LoRA: only LoRAs are read")
    if config.get("use_dora"):
        raise UserError(f"{path}: is of a DoRA (use_dora), whose magnitudes no merge here knows: train a plain LoRA")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGES_THE_BASE):
        raise UserError(
            f"{path}: init_lora_weights {start} has changed the model's weights too, and this LoRA is for those: "
            "save it with path_initial_model_for_weight_conversion"
        )
    return dict.fromkeys(PREFIXES, config)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"LoRA '{file}' cannot be read: {first_line(error)}") from error
