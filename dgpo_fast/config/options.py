"""Every setting of a run: what it means, its unit, its bounds. A `Config` is checked when it is made."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Guidance = Annotated[float, Field(ge=1, allow_inf_nan=False)]
STRICT = ConfigDict(extra="forbid")


def _as_list_of_rewards(given: Any) -> Any:
    """A single reward stands for a list of one; what YAML makes of other forms is refused with the right one."""
    rewards = [given] if isinstance(given, str) else given
    if not rewards or not isinstance(rewards, list | tuple) or not all(isinstance(one, str) for one in rewards):
        raise ValueError("write rewards: [jpeg=0.1, red=my_rewards:Name]")
    return rewards


Rewards = Annotated[tuple[str, ...], BeforeValidator(_as_list_of_rewards)]
"""Rewards by name, import path, file or address, with their weights."""


@dataclass(kw_only=True, config=STRICT)
class Rollout:
    """How a group of images is drawn: a few-step ODE from the behaviour weights, or an SDE in its place."""

    group_size: Annotated[int, Field(ge=2)] = 16
    """G: images per prompt. The advantage compares these with one another."""
    groups: Count = 8
    """P: prompts per iteration."""
    solver: Literal["dpmpp_2m", "euler"] = "dpmpp_2m"
    """ODE solver on flow sigmas: DPM-Solver++(2M) or Euler."""
    noise_level: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Noise added at every step, with the `euler` solver (Flow-GRPO: 0.7). 0: the deterministic ODE."""
    num_inference_steps: Count = 10
    """Solver steps per image."""
    guidance_scale: Guidance = 4.5
    """Classifier-free guidance. 1 is unguided and costs half."""
    shift: Annotated[float, Field(gt=0, le=100)] = 3.0
    """Timestep shift of the sigma grid: s·t / (1 + (s − 1)·t)."""
    resolution: Annotated[int, Field(ge=16)] | None = None
    """Height and width in pixels. Default: what the model was trained at."""
    max_sequence_length: Annotated[int, Field(ge=0)] = 128
    """Tokens of the T5 prompt encoder. 0 leaves its slots out, for a pipeline without one."""
    batch_size: Count = 32
    """Images per forward of the rollout and of the decoder. Speed and memory only; the images stay the same."""


@dataclass(kw_only=True, config=STRICT)
class Data:
    """Where the groups that are trained on come from."""

    source: Literal["online", "offline"] = "online"
    """online: the behaviour weights draw them in every iteration. offline: the reference model draws them once."""
    offline_groups: Count = 1024
    """How many groups an offline run draws; training goes through them again and again."""
    folder: str | None = None
    """Where offline groups are, or are drawn to; other runs may use them. Default: a folder in the run's own."""


@dataclass(kw_only=True, config=STRICT)
class Advantage:
    """How rewards become advantages (they sum to zero within each group)."""

    std: Literal["group", "global"] = "group"
    """Divide by the standard deviation of the group, or of the whole iteration."""
    clamp: Positive = 5.0
    """Bound on the absolute advantage."""


@dataclass(kw_only=True, config=STRICT)
class DGPO:
    """The DGPO objective."""

    beta: Positive = 100.0
    """β, the strength of the preference: large values saturate groups that are already well separated."""
    kl_weight: NonNegative = 0.02
    """Weight of the squared distance between policy and frozen reference velocities."""
    kl_guidance_scale: Guidance = 1.0
    """Guidance on the reference of the KL term (`kl_cfg`); above 1 it distils guidance into the policy."""
    clip_range: Positive | None = 0.01
    """PPO-like clip on exp(d_old − d_policy). None switches it off, and the old forward with it."""
    timesteps: Count = 4
    """M: training timesteps per iteration, drawn without replacement from the rollout's own grid."""
    high_noise_steps: Count | None = 5
    """Timestep clip: train on the first so many (noisiest) steps of the rollout's grid. None: on all of them."""
    reference: Literal["frozen", "ema"] = "frozen"
    """Reference in the group score: the frozen base model, or θ_old (the fast EMA)."""


