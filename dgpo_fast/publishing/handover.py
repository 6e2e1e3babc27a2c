"""What is handed on of a run: what it is, how others load it, and what its card is made of."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard
from safetensors import safe_open

from dgpo_fast.config.options import Config
from dgpo_fast.errors import UserError
from dgpo_fast.models.architecture import INDEX_FILE, read_json
from dgpo_fast.models.family import Family
from dgpo_fast.models.loading import how_to_load, read_model
from dgpo_fast.models.lora import LORA_FILE
from dgpo_fast.models.merge import save_merged
from dgpo_fast.models.policy import is_target
from dgpo_fast.publishing.settings import ExportSettings
from dgpo_fast.records import JsonObject
from dgpo_fast.run.console import with_nan
from dgpo_fast.wording import counted, resume_command

SUMMARY = "summary.json"
LICENCE = ("license", "license_name", "license_link")
"""In a model card's metadata."""
SHIPPED = "PIPELINE_DIR"
"""Where the shipped model is, as `dgpo_fast.tiny` calls it: its path says nothing on another machine."""


@dataclass(frozen=True)
class Handover:
    """A run to hand on.

    Attributes:
        run: its folder.
        config: its settings.
        summary: its `summary.json`; what has no mean is NaN.
        family: of its model.
        name: what the result is called.
        target: where it will be: a name on the hub, or a folder.
        whole: whether it is a pipeline, not a LoRA.
        base_name: the base model's name on the hub; None if it has none, or an unknown one.
        licence: the base model's, as a card's metadata has it; empty if it is unknown.
    """

    run: Path
    config: Config
    summary: JsonObject
    family: Family
    name: str
    target: str
    whole: bool
    base_name: str | None
    licence: Mapping[str, str]

    @property
    def kind(self) -> str:
        """What it is."""
        return "pipeline" if self.whole else "LoRA"

    def how_to_load(self, files: Path, target: str) -> str:
        """Python that loads it with plain diffusers, on one line.

        Args:
            files: the folder in which it lies now.
            target: what it will be loaded from.
        """
        if self.whole:
            return how_to_load(files, target)
        folder, config = self.family.architecture.folder, self.config
        if folder is None:
            raise ValueError("a run's model has files")
        named = self.base_name or f"path/to/{Path(config.model).name}"
        line = how_to_load(folder, SHIPPED if config.model == "tiny" else named, config.revision)
        if config.model == "tiny":
            line = f"from dgpo_fast.tiny import {SHIPPED}; {line.replace(repr(SHIPPED), SHIPPED)}"
        return f"{line}; pipe.load_lora_weights({target!r})"

    def write_weights(self, folder: Path) -> None:
        """Writes it into `folder`. Raises UserError as `save_merged`, and OSError."""
        if not self.whole:
            shutil.copyfile(self.run / LORA_FILE, folder / LORA_FILE)
        elif self.config.policy.train == "lora":
            save_merged(self.config.model, self.run / LORA_FILE, folder, self.config.revision, self.config.family)
        else:
            index = read_json(self.run / INDEX_FILE)
            shutil.copyfile(self.run / INDEX_FILE, folder / INDEX_FILE)
            for part in (part for part, value in index.items() if isinstance(value, list) and None not in value):
                shutil.copytree(self.run / part, folder / part)

    @property
    def comfyui(self) -> str:
        """What to do with it in ComfyUI, in a sentence."""
        if self.whole:
            return "this is a pipeline in diffusers' folder format, which was not tried there"
        if not self.family.comfyui:
            return f"it does not map the layer names of {self.family.title} LoRAs: load this one with diffusers"
        with safe_open(self.run / LORA_FILE, framework="pt") as file:
            names = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in file.keys()}  # noqa: SIM118
        others = sorted(name for name in names if not is_target(name, self.family.lora_targets))
        if others:
            return (
                f"{counted(len(others), 'layer')} of {len(names)}, such as {others[0]}, may be skipped there: look for "
                "`lora key not loaded` in its log"
            )
        return f"put {LORA_FILE} into models/loras, and load it there with strength 1"


def read_handover(
    run: Path, config: Config, settings: ExportSettings, folder: Path, note: Callable[[str], None]
) -> Handover:
    """What is handed on of the run in the folder `run`.

    Args:
        run: finished, with its weights and its summary.
        config: its settings.
        settings: of the export.
        folder: where the result goes.
        note: told if the licence is unknown.

    Raises UserError if the summary is damaged or the model cannot be found.
    """
    summary, family = read_summary(run), read_model(config)
    base_name = settings.base_model or (config.model if _is_hub_name(config.model) else None)
    handover = Handover(
        run=run,
        config=config,
        summary=summary,
        family=family,
        name=(settings.push or folder.name).rpartition("/")[2],
        target=settings.push or folder.name,
        whole=settings.merged or config.policy.train == "full",
        base_name=base_name,
        licence={"license": settings.license} if settings.license else _licence(config, family, base_name),
    )
    if not handover.licence:
        note("the licence of the base model is not known, and the card says so: give it with --license")
    return handover


def read_summary(run: Path) -> JsonObject:
    """The `summary.json` of a run; means that are null there are NaN. Raises UserError if it is damaged."""
    path = run / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        scores = {name: with_nan(summary[name]) for name in ("before", "after", "gain")}
        return {**summary, **scores}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is damaged: remove it, and make it again with {resume_command(run)}") from None


def _is_hub_name(model: str) -> bool:
    return model != "tiny" and not Path(model).exists()


def _licence(config: Config, family: Family, base_name: str | None) -> dict[str, str]:
    """The licence that the base model's card names, as the metadata of another card has it; empty if there is none."""
    if config.model == "tiny":
        return {"license": "apache-2.0"}
    own_card = (family.architecture.folder or Path()) / "README.md"
    source = own_card if own_card.is_file() else base_name
    if source is None:
        return {}
    try:
        card = ModelCard.load(source, ignore_metadata_errors=True)
    except (OSError, ValueError):  # the hub cannot be reached, or has no card of it
        return {}
    found = {name: str(card.data.get(name)) for name in LICENCE if card.data.get(name)}
    link = found.get("license_link", "://")
    if "://" not in link:  # a file beside the base model's card
        found["license_link"] = f"https://huggingface.co/{base_name}/blob/main/{link}" if base_name else ""
    return {name: value for name, value in found.items() if value} if "license" in found else {}
