"""What runs inside Flow-Factory's process: the small pipeline, a cheap reward and a clock, given to it by import path.

Nothing of its trainer is changed, except that it computes in fp32, as ours does on a CPU: its autocast is bf16
whatever `mixed_precision` says.
"""

import json
import os
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dgpo_kernels.reference import SampleLosses, group_scores, loss_from_scores
from diffusers import StableDiffusion3Pipeline

from flow_factory.models.stable_diffusion.sd3_5 import SD3_5Adapter
from flow_factory.rewards.abc import PointwiseRewardModel, RewardModelOutput
from flow_factory.trainers.dgpo import DGPOTrainer
from flow_factory.trainers.registry import register_trainer

TIMES = "FLOW_FACTORY_TIMES"
"""Environment variable: the file to which the seconds at each iteration's end go."""
GRADIENT = "FLOW_FACTORY_GRADIENT"
"""Environment variable: the file to which the difference of the second iteration's gradient from ours goes. Unset: not
compared. The first one has no gradient for one of LoRA's factors."""


class Adapter(SD3_5Adapter):
    """Stable Diffusion 3 without T5."""

    def load_pipeline(self) -> StableDiffusion3Pipeline:
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            self.model_args.model_name_or_path, text_encoder_3=None, tokenizer_3=None, low_cpu_mem_usage=False
        )
        pipeline.encode_prompt = partial(pipeline.encode_prompt, max_sequence_length=0)
        return pipeline

    @property
    def text_encoder_names(self) -> list[str]:
        return ["text_encoder", "text_encoder_2"]

    @property
    def tokenizer(self) -> Any:
        return self.pipeline.tokenizer


@register_trainer("dgpo")
class Trainer(DGPOTrainer):
    """Its DGPO, in fp32 and with a clock at the end of every iteration."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.autocast = nullcontext
        self._calls: list[dict[str, Any]] = []
        self._mark()

    def optimize(self, samples: list) -> None:
        super().optimize(samples)
        self._mark()

    def _build_noised_inputs(self, p: Any, t_idx: int) -> Any:
        noised = super()._build_noised_inputs(p, t_idx)
        if GRADIENT in os.environ and self.step == 1:
            groups = p["group_info"]["local_group_indices"]
            self._calls.append({"batch": p["batch"], "advantage": p["adv"], "groups": groups, **noised})
        return noised

    def _forward_velocities(self, *inputs: Any) -> Any:
        velocities = super()._forward_velocities(*inputs)
        if self._calls:
            self._calls[-1] |= {name: velocities[name] for name in ("old_v", "ref_v")}
        return velocities

    def _finalize_step(self, loss_info: Any) -> Any:
        if self._calls:
            difference = self._difference_from_ours()
            Path(os.environ[GRADIENT]).write_text(json.dumps(difference), encoding="utf-8")
            self._calls.clear()
        return super()._finalize_step(loss_info)

    def _difference_from_ours(self) -> dict[str, float]:
        """Relative difference and cosine between the accumulated gradient and that of our loss, written out over the
        same noised latents."""
        parameters = self.adapter.get_trainable_parameters()
        total = [torch.zeros_like(one) for one in parameters]
        with torch.enable_grad():
            for call in self._calls:
                loss = self._our_loss(call) / len(self._calls)
                for sum_, one in zip(total, torch.autograd.grad(loss, parameters), strict=True):
                    sum_ += one
        theirs = torch.cat([one.grad.flatten() for one in parameters]).double()
        ours = torch.cat([one.flatten() for one in total]).double()
        return {
            "relative": float((theirs - ours).norm() / ours.norm()),
            "cosine": float(torch.dot(theirs, ours) / theirs.norm() / ours.norm()),
            "weights": len(ours),
            "calls": len(self._calls),
        }

    def _our_loss(self, call: dict[str, Any]) -> torch.Tensor:
        velocity = self._compute_dgpo_output(call["batch"], call["t_flat"], call["noised"], guidance_scale=1.0)

        def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return (one - other).square().flatten(1).mean(1)

        losses = SampleLosses(
            policy=distance(velocity, call["target_v"]),
            ref=distance(call["ref_v"], call["target_v"]),
            old=distance(call["old_v"], call["target_v"]),
            kl=distance(velocity, call["ref_v"]),
        )
        score = group_scores(losses, call["advantage"], call["groups"], self.dpo_beta, None)
        clip = self.training_args.clip_range
        clip = max(map(abs, clip)) if isinstance(clip, tuple | list) else clip
        return loss_from_scores(
            losses, score, call["advantage"], call["groups"], self.dpo_beta, clip, self.kl_beta, None, None
        )[0]

    def _mark(self) -> None:
        with Path(os.environ[TIMES]).open("a", encoding="utf-8") as file:
            print(json.dumps({"s": time.perf_counter(), "cpu_s": time.process_time()}), file=file)


class Brightness(PointwiseRewardModel):
    """Mean of the pixels, as `benchmarks.baselines:Brightness`."""

    use_tensor_inputs = True

    @torch.no_grad()
    def __call__(self, prompt: list[str], image: list[torch.Tensor], **others: Any) -> RewardModelOutput:
        return RewardModelOutput(rewards=torch.stack([one.float().mean() for one in image]))
