"""The loop that runs a stage of pretraining: equal draws whatever the number of processes, checkpoints, averages.

A run with the same seed on the same kind of machine gives the same weights, and so does a run that was killed and
resumed.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dgpo_fast.errors import UserError
from dgpo_fast.tiny.stages import Batch, Pretraining, Stage


def say_nothing(stage: Stage, step: int, loss: Tensor) -> None:
    """The report of every process but the first."""


@dataclass
class Session:
    """What one process adds: where checkpoints lie, when to stop (time.monotonic()), if it saves, how it reports."""

    config: Pretraining
    folder: Path
    deadline: float
    saves: bool = True
    report: Callable[[Stage, int, Tensor], None] = say_nothing


class OutOfTime(Exception):
    """The time allowed was spent before the last step."""


@dataclass
class Progress:
    """How far a stage is: what its checkpoint holds."""

    optimizer: torch.optim.Optimizer
    weights: list[nn.Parameter]
    average: list[Tensor]
    step: int = 0

    def save(self, file: Path, config: Pretraining) -> None:
        """Writes the checkpoint `file`. A killed run leaves either the old one or the new one, never half of one."""
        state = {
            "config": asdict(config),
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "weights": [p.detach() for p in self.weights],
            "average": self.average,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, file)

    def load(self, file: Path, config: Pretraining) -> None:
        """Goes on from the checkpoint `file`. Raises UserError if it was made with another configuration."""
        state = torch.load(file, map_location=self.weights[0].device, weights_only=True)
        changed = [name for name, value in asdict(config).items() if state["config"].get(name) != value]
        if changed:
            raise UserError(
                f"{file} was made with another {', '.join(changed)}: use the same or start in another --work folder"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            torch._foreach_copy_([*self.weights], state["weights"])
            torch._foreach_copy_(self.average, state["average"])
        self.step = int(state["step"])


def optimise(stage: Stage, session: Session) -> None:
    """Runs a stage from its checkpoint, if there is one, and leaves the averaged weights in its modules.

    Raises:
        OutOfTime: the deadline passed; a checkpoint is written and the averages so far are in the modules.
    """
    config = session.config
    weights = [p for module in stage.modules for p in module.parameters()]
    average = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.01)
    progress = Progress(optimizer, weights, average)
    file = session.folder / f"{stage.name}.pt"
    if file.exists():
        progress.load(file, config)
    last_save = time.monotonic()
    time_over = False
    while progress.step < stage.steps and not time_over:
        step = progress.step
        # Draws depend on seed, stage and step only, so that a resumed run repeats them.
        key = np.random.SeedSequence([config.seed, step, *stage.name.encode()]).generate_state(1, np.uint64)[0]
        batch = stage.draw(torch.Generator().manual_seed(int(key) >> 1))
        loss, time_over = _gradients(stage, batch, weights, time.monotonic() > session.deadline)
        _update(stage, optimizer, weights, step)
        # The first averages forget the random start.
        torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - min(config.ema, (1 + step) / (10 + step)))
        progress.step += 1
        session.report(stage, progress.step, loss)
        if session.saves and time.monotonic() - last_save >= config.checkpoint_every_s:
            progress.save(file, config)
            last_save = time.monotonic()
    if session.saves:
        progress.save(file, config)
    with torch.no_grad():
        torch._foreach_copy_([*weights], average)
    if progress.step < stage.steps:
        raise OutOfTime


def _gradients(stage: Stage, batch: Batch, weights: list[nn.Parameter], time_over: bool) -> tuple[Tensor, bool]:
    """Sets the gradients of a batch's mean loss; every process takes some rows of the batch, and all get the same sums.

    Returns the loss, a scalar tensor, and whether the time is over for any of the processes.
    """
    device = weights[0].device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = [t.tensor_split(world)[rank].to(device) for t in batch]
    loss = stage.loss(*rows) * (len(rows[0]) / len(batch[0]))
    # The embeddings leave the text encoders before their last layer, which reaches the loss through the pooled vector
    # alone; what does not reach it at all has gradient zero.
    gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
    sums = torch.cat([*(g.reshape(-1) for g in gradients), loss.detach()[None], loss.new_tensor([float(time_over)])])
    if world > 1:
        dist.all_reduce(sums)
        time_over = bool(sums[-1] > 0)
    for p, g in zip(weights, sums[:-2].split([p.numel() for p in weights]), strict=True):
        p.grad = g.view_as(p)
    return sums[-2], time_over


def _update(stage: Stage, optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], step: int) -> None:
    nn.utils.clip_grad_norm_(weights, 1.0)
    warm_up = min(1.0, (step + 1) / 100)
    decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    for group in optimizer.param_groups:
        group["lr"] = stage.lr * warm_up * decay
    optimizer.step()
