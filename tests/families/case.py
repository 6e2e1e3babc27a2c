"""What the tests of every family need of one: a small random pipeline of it, and how diffusers draws it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgpo_fast.models.architecture import read_architecture
from dgpo_fast.models.family import Family
from dgpo_fast.user_code import import_attribute


@dataclass(frozen=True)
class Case:
    """A family's tests are those of `test_pictures.py`, with its case in `CASES` there.

    Attributes:
        name: of the family's file.
        make: the pipeline, every parameter random: default starts have zero gates and norms of 1, which hide faults.
        family: import path of its class.
        pipeline_draws: (pipeline, noise (1, C, H, W), prompt, negative prompt, scale, steps) → diffusers' own latents
            in the form of `noise`, and pixels (1, 3, height, width) in [−1, 1].
        size: (height, width) of the pictures, not square.
        scales: the setting `guidance_scale` for each way of drawing that the family has.
        solver: of the family's own scheduler.
        steps: numbers of steps that its own pipeline can draw.
        length: `max_sequence_length` for the small text encoders: a template must not push the prompt out.
    """

    name: str
    make: Callable[[], Any]
    family: str
    pipeline_draws: Callable[[Any, Tensor, str, str, float, int], tuple[Tensor, Tensor]]
    size: tuple[int, int]
    scales: Mapping[str, float] = field(default_factory=lambda: {"guided": 4.0, "unguided": 1.0})
    solver: str = "euler"
    steps: tuple[int, ...] = (1, 2, 4, 8)
    length: int = 512

    def family_of(self, pipeline: Any, folder: Path) -> Family:
        """The family of `pipeline`, which is saved in `folder`."""
        pipeline.save_pretrained(folder)
        return import_attribute(self.name, self.family, example="module:Class")(read_architecture(folder))


@torch.no_grad()
def fill(module: torch.nn.Module, seed: int = 0, scale: float = 0.3) -> torch.nn.Module:
    """`module` with random numbers in every parameter: matrices by their width, vectors around their start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.add_(scale * noise)
    return module.requires_grad_(False).eval()
