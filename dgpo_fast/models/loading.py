"""Loading a pipeline: the shipped one, a folder, or one from the Hugging Face hub."""

import json
import re
from collections.abc import Container, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
import transformers
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dgpo_fast import tiny
from dgpo_fast.config.options import Config
from dgpo_fast.errors import UserError
from dgpo_fast.models.architecture import INDEX_FILE, TEXT_ENCODER, absent_parts, read_architecture, read_json
from dgpo_fast.models.families import AUTO, BUILT_IN, find_class, known_models, make_family
from dgpo_fast.models.family import Family, attach, family_of
from dgpo_fast.models.quantised import SAME, quantise
from dgpo_fast.models.random_weights import find_architecture, random_pipeline
from dgpo_fast.seeds import stream_seed
from dgpo_fast.wording import NO_HUB_NAME

NUMBERS = {
    "transformer/config.json": ("sample_size", "patch_size", "in_channels", "pos_embed_max_size"),
    "vae/config.json": ("scaling_factor",),
    "scheduler/scheduler_config.json": ("shift",),
}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""By safetensors' names."""
UNLOADABLE = (OSError, ValueError, SafetensorError, ImportError)
"""What libraries raise for files that they cannot load; ImportError if a part needs a package that is not there."""
ENCODING_BYTES = 2**30
"""Upper bound of the GPU memory that text encoders take in addition to their weights."""


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU if there is one. One that is named by its number becomes the
    current one. Raises UserError if it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA GPUs; use --device auto")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; use auto, cpu, cuda or cuda:N")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # kernels and streams are the current device's
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Weights' dtype for "auto", "fp32" or "bf16". Raises UserError for bf16 on a GPU without it."""
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError(f"--precision bf16: {torch.cuda.get_device_name(device)} has no bf16; use --precision fp32")
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and has_bf16) else torch.float32


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still take on `device`."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def make_pipeline(
    config: Config, *, device: torch.device, dtype: torch.dtype, with_text: bool = True
) -> DiffusionPipeline:
    """The pipeline that `config` names, with trained or with random weights. Raises UserError as `load_pipeline`.

    It stays on the CPU for `quantise_base`: whole, it may not fit on `device`.
    """
    if config.policy.base_precision != SAME:
        device = torch.device("cpu")
    if not config.random_weights:
        return load_pipeline(
            config.model,
            revision=config.revision,
            device=device,
            dtype=dtype,
            with_text=with_text,
            family=config.family,
        )
    return random_pipeline(
        read_model(config),
        device=device,
        dtype=dtype,
        seed=stream_seed(config.seed, "random weights"),
        text_encoders=config.random_text_encoders,
    )


def read_model(config: Config) -> Family:
    """The family of the model that `config` names, made for that model without reading weights. Raises UserError."""
    if config.random_weights:
        return make_family(find_architecture(config.model), config.family)
    folder = _find_model(config.model, config.revision, config.family)
    return make_family(read_architecture(folder, _name(config.model)), config.family)


def _name(model: str) -> str | None:
    """What the model is called if it is no folder."""
    return None if Path(model).exists() else model


def known_model(config: Config) -> Family | None:
    """That of a model which is known by its name alone, if it has not been downloaded; None for any other."""
    known = config.model in known_models() and not Path(config.model).exists()
    if not known or isinstance(try_to_load_from_cache(config.model, "transformer/config.json"), str):
        return None
    return make_family(find_architecture(config.model), config.family)


