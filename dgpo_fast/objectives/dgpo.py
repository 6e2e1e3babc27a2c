"""Direct Group Preference Optimization (arXiv 2510.08425).

For each of M timesteps, every group shares one noise: x_t = (1 − σ)·x0 + σ·ε, target velocity ε − x0. With d the mean
squared error of a prediction, a group's score is s = (β/G) Σ A·(d_policy − d_reference), and the loss is the mean of
softplus(s)/β plus the KL term. All micro-batches and timesteps add up to one gradient.
"""

from collections.abc import Sequence

from dgpo_kernels import group_noise
from torch import Tensor

from dgpo_fast.config import Config
from dgpo_fast.groups import draw_training_steps, stream_seed
from dgpo_fast.objectives import Batch, add_metrics
from dgpo_fast.objectives.group_loss import Comparison, GroupLoss
from dgpo_fast.policy import PolicyModels, Weights
from dgpo_fast.rollout import guided, predict_batched, predict_pair_batched


class DGPOObjective:
    """The objective of one run; see the module's text for the loss."""

    needs_transitions = False

    def __init__(self, config: Config):
        self.config = config.dgpo
        self.forward_batch = config.rollout.batch_size
        self.seed = config.seed
        self.noise_seed = stream_seed(config.seed, "training noise")
        self.loss = GroupLoss(
            beta=self.config.beta,
            micro_batch=config.policy.micro_batch_size,
            forward_batch=self.forward_batch,
            clip_range=self.config.clip_range,
            kl_weight=self.config.kl_weight,
        )

    def optimizer_batches(self, batch: Batch) -> Sequence[Batch]:
        """One step an iteration: θ and θ_old are constant inside it."""
        return [batch]

    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, Tensor]:
        """See `Objective.accumulate`. The metrics are means over samples and timesteps."""
        if self._needs_old:
            models.load_behaviour(old)
        steps = self._training_steps(batch)
        totals: dict[str, Tensor] = {}
        for slot, step in enumerate(steps):
            comparison = self._compare(batch, models, step, draw=batch.iteration * len(steps) + slot)
            metrics = self.loss.backward(comparison, models, weight=1 / len(steps))
            add_metrics(totals, metrics, 1 / len(steps))
        return totals

    @property
    def _needs_old(self) -> bool:
        return self.config.clip_range is not None or self.config.reference == "ema"

    def _training_steps(self, batch: Batch) -> list[int]:
        among = min(self.config.high_noise_steps or batch.schedule.steps, batch.schedule.steps)
        return draw_training_steps(batch.iteration, count=self.config.timesteps, among=among, seed=self.seed)

    def _compare(self, batch: Batch, models: PolicyModels, step: int, draw: int) -> Comparison:
        """Noise at grid step `step`, and what base and behaviour predict there for the whole batch."""
        timestep, sigma = batch.schedule.timesteps[step], batch.schedule.sigmas[step]
        x_t = group_noise(batch.x0, sigma, batch.group_index, seed=self.noise_seed, draw=draw)
        inputs = (x_t, timestep, batch.text)
        ref_v, old_v, kl_v = None, None, None
        if self.config.kl_guidance_scale > 1 and self.config.kl_weight > 0:
            ref_v, empty_v = predict_pair_batched(models.base, *inputs, batch.empty, self.forward_batch, batch.most)
            kl_v = guided(ref_v, empty_v, self.config.kl_guidance_scale)
        elif self.config.reference == "frozen" or self.config.kl_weight > 0:
            ref_v = predict_batched(models.base, *inputs, self.forward_batch, batch.most)
            kl_v = ref_v if self.config.kl_weight > 0 else None
        if self._needs_old:
            old_v = predict_batched(models.behaviour, *inputs, self.forward_batch, batch.most)
        reference = old_v if self.config.reference == "ema" else ref_v
        assert reference is not None
        return Comparison(
            x0=batch.x0,
            x_t=x_t,
            timestep=timestep,
            text=batch.text,
            advantage=batch.advantage,
            group_index=batch.group_index,
            group_size=batch.group_size,
            ref_v=reference,
            old_v=old_v if self.config.clip_range is not None else None,
            kl_v=kl_v,
            seed=self.noise_seed,
            draw=draw,
            part=batch.part,
        )
