"""The largest micro-batch that fits. Its size affects speed and memory, not the gradient."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dgpo_fast.config.options import Config
from dgpo_fast.memory.predict import Predictor, readable
from dgpo_fast.models.forward import predict
from dgpo_fast.models.meta import SampleShape
from dgpo_fast.models.policy import PolicyModels, autocast

MOST_ON_A_CPU = 128
"""Samples: larger micro-batches gain nothing on a CPU."""


@dataclass(frozen=True)
class MemoryLine:
    """Bytes of a training step as a function of its samples: fixed + per_sample · samples."""

    fixed: float
    per_sample: float

    @classmethod
    def through(cls, measure: Callable[[int], int], first: int, second: int) -> "MemoryLine":
        """The line through the measurements at two sizes."""
        low, high = measure(first), measure(second)
        per_sample = max((high - low) / (second - first), 1.0)
        return cls(low - per_sample * first, per_sample)

    @classmethod
    def predicted(cls, predictor: Predictor, config: Config) -> "MemoryLine":
        """All memory of a training step of `config`, by prediction."""
        return cls.through(lambda size: predictor.predict(config, size).at("training"), 1, 2)

    def largest(self, available: float) -> int:
        """The largest number of samples that take at most `available` bytes; can be 0."""
        return max(int((available - self.fixed) // self.per_sample), 0)

    def __str__(self) -> str:
        return f"{readable(self.per_sample)} a sample"


def fit(most: int, samples: int, group_size: int) -> int:
    """A micro-batch of at most `most` samples: whole groups if one fits, with little padding in the last micro-batch.

    Args:
        most: ≥ 1.
        samples: of an iteration on this process.
        group_size: G.
    """
    unit = group_size if most >= group_size else 1
    limit, total = min(most, samples) // unit, -(-samples // unit)
    # Less than half of what fits would cost more by small kernels than even batches save.
    sizes = range(max(limit, 1), limit // 2, -1)
    return unit * min(sizes, key=lambda size: -(-total // size) * size)


def in_groups(micro_batch: int, group_size: int) -> str:
    """`48 samples (3 groups)`, or what a size below a group costs."""
    if micro_batch >= group_size:
        count = micro_batch // group_size
        return f"{micro_batch} samples ({count} group{'s' if count > 1 else ''})"
    return f"{micro_batch} samples, less than a group, which costs one more forward"


class TrainingMemory:
    """Measures the GPU memory of the policy's forward and backward, with random inputs and without a step.

    Args:
        models: the run's; their gradients are dropped.
        shape: of one sample.
    """

    def __init__(self, models: PolicyModels, shape: SampleShape):
        self.models, self.shape = models, shape

    def __call__(self, samples: int) -> int:
        """Peak bytes of one micro-batch in addition to weights and gradients. Raises torch.OutOfMemoryError."""
        device = self.models.device
        # Blocks that are compiled run as they are: the sizes tried here are not those of the run.
        with torch.compiler.set_stance("force_eager"):
            self._backward(1)  # gradients, and what libraries take once, are there before
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            self._backward(samples)
            torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before

    def release(self) -> None:
        """Drops the gradients and gives cached memory back."""
        for weight in self.models.weights.values():
            weight.grad = None
        torch.cuda.empty_cache()

    def _backward(self, samples: int) -> None:
        text = self.shape.text(samples, self.models.dtype, self.models.device)
        rows = {name: torch.randn_like(row) if row.is_floating_point() else row for name, row in text.rows.items()}
        text = replace(text, rows=rows)
        x_t = self._random(samples, *self.shape.latent)
        with autocast(self.models):
            velocity = predict(self.models.policy, x_t, torch.tensor(500.0, device=self.models.device), text)
        velocity.backward(torch.randn_like(velocity))

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.models.device, dtype=self.models.dtype)
