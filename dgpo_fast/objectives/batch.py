"""One iteration's images and advantages: the input of an objective."""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from dgpo_fast.distributed import BatchPart
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.records import Metrics
from dgpo_fast.rollout.schedule import Schedule
from dgpo_fast.rollout.step_noise import Transitions


@dataclass(frozen=True)
class Batch:
    """One iteration's images, whole groups one after another.

    Attributes:
        iteration: counted from 0; keys every draw.
        x0: (B, C, H, W) fp32 final latents.
        text: the B prompts, and their negative prompts.
        advantage: (B,) fp32.
        group_index: (B,) int64; equal within a group and different between the groups of an iteration. Keys the noise
            that a group shares.
        sample_index: (B,) int64; different between the samples of an iteration. Keys the noise of each.
        group_size: G, samples per group.
        schedule: the rollout's grid.
        transitions: every step of the rollout, for an objective that `needs_transitions`.
        part: where these samples stand among those of all processes; None if they are all.
        padding: the number of rows at the end that have weight 0; with sharded weights, forwards need them.
        kl_gate: (B,) fp32 factors of the samples' KL weights (`objectives/kl_term.py`); None if all are 1.
    """

    iteration: int
    x0: Tensor
    text: TextEmbeds
    advantage: Tensor
    group_index: Tensor
    sample_index: Tensor
    group_size: int
    schedule: Schedule
    transitions: Transitions | None = None
    part: BatchPart | None = None
    padding: int = 0
    kl_gate: Tensor | None = None

    @property
    def own(self) -> int:
        """The process's own samples, without the padding."""
        return len(self.x0) - self.padding

    @property
    def weight(self) -> Tensor:
        """(B,) fp32: 1 for each of the process's own samples, 0 for padding."""
        return (torch.arange(len(self.x0), device=self.x0.device) < self.own).float()

    @property
    def groups(self) -> int:
        """P, the number of groups in this batch, including those of other processes."""
        return len(self.x0) // self.group_size if self.part is None else self.part.groups

    @property
    def samples(self) -> int:
        """P·G, the number of samples that the loss is a mean over, including those of other processes."""
        return self.groups * self.group_size

    def group_means(self) -> "Batch":
        """One row for each group: the mean x0 of the samples that are here. With sharded weights, rows are filled up to
        equally many on every process."""
        member = membership(self.own, self.group_size, self.part, self.x0)
        mean = member / member.sum(1, keepdim=True).clamp(min=1) @ self.x0[: self.own].flatten(1)
        row, before = torch.arange(len(member), device=self.x0.device), 0 if self.part is None else self.part.before
        first = (row * self.group_size - before).clamp(0, len(self.x0) - 1)
        return replace(self[first], x0=mean.unflatten(1, self.x0.shape[1:]))

    def __getitem__(self, rows: slice | Tensor) -> "Batch":
        """The same for some of the rows; the caller knows which are whole groups, and which are padding."""
        return replace(
            self,
            x0=self.x0[rows],
            text=self.text[rows],
            advantage=self.advantage[rows],
            group_index=self.group_index[rows],
            sample_index=self.sample_index[rows],
            transitions=None if self.transitions is None else self.transitions[rows],
            kl_gate=None if self.kl_gate is None else self.kl_gate[rows],
            padding=0,
        )

    def taken(self, rows: slice | Tensor, part: BatchPart) -> "Batch":
        """Some of the process's own samples as a batch of `part`, which gives their advantages, with its padding."""
        own = self[rows]
        count, missing = len(own.x0), part.missing(len(own.x0))
        if missing:
            index = torch.arange(len(self.x0), device=self.x0.device)[rows]
            own = self[pad(index, (0, missing))]
        advantage = pad(part.advantage[part.first : part.first + count], (0, missing)).to(self.x0.device)
        return replace(own, advantage=advantage, group_size=part.group_size, part=part, padding=missing)

    def among(self, positions: Tensor, advantage: Tensor, group_size: int) -> "Batch":
        """Some of all processes' samples as groups of another size.

        Args:
            positions: (P·group_size,) int64, in the order of the groups; they may repeat, and never fall.
            advantage: (P·group_size,) of these samples.
            group_size: of the new groups.
        """
        if self.part is None:
            device = self.x0.device
            return replace(self[positions.to(device)], advantage=advantage.to(device), group_size=group_size)
        first = self.part.first
        mine = (positions >= first) & (positions < first + self.own)
        rows = (positions[mine] - first).to(self.x0.device)
        return self.taken(rows, self.part.chosen(positions, advantage, group_size))

    def split(self, parts: int) -> list["Batch"]:
        """Up to `parts` batches of whole groups, as even as they can be; none is empty on all processes together."""
        ends = [self.groups * part // parts * self.group_size for part in range(parts + 1)]
        return [self._between(start, end) for start, end in pairwise(ends) if end > start]

    def _between(self, start: int, end: int) -> "Batch":
        if self.part is None:
            return self[start:end]
        return self.taken(self.part.rows(start, end, self.own), self.part.only(start, end))


def membership(own: int, group_size: int, part: BatchPart | None, like: Tensor) -> Tensor:
    """(groups, own), in the dtype and on the device of `like`: 1 where one of a process's `own` samples is of a group.

    A product with it adds up groups: sums by index have no fixed order on a GPU.
    """
    count, before = (own // group_size, 0) if part is None else (part.groups_of(own), part.before)
    sample, row = (torch.arange(length, device=like.device) for length in (own, count))
    return ((sample + before) // group_size == row[:, None]).to(like.dtype)


def add_metrics(totals: Metrics, values: dict[str, Tensor], weight: float) -> None:
    """Adds `weight` times each of `values` to `totals`, without a host sync."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + weight * value.detach()