@dataclass(kw_only=True, config=STRICT)
class DiffusionDPO:
    """The Diffusion-DPO objective: the best and the worst image of each group as a pair."""

    beta: Positive = 100.0
    """β, how far the policy may leave the reference: large values saturate pairs that are already well separated."""
    timesteps: Count = 4
    """Noise levels per pair and iteration."""
    logit_mean: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Mean of logit(σ), which is normal."""
    logit_std: Positive = 1.0
    """Standard deviation of logit(σ)."""


@dataclass(kw_only=True, config=STRICT)
class FlowGRPO:
    """The Flow-GRPO objective: a policy gradient over the steps of a rollout with noise."""

    clip_range: Positive = 1e-4
    """PPO clip on each step's ratio, whose log-probabilities are means over the latent's elements."""
    kl_weight: NonNegative = 0.04
    """Weight of the divergence between the steps of policy and reference."""
    optimizer_steps: Count = 2
    """Optimizer steps per iteration; its groups are split evenly over them."""


@dataclass(kw_only=True, config=STRICT)
class Policy:
    """What is trained."""

    train: Literal["lora", "full"] = "lora"
    """LoRA adapters through PEFT, or all weights of the transformer."""
    weights: Literal["auto", "fp32", "bf16_master", "bf16_stochastic"] = "auto"
    """How trained weights are kept: fp32, cast at each forward of a bf16 run; bf16 with the lower half of an fp32
    master beside it (4 bytes a weight); bf16 rounded stochastically (2 bytes). auto: bf16_master in a bf16 run."""
    behaviour: Literal["merged", "adapter"] = "merged"
    """With LoRA, what draws the rollouts: a merged copy of the model, or the model itself with a second adapter, which
    saves the copy and makes each forward slower by the adapter's share."""
    lora_rank: Count = 64
    """Rank of the adapters."""
    lora_alpha: Positive = 128.0
    """The adapters are scaled by alpha / rank."""
    lora_targets: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    """Linear layers that get an adapter, by the end of their name."""
    micro_batch: Count | Literal["auto"] = 16
    """Images per training forward and backward. Any size gives the same gradient. auto: the largest that fits."""

    @property
    def micro_batch_size(self) -> int:
        """`micro_batch`, after "auto" has become a number."""
        if self.micro_batch == "auto":
            raise ValueError("policy.micro_batch is still to be chosen")
        return self.micro_batch


@dataclass(kw_only=True, config=STRICT)
class Optimizer:
    """AdamW."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """States in fp32, or in 8 bits by bitsandbytes (a quarter of the memory; paged: moved to the CPU by a full GPU)."""
    lr: Positive = 3e-4
    """Learning rate."""
    lr_decay: Literal["none", "linear", "cosine"] = "none"
    """How the learning rate falls to 0 over the run's `iterations`."""
    beta1: Decay = 0.9
    """Decay of the first moment."""
    beta2: Decay = 0.999
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """The gradient's norm is clipped to this."""
    max_skipped_steps: Count = 3
    """Stop, with a checkpoint and a dump, after so many steps in a row that were skipped for a gradient that is not
    finite."""


@dataclass(kw_only=True, config=STRICT)
class EMA:
    """Moving averages of the trained weights."""

    old_decay_per_step: NonNegative = 0.001
    """θ_old, the fast average: decay = min(old_decay_max, old_decay_per_step · iteration)."""
    old_decay_max: Decay = 0.3
    """Upper bound of θ_old's decay."""
    switch_ema_ref: Annotated[int, Field(ge=0)] | None = 500
    """From this iteration on the rollouts use θ_old instead of the policy itself. None: never."""
    eval_decay_max: Decay = 0.9
    """The slow average, which is evaluated and saved: decay = min(this, (1 + s) / (10 + s)). 0: no average."""
    eval_every: Count = 8
    """Iterations between updates of the slow average."""
    offload: bool = False
    """Keep the slow average in the CPU's memory."""