def load_pipeline(
    model: str,
    *,
    revision: str | None,
    device: torch.device,
    dtype: torch.dtype | None,
    with_text: bool = True,
    family: str = AUTO,
) -> DiffusionPipeline:
    """The pipeline `model` on `device`, all modules frozen and in eval mode.

    Args:
        model: "tiny", a folder in diffusers' format, or "organisation/name" on the hub.
        revision: branch, tag or commit on the hub.
        dtype: of all weights; None: that of each part's own files.
        with_text: load the text encoders and tokenizers too; `load_text_encoders` can add them later.
        family: as the setting of that name.

    Raises UserError if there is no such model, or none of its family is known.
    """
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # commands show by themselves what takes time
    folder = _find_model(model, revision, family)
    made = make_family(read_architecture(folder, _name(model)), family)
    parts = made.text_parts
    try:
        dtypes = _own_dtypes(folder) if dtype is None else dtype
        absent = absent_parts(made.architecture.index, parts) if with_text else dict.fromkeys(parts)
        _require_packages(made.architecture.index, absent)
        pipeline = _pipeline_class(made).from_pretrained(folder, dtype=dtypes, variant=find_variant(folder), **absent)
    except UNLOADABLE as error:
        raise UserError(f"model '{model}' cannot be loaded: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    for module in (pipeline.transformer, pipeline.vae):
        attach(module, made)
    for module in (pipeline.transformer, pipeline.vae, *text_encoders(pipeline)):
        module.requires_grad_(False).eval()
        require_finite(f"model '{model}': its {type(module).__name__}", module.named_parameters())
    return pipeline


def load_text_encoders(
    pipeline: DiffusionPipeline, device: torch.device, dtype: torch.dtype, precision: str = SAME, *, whole: bool = False
) -> DiffusionPipeline:
    """`pipeline`, loaded without its text encoders, with them: a new pipeline that shares all other modules.

    If they do not fit in the GPU's free memory, they stay in CPU memory and their layers are moved through the GPU one
    after another (`passes_by_layer`). This is slower and gives the same numbers.

    Args:
        pipeline: stays as it is.
        device: where the text encoders go.
        dtype: of their weights.
        precision: as `text_precision`.
        whole: with the layers that no prompt is read from, as for saving them.

    Raises UserError if they cannot be loaded.
    """
    folder, family = Path(pipeline.name_or_path), family_of(pipeline.transformer)
    try:
        parts = family.text_parts
        shared = {name: part for name, part in pipeline.components.items() if name not in parts and part is not None}
        absent = absent_parts(family.architecture.index, parts)
        _require_packages(family.architecture.index, absent)
        loaded = _pipeline_class(family).from_pretrained(
            folder, dtype=dtype, variant=find_variant(folder), **shared, **absent
        )
    except UNLOADABLE as error:
        raise UserError(f"the text encoders in {folder} cannot be loaded: {first_line(error)}") from error
    loaded.set_progress_bar_config(disable=True)
    if not whole:
        family.drop_unread(loaded)
    encoders = [module.requires_grad_(False).eval() for module in text_encoders(loaded)]
    for module in encoders:
        require_finite(f"model '{folder}': its {type(module).__name__}", module.named_parameters())
        if precision != SAME:
            quantise(module, precision, "cpu")
    needed = sum(tensor.nbytes for module in encoders for tensor in [*module.parameters(), *module.buffers()])
    fit = device.type == "cpu" or needed + ENCODING_BYTES < free_bytes(device)
    for module in encoders:
        module.to(device) if fit else cpu_offload(module, device, offload_buffers=precision != SAME)
    return loaded


def _require_packages(index: Mapping[str, Any], absent: Container[str]) -> None:
    """Raises ImportError for a part whose class needs a package that is not there, which diffusers does not say."""
    for part, value in index.items():
        library, kind = value if isinstance(value, list | tuple) and len(value) == 2 else ("", "")
        if library == "transformers" and part not in absent:
            getattr(getattr(transformers, str(kind), None), "from_pretrained", None)  # raises, if one is missing


def require_finite(what: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises UserError if one of the named `tensors` of `what` holds NaN or infinity: its pictures would be black."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{what} has numbers that are not finite, in {name}: the file is damaged; use another one")


def find_variant(folder: Path) -> str | None:
    """ "fp16" if the transformer's weights are there in that variant alone, as some folders have them."""
    files = [file.name for file in (folder / "transformer").glob("*.safetensors")]
    return "fp16" if files and all(".fp16" in name for name in files) else None


def _own_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The dtype of each part's weights in their files, by the part's name."""
    is_variant, found = find_variant(folder) is not None, {"default": torch.float32}
    for file in sorted(folder.glob("*/*.safetensors")):
        if (".fp16" in file.name) != is_variant or file.parent.name in found:
            continue
        with safe_open(file, framework="pt") as opened:
            names = (opened.get_slice(name).get_dtype() for name in opened.keys())  # noqa: SIM118
            found[file.parent.name] = next((DTYPES[name] for name in names if name in DTYPES), torch.float32)
    return found


def passes_by_layer(pipeline: DiffusionPipeline) -> bool:
    """Whether its text encoders are in the CPU's memory, and only their layers come to the GPU."""
    return any(hasattr(module, "_hf_hook") for module in text_encoders(pipeline))


def lacks_text_encoders(pipeline: DiffusionPipeline) -> bool:
    """Whether the pipeline was loaded without text encoders that its folder has."""
    return pipeline.name_or_path is not None and not text_encoders(pipeline)


def reads_no_text(pipeline: DiffusionPipeline) -> bool:
    """Whether it was built without text encoders, for which random conditions stand."""
    return pipeline.name_or_path is None and not text_encoders(pipeline)


def _pipeline_class(family: Family) -> Any:
    return family.pipeline_class


def how_to_load(folder: Path, model: str | None = None, revision: str | None = None) -> str:
    """Python that loads the pipeline in `folder` with plain diffusers, on one line.

    Args:
        folder: where its files are.
        model, revision: its name and branch on the hub, if it comes from there.
    """
    given, index = {"revision": revision, "variant": find_variant(folder)}, _local_index(folder)
    kind = index.get("_class_name", DiffusionPipeline.__name__)
    parts = find_class(str(folder), index).text_parts if kind in BUILT_IN else ()
    named = {name: value for name, value in given.items() if value is not None} | absent_parts(index, parts)
    arguments = ", ".join([repr(model or str(folder)), *(f"{name}={value!r}" for name, value in named.items())])
    return f"from diffusers import {kind}; pipe = {kind}.from_pretrained({arguments})"


def how_to_load_trained(config: Config, pipeline: DiffusionPipeline, folder: Path) -> str:
    """As `how_to_load`, of what the run of `config` on `pipeline` has saved in its `folder`."""
    if config.policy.train == "full":
        return how_to_load(folder)
    lora = f"pipe.load_lora_weights({str(folder)!r})"
    if config.random_weights:
        return lora
    is_name = config.model != "tiny" and not Path(config.model).exists()
    base = how_to_load(Path(pipeline.name_or_path), config.model if is_name else None, config.revision)
    return f"{base}; {lora}"


def text_encoder_names(pipeline: DiffusionPipeline) -> list[str]:
    """The names of the text encoders that the pipeline's family has."""
    return [part for part in family_of(pipeline.transformer).text_parts if part.startswith(TEXT_ENCODER)]


def text_encoders(pipeline: DiffusionPipeline) -> list[torch.nn.Module]:
    """The text encoders that the pipeline has."""
    parts = (getattr(pipeline, name) for name in text_encoder_names(pipeline))
    return [part for part in parts if part is not None]


def _find_model(model: str, revision: str | None, family: str) -> Path:
    """The folder of the pipeline `model`, downloaded if it is on the hub."""
    source = Path(tiny.PIPELINE_DIR if model == "tiny" else model)
    index = _local_index(source) if source.exists() else _hub_index(model, revision)
    kind = find_class(model, index, family)
    if source.exists():
        _require_parts(source, index, kind.optional_parts)
    folder = source if source.exists() else _download(model, revision)
    _require_numbers(folder)
    return folder


def _require_numbers(folder: Path) -> None:
    """Raises UserError for a number that everything is computed with, and that a configuration gives as null."""
    for name, numbers in NUMBERS.items():
        path = folder / name
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for number in numbers if isinstance(settings, dict) else ():
            if settings.get(number, 0) is None:
                raise UserError(f"{path}: {number} is null: write the number that the model was trained with")


def _require_parts(folder: Path, index: dict, optional_parts: tuple[str, ...]) -> None:
    """Raises UserError for a part that the index names and the folder lacks."""
    for part, value in index.items():
        listed = isinstance(value, list) and value != [None, None]
        if listed and not (folder / part).is_dir():
            remedy = (
                f'or go without it: "{part}": [null, null] in model_index.json'
                if part in optional_parts
                else "or download it again"
            )
            raise UserError(
                f"model '{folder}' lacks {part}, which its model_index.json names: add the folder, {remedy}"
            )


@cache
def _download(model: str, revision: str | None) -> Path:
    try:
        return Path(DiffusionPipeline.download(model, revision=revision))  # shows its own progress
    except (OSError, ValueError) as error:
        raise UserError(f"model '{model}' cannot be loaded: {first_line(error)}") from error


def _local_index(folder: Path) -> dict:
    path = folder / INDEX_FILE
    if not path.is_file():
        raise UserError(f"model '{folder}': no model_index.json there; give a pipeline's folder in diffusers' format")
    return read_json(path)


def _hub_index(name: str, revision: str | None) -> dict:
    missing = f"model '{name}': no such folder"
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(f"{missing}{NO_HUB_NAME}")
    try:
        return read_json(Path(hf_hub_download(name, INDEX_FILE, revision=revision)))
    except LocalEntryNotFoundError:
        raise UserError(f"{missing}, and the Hugging Face hub cannot be reached: download it first") from None
    except GatedRepoError:
        raise UserError(f"model '{name}' is gated: accept its licence on the hub, then `hf auth login`") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{missing}, and the Hugging Face hub refused it: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """What a library's error says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ImportError) and lines:
        return lines[0].partition(". ")[0]  # how to install the package goes on over several lines
    return lines[0] if lines else type(error).__name__
