"""One file for each family of models (`models/family.py`), by the class that a pipeline's model_index.json names."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from dgpo_fast.errors import UserError
from dgpo_fast.models.architecture import Architecture
from dgpo_fast.models.family import Family
from dgpo_fast.user_code import call, import_attribute

BUILT_IN = {
    "StableDiffusion3Pipeline": "dgpo_fast.models.families.sd3:SD3",
    "FluxPipeline": "dgpo_fast.models.families.flux1:Flux1",
    "Flux2KleinPipeline": "dgpo_fast.models.families.flux2:Flux2Klein",
    "Flux2Pipeline": "dgpo_fast.models.families.flux2:Flux2",
    "QwenImagePipeline": "dgpo_fast.models.families.qwen_image:QwenImage",
    "ZImagePipeline": "dgpo_fast.models.families.z_image:ZImage",
    "SanaPipeline": "dgpo_fast.models.families.sana:Sana",
    "ChromaPipeline": "dgpo_fast.models.families.chroma:Chroma",
    "Lumina2Pipeline": "dgpo_fast.models.families.lumina2:Lumina2",
    "AuraFlowPipeline": "dgpo_fast.models.families.auraflow:AuraFlow",
    "CogView4Pipeline": "dgpo_fast.models.families.cogview4:CogView4",
}
AUTO = "auto"
GUIDE = "docs/families.md"


def find_class(model: str, index: Mapping[str, Any], setting: str = AUTO) -> type[Family]:
    """The family of a pipeline.

    Args:
        model: as errors name it.
        index: of its model_index.json.
        setting: "auto", or the import path of a user's own family.

    Raises UserError, one line, if there is none.
    """
    kind = index.get("_class_name")
    if setting != AUTO:
        return _imported(f"family '{setting}'", setting)
    if kind not in BUILT_IN:
        raise UserError(
            f"model '{model}' is a {kind or 'folder without _class_name'}, not a {_listed(list(BUILT_IN))}; "
            f"{GUIDE} shows how to add a family"
        )
    return _imported(f"family of {kind}", BUILT_IN[kind])


def make_family(architecture: Architecture, setting: str = AUTO) -> Family:
    """The family of a model. Raises UserError as `find_class`, and if the model is not what its class says."""
    name = architecture.name or str(architecture.folder)
    made = find_class(name, architecture.index, setting)
    return call(f"model '{name}'", f"is no {made.title} that can be read", made, architecture)


def known_models() -> dict[str, Callable[[], Architecture]]:
    """The models on the hub whose sizes are known without a download, by name."""
    built = (path for path in BUILT_IN.values() if find_spec(path.partition(":")[0]) is not None)
    return {name: make for path in built for name, make in _imported("family", path).known_models.items()}


def _imported(what: str, path: str) -> type[Family]:
    found = import_attribute(what, path, example="my_family:MyFamily")
    if not (isinstance(found, type) and issubclass(found, Family)):
        raise UserError(f"{what} is no dgpo_fast.models.family.Family: {GUIDE} shows how to derive one")
    return found


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
