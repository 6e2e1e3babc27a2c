"""Groups of pictures that people have judged (`data.source` preferences), encoded once and kept on disk.

An iteration has P groups, which may differ in size; those of one size are a batch. Nothing is drawn for them, and
their scores are those of the file.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dgpo_fast.config.options import Config
from dgpo_fast.distributed import ALONE, Processes
from dgpo_fast.distributed.placement import shares
from dgpo_fast.errors import UserError
from dgpo_fast.models.family import family_of
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.dealing import GroupSampler
from dgpo_fast.prompts.preferences import JudgedGroup, groups_of, read_picture, run_preferences
from dgpo_fast.records import JsonObject
from dgpo_fast.rewards import GroupScores
from dgpo_fast.rollout.latent_folder import LatentFolder
from dgpo_fast.rollout.online import RolloutWorker
from dgpo_fast.rollout.source import Groups
from dgpo_fast.run.console import Console, duration
from dgpo_fast.wording import counted


class JudgedSource:
    """Judged groups. Training repeats them, in a new order in every pass.

    Args:
        config: the run's.
        worker: whose models and prompt encoder are used; it draws nothing.
        model: names what encodes pictures, by its content.
        single_images: whether each picture is a group of its own, with +1 or −1 (`Traits.single_images`).
        processes: they take turns encoding pictures, into a folder that all of them can access.

    Attributes:
        groups: to train on.
        held_out: groups of held-out prompts.

    Raises UserError, with file and line, for what the objective cannot learn from.
    """

    def __init__(
        self, config: Config, worker: RolloutWorker, model: str, *, single_images: bool, processes: Processes = ALONE
    ):
        self.config, self.worker, self.model, self.processes = config, worker, model, processes
        self.single_images = single_images
        train, held_out, _ = run_preferences(config)
        self.groups, self.held_out = groups_of(train), groups_of(held_out)
        _require_usable([*self.groups, *self.held_out], config.objective, single_images=single_images)
        if single_images:
            self.groups = [each for group in self.groups for each in _single(group)]
        _require_choice(self.groups, config, single_images=single_images)
        self.dealt = GroupSampler(self.groups, config.rollout.groups, config.seed, stream="judged groups")
        self.folder: LatentFolder | None = None
        self.encoding_s = 0.0

    @property
    def period(self) -> int | None:
        """Iterations after which all draws repeat (`data.noise_passes`); None if they do not."""
        passes = self.config.data.noise_passes
        return None if passes is None else -(-len(self.groups) * passes // self.config.rollout.groups)

    def prepare(self, folder: Path, console: Console, should_stop: Callable[[], bool]) -> None:
        """Encodes the pictures that are not encoded yet."""
        home = Path(self.config.data.folder) if self.config.data.folder else folder / "latents"
        self.folder = LatentFolder(home, self.model)
        started = time.perf_counter()
        everyone = [*self.groups, *self.held_out]
        pictures = {image: group.prompt.origin for group in everyone for image in group.images}
        with self.processes.together("the encoded pictures"):
            mine = list(pictures)[self.processes.rank :: self.processes.count]
            missing = {image: pictures[image] for image in mine if not self.folder.has(image)}
            if missing:
                self._encode(self.folder, missing, console, should_stop)
        self.encoding_s = time.perf_counter() - started
        console.note(
            f"preferences: {counted(len(self.groups), 'group')} to train on and {len(self.held_out)} held out; "
            f"{counted(len(pictures), 'picture')} encoded in {duration(self.encoding_s)}, in {home}"
        )

    def prompts_of(self, iterations: range) -> list[Prompt]:
        """See `Source.prompts_of`."""
        last = iterations.stop if self.period is None else min(iterations.stop, self.period)
        drawn = [group.prompt for group in self.dealt.all_drawn(range(min(iterations.start, last), last))]
        return [*drawn, *(group.prompt for group in self.held_out)]

    def collect(self, iteration: int) -> list[Groups]:
        """See `Source.collect`."""
        number = iteration if self.period is None else iteration % self.period
        by_size: dict[int, list[JudgedGroup]] = defaultdict(list)
        for group in self.dealt.draw(number):
            by_size[len(group.images)].append(group)
        return [self._groups(by_size[size], size, number) for size in sorted(by_size)]

    def summary(self) -> JsonObject:
        """See `Source.summary`."""
        return {"source": "preferences", "drawing_s": self.encoding_s, "judged_groups": len(self.groups)}

    def latents(self, images: Sequence[Path]) -> Tensor:
        """x0 of encoded pictures, (B, C, H, W) fp32 on the device."""
        assert self.folder is not None, "prepare comes first"
        latents = [self.folder.load(image) for image in images]
        like = torch.empty(0, *self.worker.sampler.shape) if not latents else torch.stack(latents)
        return like.to(self.worker.models.device)

    def _groups(self, some: list[JudgedGroup], size: int, number: int) -> Groups:
        """Groups of `size` pictures, of which this process loads its share."""
        share = shares(len(some), size, self.processes.count)[self.processes.rank]
        images = [image for group in some for image in group.images][share.start : share.stop]
        prompts = [some[position // size].prompt for position in range(share.start, share.stop)]
        with self.worker.phases("load"):
            x0 = self.latents(images)
        with self.worker.phases("encode"):
            text = self.worker.texts(prompts)
        rewards = np.array([group.scores for group in some], np.float32)
        scores = GroupScores(rewards, {}, np.ones(len(some), bool), [], np.zeros(rewards.shape, np.uint8))
        advantage = torch.from_numpy(rewards.reshape(-1)) if self.single_images else None
        return Groups([group.prompt for group in some], text, x0, scores, share, advantage=advantage, number=number)

    def _encode(
        self, folder: LatentFolder, pictures: Mapping[Path, str], console: Console, should_stop: Callable[[], bool]
    ) -> None:
        """Encodes `pictures`, by their paths with the lines that name them."""
        vae = _in_fp32(self.worker.sampler.pipeline.vae)
        with console.track(f"preferences: encoding {counted(len(pictures), 'picture')}") as on_step:
            for done, (image, origin) in enumerate(pictures.items(), 1):
                if should_stop():
                    return
                pixels = torch.from_numpy(read_picture(image, origin)).to(self.worker.models.device)
                folder.save(image, encode_picture(vae, pixels))
                on_step(done / len(pictures))


@torch.no_grad()
def encode_picture(vae: nn.Module, picture: Tensor) -> Tensor:
    """The most likely latent (C, H, W), fp32, of a uint8 picture (height, width, 3).

    One at a time: in a batch, the last bits would depend on the pictures beside it.
    """
    pixels = picture.permute(2, 0, 1)[None].float() / 127.5 - 1
    return family_of(vae).encode_pixels(vae, pixels)[0]


def _in_fp32(vae: nn.Module) -> nn.Module:
    """`vae`, or a copy of it that computes in fp32: its encoders overflow in half precision."""
    if all(weight.dtype == torch.float32 for weight in vae.parameters()):
        return vae
    return nn.Module.to(copy.deepcopy(vae), torch.float32)


def _single(group: JudgedGroup) -> list[JudgedGroup]:
    """Each picture as a group of its own; one that is liked as often as disliked says nothing."""
    signs = np.sign(group.scores)
    return [
        replace(group, images=(image,), scores=(float(sign),))
        for image, sign in zip(group.images, signs, strict=True)
        if sign
    ]


def _require_usable(groups: Sequence[JudgedGroup], objective: str, *, single_images: bool) -> None:
    for group in groups:
        origin = group.prompt.origin
        if single_images and group.kind in ("rating", "rank"):
            raise UserError(
                f"{origin}: a {group.kind}, and {objective} learns from likes and pairs: use --objective dgpo"
            )
        if not single_images and len(group.images) == 1:
            other = ", or use --objective kto" if group.kind == "like" else ""
            raise UserError(
                f"{origin}: the only {group.kind} of its prompt, and {objective} compares pictures of one prompt: "
                f"judge another picture of it, or remove the line{other}"
            )


def _require_choice(groups: Sequence[JudgedGroup], config: Config, *, single_images: bool) -> None:
    """Raises UserError if no preference is in what there is to train on."""
    where = config.data.preferences
    if single_images:
        sides = {group.scores[0] for group in groups}
        if len(sides) < 2:
            missing = "liked" if sides == {-1.0} else "disliked"
            raise UserError(
                f"{where}: no picture is {missing}, and {config.objective} needs both sides: judge some more"
            )
    elif not any(len(set(group.scores)) > 1 for group in groups):
        raise UserError(f"{where}: all pictures of a prompt are judged alike: nothing can be learned; judge some more")
