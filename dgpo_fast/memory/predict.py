"""Predicts the memory of a run from its settings and its model's configuration, before anything is allocated.

Predictions are bytes of tensors on the run's device. They exclude workspaces inside operations, the allocator's
rounding, the CUDA context, and reward models.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from diffusers import ModelMixin
from torch import nn

from dgpo_fast.config.options import Config
from dgpo_fast.distributed.placement import largest_share, place
from dgpo_fast.engine.batches import decode_batch, frozen_samples, shown_at_once
from dgpo_fast.engine.decoder import has_own_decoder
from dgpo_fast.engine.fp8 import quantised
from dgpo_fast.learning.optimizers import CHUNK_NUMEL, state_bytes
from dgpo_fast.memory.simulate import Simulation, Trained, simulation
from dgpo_fast.models.device_rows import KEPT_BYTES
from dgpo_fast.models.family import Family, Guidance
from dgpo_fast.models.latents import latent_shape
from dgpo_fast.models.meta import SampleShape, sample_shape
from dgpo_fast.models.own_settings import in_plain_numbers
from dgpo_fast.models.policy import adapted_layers, is_merged, lora_targets, weight_storage
from dgpo_fast.models.quantised import SAME, block_starts, linear_layers, packed_bytes
from dgpo_fast.objectives.first_level import is_shared
from dgpo_fast.objectives.registry import traits

FP32 = 4
SOLVER_STATES = 4
"""fp32 latents of a batch that a solver's step holds at once."""
COMPARED = 3
"""Velocities that a sample's is compared with at one noise level, at most."""
LOSS_TENSORS = 8
"""fp32 latents of a micro-batch that the eager loss holds at once."""
WHOLE = ("decoder", "decoder's copy")
"""Of what is held beside sharded weights."""
WHOLE_BLOCKS = 2
"""Of sharded transformers: the block that computes, and the next one, which is on its way."""


