"""The baselines of `throughput.py` that keep bf16 weights: B, C and C′ (`baselines.py` says what each is)."""

import copy
from collections.abc import Mapping, Sequence

import torch
from diffusers import SD3Transformer2DModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from benchmarks.baselines import Baseline, ReferenceStyle, Text
from dgpo_fast.models.policy import ADAPTER

RECOMPILE_LIMIT = 64


class Eager(Baseline):
    """B."""

    def make_models(self, base: Mapping[str, Tensor]) -> None:
        self.policy = self._trained(base, self.dtype)
        self.old_model = self.make_old(base)
        self.ref = self._transformer(base, self.dtype, own=False)
        self.vae = copy.deepcopy(self.pipeline.vae)

    def make_old(self, base: Mapping[str, Tensor]) -> SD3Transformer2DModel:
        """What predicts with θ_old."""
        return self._trained(base, self.dtype).requires_grad_(False)

    def make_optimizer(self) -> None:
        self.masters = [weight.detach().float().clone() for weight in self.weights.values()]
        self.sums = [torch.zeros_like(master) for master in self.masters]
        self.optimizer = self._adamw(self.masters, fused=self.device.type == "cuda")
        self.old_masters = [master.clone() for master in self.masters]
        self.set_old(self.weights)

    @torch.no_grad()
    def set_old(self, old: Mapping[str, Tensor]) -> None:
        for master, name in zip(self.old_masters, self.weights, strict=True):
            master.copy_(old[name])
        self.masters_changed()

    @torch.no_grad()
    def masters_changed(self) -> None:
        """Writes the masters, those of θ_old too, into the weights that compute."""
        torch._foreach_copy_(list(self.weights.values()), self.masters)
        own = dict(self.old_model.named_parameters())
        torch._foreach_copy_([own[name] for name in self.weights], self.old_masters)

    def encode(self, prompts: Sequence[str]) -> Text:
        distinct = list(dict.fromkeys(prompts))
        with torch.no_grad():
            text = self._encode(distinct)
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.device)
        return Text(text.prompt[rows], text.pooled[rows])

    def reference(self, x_t: Tensor, timestep: Tensor, text: Text, empty: Text) -> tuple[Tensor, Tensor]:
        return self._reference_by(self.ref, x_t, timestep, text, empty)

    def old(self, x_t: Tensor, timestep: Tensor, text: Text) -> Tensor:
        return self.velocity(self.old_model, x_t, timestep, text)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for total, weight in zip(self.sums, self.weights.values(), strict=True):
            # The last block drops its text tokens: what comes after them has no gradient.
            if weight.grad is not None:
                total.add_(weight.grad)
                weight.grad = None

    def gradient(self) -> Mapping[str, Tensor]:
        return dict(zip(self.weights, self.sums, strict=True))

    def clear_gradient(self) -> None:
        torch._foreach_zero_(self.sums)

    @torch.no_grad()
    def update(self) -> None:
        for master, total in zip(self.masters, self.sums, strict=True):
            master.grad = total
        torch.nn.utils.clip_grad_norm_(self.masters, self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.clear_gradient()
        torch._foreach_lerp_(self.old_masters, self.masters, 1 - self._decay())
        self.masters_changed()


class Compiled(Eager):
    """C. Block by block, which runs as fast as a whole compiled transformer, and is there in seconds."""

    def make_models(self, base: Mapping[str, Tensor]) -> None:
        super().make_models(base)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        for transformer in dict.fromkeys((self.policy, self.drawing, self.old_model, self.ref)):
            for block in transformer.transformer_blocks:
                block.compile(fullgraph=True, dynamic=False)
        self.vae.decoder.compile(fullgraph=True, dynamic=False)


class CompiledMerged(Compiled):
    """C′. Two copies, so that each is merged once an iteration."""

    merged: SD3Transformer2DModel

    @property
    def drawing(self) -> SD3Transformer2DModel:
        return self.merged

    def make_models(self, base: Mapping[str, Tensor]) -> None:
        if self.config.policy.train == "full":
            raise ValueError("fully fine-tuned there is nothing to merge: C′ is C")
        self.merged = self._transformer(base, self.dtype, own=True)
        super().make_models(base)

    def make_old(self, base: Mapping[str, Tensor]) -> SD3Transformer2DModel:
        return self._transformer(base, self.dtype, own=True)

    @torch.no_grad()
    def masters_changed(self) -> None:
        torch._foreach_copy_(list(self.weights.values()), self.masters)
        for copied, masters in ((self.merged, self.masters), (self.old_model, self.old_masters)):
            self._merge(copied, dict(zip(self.weights, masters, strict=True)))

    def _merge(self, copied: SD3Transformer2DModel, factors: Mapping[str, Tensor]) -> None:
        """W + s·B·A into `copied`, added in fp32."""
        for name, layer in self.policy.named_modules():
            if isinstance(layer, LoraLayer):
                down, up = (factors[f"{name}.lora_{factor}.{ADAPTER}.weight"] for factor in "AB")
                base = layer.base_layer.weight.to(torch.promote_types(self.dtype, torch.float32))
                update = torch.addmm(base, up, down, alpha=layer.scaling[ADAPTER])
                copied.get_submodule(name).weight.copy_(update)


BASELINES: dict[str, type[Baseline]] = {"A": ReferenceStyle, "B": Eager, "C": Compiled, "C′": CompiledMerged}
LORA_ONLY = "C′"
"""Fully fine-tuned, it is C."""
