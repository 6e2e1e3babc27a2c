"""Shared code of rewards that are neural networks: loading with one-line errors, and image preparation."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dgpo_fast.errors import UserError
from dgpo_fast.rewards.device import chosen_device

# Mean and standard deviation of RGB in [0, 1] that OpenAI's CLIP and its descendants, BLIP among them, were trained on.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Published(NamedTuple):
    """A published model that a reward stands for."""

    source: str
    """Where it is: `owner/name` on the Hugging Face hub, or `owner/name/file`."""
    sizes: Mapping[str, object]
    """What tells it from its siblings: values of its configuration by their dotted names."""

    def require(self, reward: str, source: str | Path, config: object) -> None:
        """Raises UserError if `source` has the published model's name but `config`, its configuration, has other sizes.

        A model with another name is accepted as the user's choice.
        """
        if Path(source).name != Path(self.source).name:
            return
        for name, wanted in self.sizes.items():
            found = functools.reduce(lambda one, part: getattr(one, part, None), name.split("."), config)
            found = list(found) if isinstance(found, tuple) else found
            if found != wanted:
                raise UserError(
                    f"reward {reward!r}: {source} is not the published {self.source}, as its {name} is {found} and not "
                    f"{wanted}: get that one, or give a model of your own another name (docs/rewards.md, models)"
                )


def default_device() -> torch.device:
    """Where models are loaded: the trainer's own device (`on_device`), else this process's GPU, else the CPU."""
    chosen = chosen_device()
    if chosen is not None:
        return torch.device(chosen)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_pretrained(name: str, loader: Callable[..., Any], source: str | Path) -> Any:
    """`loader(source)`, where `loader` is a `from_pretrained` of transformers. Models are complete and in fp32.

    Args:
        name: the reward, for the message.
        source: a model's name on the Hugging Face hub, or a folder.

    Raises:
        UserError: one line, if there is no such model or it lacks weights, which would be left random.
    """
    import transformers

    if Path(source).exists():
        # Downloads show their own progress; reading from the disk needs none.
        transformers.utils.logging.disable_progress_bar()
    is_model = hasattr(getattr(loader, "__self__", None), "base_model_prefix")
    try:
        if not is_model:
            return loader(source)
        model, report = loader(source, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise unavailable(name, source, error) from error
    # Buffers that are computed rather than learned come and go between releases of transformers.
    lacking = sorted(set(report["missing_keys"]) & {key for key, _ in model.named_parameters()})
    if lacking:
        raise UserError(f"reward {name!r}: {source} lacks {len(lacking)} weights, {lacking[0]} first: wrong model?")
    return model.to(default_device()).eval().requires_grad_(False)


def load_weights(name: str, source: str | Path, fetch: Callable[[], str | Path]) -> dict[str, torch.Tensor]:
    """The weights in one PyTorch file, fp32 on the CPU: the file `source` if there is one, else what `fetch` gets.

    Only tensors are unpickled; no code in the file is run. A dictionary below `"state_dict"` counts as the whole.

    Raises:
        UserError: one line, if the file is not available or holds no weights.
    """
    try:
        path = source if Path(source).is_file() else fetch()
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise unavailable(name, source, error) from error
    if isinstance(weights, Mapping):
        weights = weights.get("state_dict", weights)
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"reward {name!r}: {source} is no file of PyTorch weights")
    return {key: value.float() for key, value in weights.items()}


def hub_file(source: str | Path) -> str:
    """Path of the file `owner/repository/file` of the Hugging Face hub, downloaded once into its cache."""
    from huggingface_hub import hf_hub_download

    repository, _, file = str(source).rpartition("/")
    return hf_hub_download(repository, file)


def fill(name: str, source: str | Path, module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Loads `weights` into `module` and moves it to the device, in eval mode. Every weight of the module must be there.

    Other weights are ignored: checkpoints contain heads that scoring does not use.

    Raises:
        UserError: one line naming the first weight that is absent or of another shape.
    """
    for key, wanted in module.named_parameters():
        if key not in weights:
            raise UserError(f"reward {name!r}: {source} lacks the weight {key}: wrong file?")
        if weights[key].shape != wanted.shape:
            shapes = f"{tuple(weights[key].shape)} instead of {tuple(wanted.shape)}"
            raise UserError(f"reward {name!r}: in {source} the weight {key} is {shapes}: wrong file?")
    module.load_state_dict(dict(weights), strict=False)
    module.to(default_device()).eval().requires_grad_(False)


def unavailable(name: str, source: str | Path, error: Exception) -> UserError:
    """The one line for a model that cannot be loaded from `source`."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    on_hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+))?", str(source))
    command = f"`hf download {' '.join(filter(None, on_hub.groups()))}`" if on_hub else "check its path"
    remedy = f"{command}, or name a local copy (docs/rewards.md, models)"
    return UserError(f"reward {name!r} needs {source}, which cannot be loaded ({lines[0][:120]}): {remedy}")


def to_tensor(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 (B, H, W, 3) as float32 (B, 3, H, W) in 0..255 on `device`, that of the model that reads them."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float()


def resize(pixels: torch.Tensor, size: tuple[int, int], mode: str = "bicubic") -> torch.Tensor:
    """Images (B, 3, H, W) in 0..255 resized to (height, width) as PIL does it: smoothed first, rounded after."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size, mode=mode, antialias=True, align_corners=False).round().clamp(0, 255)


def crop_square(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """The shortest side resized to `size`, and the middle cut out: (B, 3, size, size), as CLIP was trained."""
    height, width = pixels.shape[-2:]
    short = min(height, width)
    pixels = resize(pixels, (size * height // short, size * width // short))
    top, left = (pixels.shape[-2] - size) // 2, (pixels.shape[-1] - size) // 2
    return pixels[..., top : top + size, left : left + size]


def pad_square(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """The longest side resized to `size`, black on both sides of the other: (B, 3, size, size)."""
    height, width = pixels.shape[-2:]
    scale = size / max(height, width)
    pixels = resize(pixels, (max(round(height * scale), 1), max(round(width * scale), 1)))
    vertical, horizontal = size - pixels.shape[-2], size - pixels.shape[-1]
    left, top = horizontal // 2, vertical // 2
    return F.pad(pixels, (left, horizontal - left, top, vertical - top))


def normalise(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Images (B, 3, H, W) in 0..255 → (x / 255 − mean) / std, per channel."""
    shape = (3, 1, 1)
    mean_, std_ = (pixels.new_tensor(values).view(shape) for values in (mean, std))
    return (pixels / 255 - mean_) / std_