@dataclass(frozen=True)
class Prediction:
    """Predicted bytes of tensors.

    Attributes:
        held: by kind, during all of training.
        phases: the most in each phase of an iteration, in addition to what is held.
    """

    held: Mapping[str, int]
    phases: Mapping[str, int]

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        return self.at(self.peak_phase)

    def at(self, phase: str) -> int:
        """Most bytes at once in `phase`."""
        return sum(self.held.values()) + self.phases[phase]

    def line(self) -> str:
        """One line for a person, largest first."""
        largest = sorted(self.held.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{name} {readable(nbytes)}" for name, nbytes in largest if nbytes >= 0.005 * self.peak)
        return (
            f"predicted memory {readable(self.peak)} at its peak, in {self.peak_phase}: "
            f"{self.peak_phase} {readable(self.phases[self.peak_phase])}, {parts}"
        )


def readable(nbytes: float) -> str:
    """`3.2 GiB`, `410 MiB`, `7.5 MiB`."""
    mib = nbytes / 2**20
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


class Predictor:
    """Predicts the memory of runs on one model.

    Args:
        family: of the model.
        dtype: of the run.
        processes: that share the run.
        local_processes: those of them on this machine.
        on_gpu: whether the run's device is a GPU, so that CPU memory does not count.
        graphs: whether rollouts are recorded there if the settings leave it open.
    """

    def __init__(
        self,
        family: Family,
        dtype: torch.dtype,
        *,
        processes: int = 1,
        local_processes: int = 1,
        on_gpu: bool = True,
        graphs: bool = True,
    ):
        self.family, self.dtype, self.processes, self.on_gpu = family, dtype, processes, on_gpu
        self.local_processes, self.graphs = local_processes, on_gpu and graphs
        self.shapes: dict[tuple, SampleShape] = {}
        with torch.device("meta"):
            self.transformer, self.vae = family.build_transformer(), family.build_vae()

    def on_a_gpu(self, *, graphs: bool) -> "Predictor":
        """The same for a GPU."""
        other = copy.copy(self)
        other.on_gpu, other.graphs = True, graphs
        return other

    def predict(self, config: Config, micro_batch: int) -> Prediction:
        """The memory of `config` with micro-batches of `micro_batch` samples."""
        config = in_plain_numbers(config, self.family)
        return Prediction(self._held(config), self._phases(config, micro_batch))

    def _held(self, config: Config) -> dict[str, int]:
        policy, storage = config.policy, self._storage(config)
        trained = trained_sizes(self.transformer, config)
        total, width = sum(trained), FP32 if storage == "fp32" else 2
        lora = policy.train == "lora"
        base = _bytes(self.transformer, self.dtype) - self._saved_by_rounding(config)
        copy = total * self.dtype.itemsize if lora and policy.behaviour == "adapter" else self._copy_bytes
        held = {
            "base weights": base,
            "behaviour weights": copy,
            "trained weights": total * width,
            "gradients": total * FP32,
            "optimizer states": sum(state_bytes(numel, config.optimizer.name) for numel in trained),
            "averages": total * FP32 * self._averages(config),
            "decoder": _bytes(self.vae, self.dtype),
        }
        if self._merged(config):
            # The merged weights, and the factors times alpha / rank.
            adapted = sum(layer.weight.numel() for layer in _adapted(self.transformer, config))
            held["merged policy weights"] = (adapted + total) * self.dtype.itemsize
        if config.engine.decoder != "plain" and has_own_decoder(self.vae):
            held["decoder's copy"] = _bytes(self.vae.decoder, self.dtype)
        if config.engine.rollout_precision == "fp8":
            layers = ((name, layer) for name, layer in self.transformer.named_modules() if isinstance(layer, nn.Linear))
            held["float8 copy"] = sum(
                layer.weight.numel() for name, layer in layers if quantised(self.family, name, layer)
            )
        if self._recorded(config):
            held["recorded rollouts"] = self._rollout_forward(config)
        if storage == "bf16_master":
            held["optimizer states"] += 2 * total
        return held if self._shards(config) == 1 else self._shared_out(held, self._shards(config))

    def _saved_by_rounding(self, config: Config) -> int:
        """What a quantised base takes less."""
        precision = config.policy.base_precision
        if precision == SAME:
            return 0
        layers = linear_layers(self.transformer, block_starts(self.transformer))
        return sum(layer.weight.numel() * self.dtype.itemsize - packed_bytes(layer, precision) for _, layer in layers)

    def _widened(self, config: Config) -> int:
        """The weight that a backward pass through a quantised base has widened, at most."""
        if config.policy.base_precision == SAME:
            return 0
        layers = linear_layers(self.transformer, block_starts(self.transformer))
        return max(layer.weight.numel() for _, layer in layers) * self.dtype.itemsize

    def _averages(self, config: Config) -> int:
        """Moving averages that are kept on the device."""
        apart = config.ema.rollout_decay_per_step is not None
        return 1 + apart + (not (config.ema.offload and self.on_gpu))

    def _shared_out(self, held: dict[str, int], shards: int) -> dict[str, int]:
        """What one of `shards` holds. Buffers and the decoder are not sharded."""
        buffers = sum(buffer.numel() for buffer in self.transformer.buffers()) * self.dtype.itemsize
        return {
            **{name: nbytes if name in WHOLE else nbytes // shards for name, nbytes in held.items()},
            "base weights": self._copy_bytes // shards + buffers,
            "blocks made whole": WHOLE_BLOCKS * max(map(_numel, self._blocks)) * self.dtype.itemsize,
        }

    def _shards(self, config: Config) -> int:
        """The number of shards of the weights and of everything that belongs to them."""
        return {"none": 1, "full": self.processes, "hybrid": self.local_processes}[config.distributed.shard]

    def _recorded(self, config: Config) -> bool:
        """Whether rollouts are CUDA graphs, which keep what a forward takes."""
        wanted = self.graphs if config.engine.cuda_graphs == "auto" else config.engine.cuda_graphs == "on"
        return wanted and self._shards(config) == 1

    def _rollout_forward(self, config: Config) -> int:
        return self._drawing(config, min(config.rollout.batch_size, self.local_samples(config)))

    def _drawing(self, config: Config, batch: int) -> int:
        """A forward of the behaviour weights for `batch` images."""
        adapter = config.policy.train == "lora" and config.policy.behaviour == "adapter"
        rows = batch * Guidance(config.rollout.guidance_scale).forwards
        return self._simulation(config).forward(rows, policy=adapter)

    def _storage(self, config: Config) -> str:
        return weight_storage(config.policy, self.dtype, sharded=self._shards(config) > 1)

    def _merged(self, config: Config) -> bool:
        return is_merged(config.policy, self.on_gpu)

    @property
    def _blocks(self) -> list[nn.Module]:
        """What FSDP makes whole at a time: the blocks, and what lies outside of them."""
        rest = nn.ModuleList(child for child in self.transformer.children() if not isinstance(child, nn.ModuleList))
        return [*self.family.blocks(self.transformer), rest]

    @property
    def _copy_bytes(self) -> int:
        return _numel(self.transformer) * self.dtype.itemsize

    def _phases(self, config: Config, micro_batch: int) -> dict[str, int]:
        rollout, shape, simulated = config.rollout, self.shape(config), self._simulation(config)
        samples = self.local_samples(config)
        objective, batch = traits(config), min(rollout.batch_size, samples)
        groups = min(self._groups(config), -(-rollout.groups // objective.optimizer_steps))
        learnt = min(samples, groups * config.kept_images)
        micro_batch = min(micro_batch, learnt)
        latent = prod(shape.latent)
        drawn = self._texts(config) + samples * latent * FP32
        forwards = Guidance(rollout.guidance_scale).forwards
        at_once = frozen_samples(config, learnt)
        frozen = simulated.forward(at_once * (2 if objective.guided_base else 1))
        if objective.frozen_policy:
            frozen = max(frozen, simulated.forward(at_once, policy=True))
        # A batch's own text, beside it that of its guided pairs, and the solver's states.
        solving = batch * ((forwards + (forwards > 1)) * self._text_row(config) + SOLVER_STATES * latent * FP32)
        return {
            "rollout": drawn + solving + (0 if self._recorded(config) else self._rollout_forward(config)),
            "decoding": drawn + simulated.decoding(min(decode_batch(config, shape.latent), batch)),
            "reference forwards": self._inputs(config) + frozen,
            "training": self._inputs(config)
            + self._widened(config)
            + max(
                simulated.training(rows).peak + of_samples * latent * LOSS_TENSORS * FP32
                for rows, of_samples in self._micro_batches(config, micro_batch)
            ),
            "optimizer": self._stepping(config),
            **self._evaluation(config),
        }

    def _evaluation(self, config: Config) -> dict[str, int]:
        """The phase of evaluations, if they draw images of another size than rollouts."""
        rollout, evaluation = config.rollout, config.evaluation
        if rollout.resolution == evaluation.resolution:
            return {}
        batch = shown_at_once(config, self.processes)
        of_them = replace(
            rollout, resolution=evaluation.resolution, guidance_scale=evaluation.guidance_scale, batch_size=batch
        )
        shown = replace(config, rollout=of_them)
        pictures = min(decode_batch(of, self.shape(of).latent) for of in (config, shown))
        forward, decoding = self._drawing(shown, batch), self._simulation(shown).decoding(min(pictures, batch))
        states = batch * SOLVER_STATES * prod(self.shape(shown).latent) * FP32
        return {"evaluation": self._texts(config) + states + max(forward, decoding)}

    def inputs(self, config: Config) -> int:
        """What training holds of an iteration's samples: text, latents and what the policy is compared with."""
        return self._inputs(in_plain_numbers(config, self.family))

    def _inputs(self, config: Config) -> int:
        objective, latent, samples = traits(config), prod(self.shape(config).latent), self.local_samples(config)
        batch = frozen_samples(config, samples)
        states = config.rollout.num_inference_steps + 1 if objective.needs_transitions else 1 + objective.levels_at_once
        # Predictions are there for one level, and for the batch that goes on from it into the next one.
        compared = COMPARED * (samples + batch) * latent * self.dtype.itemsize
        return self._texts(config) + samples * states * latent * FP32 + compared

    def _micro_batches(self, config: Config, micro_batch: int) -> list[tuple[int, int]]:
        """Rows of the policy's forward and backward, and samples of the loss: they differ if a group shares a row."""
        objective, groups = traits(config), min(micro_batch, self._groups(config))
        shared = is_shared(config.engine.share_first_level, objective.shared_sigma, self.dtype)
        sampled = (micro_batch * (2 if objective.guided_policy else 1), micro_batch)
        return [sampled, (groups, groups * config.kept_images)] if shared else [sampled]

    def _stepping(self, config: Config) -> int:
        sizes = trained_sizes(self.transformer, config)
        if self._storage(config) == "fp32":
            return 3 * max(sizes) * FP32
        return min(sum(sizes), CHUNK_NUMEL + max(sizes)) * FP32 + 3 * max(sizes) * FP32

    def _simulation(self, config: Config) -> Simulation:
        policy = config.policy
        trained = Trained(
            storage=self._storage(config),
            lora=(policy.lora_rank, policy.lora_targets) if policy.train == "lora" else None,
            checkpointing=config.engine.checkpointing,
            merged=self._merged(config),
            base_precision=policy.base_precision,
        )
        return simulation(self.family, trained, self.dtype, self.shape(config))

    def local_samples(self, config: Config) -> int:
        """Samples of an iteration on the process that has most."""
        return largest_share(config.rollout.groups, config.rollout.group_size, self.processes)

    def shape(self, config: Config) -> SampleShape:
        """What one sample is made of."""
        rollout = config.rollout
        latent, length = latent_shape(self.family, rollout.resolution), rollout.max_sequence_length
        embedded = self.family.guidance(rollout.guidance_scale).embedded is not None
        key = (latent, length, embedded)
        if key not in self.shapes:
            self.shapes[key] = sample_shape(self.family, latent, length, embedded=embedded)
        return self.shapes[key]

    def _texts(self, config: Config) -> int:
        """Of the encoded prompts of an iteration on the process that has most of them, and of those that stay."""
        row, trained = self._text_row(config), config.iterations * config.rollout.groups
        most = trained + config.evaluation.images + 1  # all different, and an empty negative prompt
        return max(self._groups(config) * row, min(most * row, KEPT_BYTES))

    def _groups(self, config: Config) -> int:
        """Groups of an iteration, whole or in part, on the process that has most of them."""
        shares = place(config.rollout.groups, config.rollout.group_size, self.processes)
        return max(len(share.parts) for share in shares)

    def _text_row(self, config: Config) -> int:
        return self.shape(config).text_bytes(self.dtype)


def trained_sizes(transformer: ModelMixin, config: Config) -> list[int]:
    """Elements of each trained tensor.

    Args:
        transformer: on the meta device; stays as it is.
        config: says what is trained.
    """
    if config.policy.train == "full":
        return [parameter.numel() for parameter in transformer.parameters()]
    return [
        config.policy.lora_rank * width
        for layer in _adapted(transformer, config)
        for width in (layer.in_features, layer.out_features)
    ]


def _adapted(transformer: ModelMixin, config: Config) -> list[nn.Linear]:
    """The layers of `transformer` that get a LoRA."""
    return adapted_layers(transformer, lora_targets(transformer, config.policy))


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(tensor.numel() for tensor in [*module.parameters(), *module.buffers()]) * dtype.itemsize
