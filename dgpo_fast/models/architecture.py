"""What a pipeline is made of, read from its configuration files alone: no weight is loaded.

Sizes, parameter counts and memory follow from this before anything is allocated (`Family.build_transformer` under
`torch.device("meta")`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dgpo_fast.errors import UserError
from dgpo_fast.records import JsonObject

INDEX_FILE = "model_index.json"
TEXT_ENCODER = "text_encoder"
"""How the names of a pipeline's text encoders begin."""
SCHEDULER_FILE = Path("scheduler") / "scheduler_config.json"


@dataclass(frozen=True)
class Architecture:
    """The configurations of a pipeline's modules. What they mean is its family's (`models/family.py`).

    Attributes:
        transformer: of diffusers' transformer.
        vae: of diffusers' autoencoder.
        index: of model_index.json: the pipeline's class, the classes of its parts, and its own settings.
        text_encoders: those that the pipeline has, by their name in it.
        token_limits: `model_max_length` of each tokenizer that names one, by its name in the pipeline.
        scheduler: of the pipeline's scheduler.
        folder: where the files are; None for one known without files.
        name: what the model is called: on the hub, or its folder's name.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    index: Mapping[str, Any]
    text_encoders: Mapping[str, PretrainedConfig] = field(default_factory=dict)
    token_limits: Mapping[str, int] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    name: str = ""

    @property
    def shift(self) -> Any:
        """Timestep shift of its scheduler, as its file has it; 1 if it names none, as in diffusers."""
        return self.scheduler.get("shift", self.scheduler.get("flow_shift", 1.0))

    @property
    def scheduler_file(self) -> Path:
        """Where `scheduler` is from."""
        return (self.folder or Path()) / SCHEDULER_FILE

    def build_text_encoder(self, name: str) -> nn.Module:
        """The text encoder called `name` with initial weights, on torch's default device, in its default dtype."""
        return _encoder_class(self.index[name][1])(self.text_encoders[name])


def read_architecture(folder: Path, name: str | None = None) -> Architecture:
    """The architecture of the pipeline in `folder`, which is called `name`; None: as the folder is.

    Raises UserError naming a file that is missing or damaged.
    """
    index = read_json(folder / INDEX_FILE)
    return Architecture(
        index=index,
        transformer=read_json(folder / "transformer" / "config.json"),
        vae=read_json(folder / "vae" / "config.json"),
        text_encoders={part: _encoder_config(folder, part, index[part][1]) for part in _present(index, TEXT_ENCODER)},
        token_limits=_token_limits(folder, _present(index, "tokenizer")),
        scheduler=read_json(folder / SCHEDULER_FILE),
        folder=folder,
        name=name or folder.resolve().name,
    )


def absent_parts(index: Mapping[str, Any], parts: tuple[str, ...]) -> dict[str, None]:
    """Those of `parts` that a pipeline does not have, as SD3 without its T5. `from_pretrained` wants to be told so by
    name: they are arguments without a default, and those that the index has as null are not passed on."""
    return {name: None for name in parts if index.get(name) in (None, [None, None])}


def read_json(path: Path) -> JsonObject:
    """The object in a JSON file of a pipeline. Raises UserError if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); the pipeline's folder is not whole") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; the pipeline's folder is damaged")
    return value


def _present(index: Mapping[str, Any], start: str) -> list[str]:
    """The parts whose names begin with `start` and that the pipeline has."""
    return [part for part, value in index.items() if part.startswith(start) and isinstance(value, list) and value[0]]


def _encoder_config(folder: Path, part: str, kind: str) -> PretrainedConfig:
    try:
        made = _encoder_class(kind).config_class.from_dict(read_json(folder / part / "config.json"))
    except LookupError:
        raise UserError(
            f"{folder / INDEX_FILE}: {part} is a {kind}, which transformers {transformers.__version__} does not have"
        ) from None
    return made


def _encoder_class(kind: str) -> Any:
    """The class of transformers of that name. Raises LookupError if it has no such model."""
    found = getattr(transformers, kind, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise LookupError(kind)
    return found


def _token_limits(folder: Path, tokenizers: list[str]) -> dict[str, int]:
    files = {name: folder / name / "tokenizer_config.json" for name in tokenizers}
    limits = {name: read_json(file).get("model_max_length") for name, file in files.items() if file.is_file()}
    return {name: limit for name, limit in limits.items() if isinstance(limit, int)}


def flow_match_scheduler(shift: float, **more: Any) -> dict[str, Any]:
    """The configuration of diffusers' Euler scheduler with that shift, and with what else it says."""
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": shift, **more}