@dataclass(kw_only=True, config=STRICT)
class Evaluation:
    """Before and after, on held-out prompts with the same initial noise."""

    images: Annotated[int, Field(ge=2)] = 256
    """Images per evaluation, spread evenly over tags and held-out prompts."""
    every: Annotated[int, Field(ge=0)] = 0
    """Also evaluate every so many iterations. 0: only before and after."""
    solver: Literal["dpmpp_2m", "euler"] = "dpmpp_2m"
    """ODE solver; evaluations are without noise, whatever the rollouts have."""
    num_inference_steps: Count = 14
    """Solver steps per image."""
    guidance_scale: Guidance = 4.5
    """Classifier-free guidance."""
    seed: int = 0
    """Seed of the initial noise, the same for every run so that runs can be compared."""


@dataclass(kw_only=True, config=STRICT)
class Checkpoint:
    """What `--resume` goes on from."""

    every: Count = 20
    """Iterations between checkpoints. One more is written at the end and on Ctrl-C."""
    keep: Count = 2
    """How many of the newest to keep."""


@dataclass(kw_only=True, config=STRICT)
class Distributed:
    """A run on several processes, started by torchrun. One process alone reads none of this."""

    timeout_s: Positive = 600.0
    """How long a process waits for the others before it gives up and says what it waited for."""
    check_every: Annotated[int, Field(ge=0)] = 20
    """Every so many iterations the processes compare checksums of their weights and counters. 0: never."""
    shard: Literal["none", "full", "hybrid"] = "none"
    """Full fine-tuning with all copies of the weights, gradients and optimizer states cut over all processes (full), or
    over those of a machine, with a copy on each machine (hybrid). Needs fp32 weights and `--optimizer.name adamw`."""


@dataclass(kw_only=True, config=STRICT)
class Log:
    """Where metrics go besides `metrics.jsonl`."""

    tensorboard: bool = False
    """Write TensorBoard events into the run's folder."""
    wandb: str | None = None
    """Weights & Biases project to log to."""


@dataclass(kw_only=True, config=STRICT)
class Engine:
    """Where the speed comes from. Each saving can be switched alone, and none but fp8 rollouts changes what is learnt.

    "auto" chooses by the device and by short measurements at the run's own shapes, and says what it chose and why.
    """

    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, one graph for each kind of transformer block. auto: on a GPU, and on a CPU in long runs."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Record the whole ODE of a rollout once and replay it. auto: on a GPU with 40 GiB or more."""
    attention: Literal["auto", "native", "native_flash", "native_cudnn", "flash", "flash3", "xformers", "matmul"] = (
        "auto"
    )
    """Attention kernel: torch's own choice or one of its two, a package, or plain matrix products. auto: the fastest
    that computes the same."""
    linear: Literal["auto", "torch", "onednn"] = "auto"
    """Matrix products of fp32 runs on a CPU: torch's or oneDNN's, which is faster on some. auto: the faster one."""
    decoder: Literal["auto", "plain", "fast"] = "auto"
    """fast: channels_last, and compiled where the blocks are; checked against fp32 on the first images. auto: fast."""
    decode_batch: Count | None = None
    """Images decoded at a time; fewer take less memory. Default: rollout.batch_size, at most 16 of 512 × 512."""
    overlap: bool = True
    """On a GPU, decode and score one batch of a rollout while the next one is drawn."""
    batch_timesteps: bool = True
    """Predict with the reference and with θ_old for all training timesteps at once, in full batches."""
    keep_memory: bool = True
    """On a CPU, keep up to a GiB of freed memory for the next tensors, where the C library can (glibc)."""
    skip_equal_groups: bool = True
    """Leave out what a group of equal rewards adds nothing to the gradient by."""
    checkpointing: Literal["none", "selective", "blocks"] = "none"
    """Activations made again in the backward pass, for memory: none, the cheap ones, or all inside each block."""
    rollout_precision: Literal["same", "fp8"] = "same"
    """fp8: rollouts in float8 by torchao, on GPUs that have it. Inexact: other images are drawn and learnt from. The
    gradient and evaluations stay in the run's precision."""


