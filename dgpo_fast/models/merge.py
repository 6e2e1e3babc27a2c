"""`python -m dgpo_fast.merge`: a LoRA merged into a model, written as a pipeline's folder in diffusers' format."""

import os
from pathlib import Path

from pydantic.dataclasses import dataclass

from dgpo_fast.config.bounds import STRICT
from dgpo_fast.config.help import print_settings
from dgpo_fast.config.reading import parse_overrides, resolve
from dgpo_fast.errors import UserError
from dgpo_fast.wording import counted

USAGE = """Merge a LoRA into a model, and write the result as a folder in diffusers' format.

  python -m dgpo_fast.merge MODEL LORA FOLDER
  python -m dgpo_fast.merge tiny runs/NAME merged
  python -m dgpo_fast.merge ./my_sd3 style.safetensors ./my_sd3_style

MODEL is `tiny`, a pipeline's folder, or a name on the Hugging Face hub. LORA is a .safetensors file, or the folder that
contains it. FOLDER must not exist yet.

Every part of the model keeps its dtype. Weights are merged in fp32 and rounded once."""


@dataclass(kw_only=True, config=STRICT)
class MergeSettings:
    """How the model is read."""

    revision: str | None = None
    """Branch, tag or commit of a model on the hub. None: its default branch."""
    family: str = "auto"
    """How the model is drawn with. auto: by the class that its model_index.json names. Anything else: your own
    `my_module:MyFamily` (docs/families.md)."""


def merge_command(args: list[str]) -> None:
    """Runs the command line's merge. Raises UserError, and then no folder is left."""
    if {"-h", "--help"} & set(args):
        print_settings(USAGE, MergeSettings())
        return
    count = next((index for index, arg in enumerate(args) if arg.startswith("-")), len(args))
    settings = resolve(MergeSettings(), parse_overrides(args[count:], MergeSettings()), "command line")
    if count != 3:
        raise UserError("command line: give a model, a LoRA and the folder to write: dgpo-fast merge MODEL LORA FOLDER")
    model, lora, folder = args[:3]
    write_merged(
        os.path.expanduser(model),
        Path(lora).expanduser(),
        Path(folder).expanduser(),
        settings.revision,
        settings.family,
    )


def write_merged(model: str, lora: Path, folder: Path, revision: str | None = None, family: str = "auto") -> None:
    """Writes `model` with `lora` merged to `folder`, in the dtypes of the model's own files, and says so.

    Raises UserError if one of them cannot be used, or if the folder exists or cannot be written.
    """
    from dgpo_fast.models.loading import how_to_load  # after the command line is known to be good: this takes seconds
    from dgpo_fast.models.lora import find_lora
    from dgpo_fast.run.console import Console
    from dgpo_fast.run.folder import new_folder

    with new_folder(folder) as staged, Console().track(f"writing {folder}"):
        done = save_merged(model, find_lora(lora), staged, revision, family)
    Console().note(f"{folder}: {model} with {lora} merged into {done}")
    Console().note(f"load: {how_to_load(folder)}")


def save_merged(model: str, lora: Path, folder: Path, revision: str | None, family: str) -> str:
    """Saves `model` with the LoRA in the file `lora` merged into `folder`. Returns what it was merged into.

    Raises UserError if one of the two cannot be used, OSError or SafetensorError if `folder` cannot be written.
    """
    import torch

    from dgpo_fast.models.loading import load_pipeline
    from dgpo_fast.models.lora import merge_lora

    pipeline = load_pipeline(model, revision=revision, device=torch.device("cpu"), dtype=None, family=family)
    merged = merge_lora(pipeline, lora)
    pipeline.save_pretrained(folder, safe_serialization=True)
    what = ", ".join(f"{counted(len(layers), 'layer')} of the {part}" for part, layers in merged.parts.items())
    dtype = str(pipeline.transformer.dtype).removeprefix("torch.")
    return f"{what}; the transformer is in {dtype}, as it was"