@dataclass(kw_only=True, config=STRICT)
class Config:
    """Reinforce a text-to-image diffusion model with Direct Group Preference Optimization (DGPO)."""

    recipe: str = "tiny-shapes"
    """Where the settings below start from."""
    model: str = "tiny"
    """A Stable Diffusion 3 pipeline: `tiny` (shipped), a folder in diffusers' format, or a name on the hub."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    random_weights: bool = False
    """Build the model from its configuration with random weights: for benchmarks, without a download."""
    random_text_encoders: bool = False
    """With random weights, build the text encoders too. Without them, random embeddings stand in."""
    prompts: str = "tiny-shapes"
    """A generator (tiny-shapes, tiny-signs, geneval, signs), a .txt file with a prompt a line, a GenEval .jsonl or a
    .csv."""
    eval_prompts: str | None = None
    """Held-out prompts. Default: a part of `prompts` that training never sees."""
    rewards: Rewards = ("shapes",)
    """What to raise, with `=weight`: names (shapes, ocr, geneval-hf, pickscore, …), your own `my_module:MyReward`, a
    judge's file or a reward server's address."""
    prompt_cache: Annotated[str, Field(min_length=1)] = "auto"
    """Where encoded prompts are kept for all runs: auto (the user's cache folder, or $DGPO_FAST_CACHE), off, or a
    folder."""
    prompt_cache_gib: Positive = 50.0
    """Most disk space for encoded prompts, in GiB; the least recently used ones go beyond it."""
    reward_workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Processes that score groups beside the rollout, for rewards that run on the CPU. auto: as many as there are cores
    but one, eight at most, on a GPU; none on a CPU, where they would share the rollout's cores."""
    reward_deadline_s: Positive = 300.0
    """Seconds within which a reward must have scored a group. One that takes longer in a worker process, which is then
    stopped, or waits for another machine loses the group; any other, in the trainer's own process, ends the run."""
    max_lost_iterations: Count = 3
    """Stop, with a checkpoint, after so many iterations in a row in which a reward was asked and scored nothing, or in
    which no group could be scored."""
    iterations: Count = 60
    """Rounds of drawing groups and learning from them."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of prompts, initial noise, training noise and timesteps."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    low_memory: bool = False
    """Trade speed for memory, for small cards: no merged copy, checkpointed blocks, pictures decoded one by one,
    averages in the CPU's memory, micro-batches of what fits."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU that has it, fp32 elsewhere."""
    runs_dir: str = "runs"
    """Where the run's folder is made."""
    name: str | None = None
    """The run's folder. Default: recipe, date and time."""
    objective: str = "dgpo"
    """What the groups are used for: dgpo, diffusion_dpo, flow_grpo, or your own `my_module:MyObjective`."""
    rollout: Rollout = Field(default_factory=Rollout)
    data: Data = Field(default_factory=Data)
    advantage: Advantage = Field(default_factory=Advantage)
    dgpo: DGPO = Field(default_factory=DGPO)
    diffusion_dpo: DiffusionDPO = Field(default_factory=DiffusionDPO)
    flow_grpo: FlowGRPO = Field(default_factory=FlowGRPO)
    policy: Policy = Field(default_factory=Policy)
    engine: Engine = Field(default_factory=Engine)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    ema: EMA = Field(default_factory=EMA)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    distributed: Distributed = Field(default_factory=Distributed)
    log: Log = Field(default_factory=Log)

    def __post_init__(self) -> None:
        if self.rollout.noise_level > 0 and self.rollout.solver != "euler":
            raise ValueError(
                f"rollout.noise_level is {self.rollout.noise_level:g} but rollout.solver is {self.rollout.solver}: "
                "only --rollout.solver euler takes noise"
            )
        grid = self.rollout.num_inference_steps
        available = min(self.dgpo.high_noise_steps or grid, grid)
        if self.objective == "dgpo" and self.dgpo.timesteps > available:
            raise ValueError(
                f"dgpo.timesteps is {self.dgpo.timesteps} but only {available} timesteps can be drawn "
                "(rollout.num_inference_steps, dgpo.high_noise_steps): lower it or raise those"
            )
