"""Every setting of a run: what it means, its unit, its bounds. A `Config` is checked when it is made."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from dgpo_fast.config.agreement import (
    check_advantage,
    check_averages,
    check_base,
    check_data,
    check_levels,
    check_noise,
    check_timesteps,
    check_trained_steps,
    check_watch,
)
from dgpo_fast.config.bounds import (
    STRICT,
    Card,
    Count,
    Decay,
    ModelGuidance,
    NonNegative,
    PathText,
    Positive,
    Resolution,
    Shift,
    Steps,
    Text,
)
from dgpo_fast.config.data_options import Data
from dgpo_fast.config.objective_options import (
    AWM,
    CRD,
    DGPO,
    KTO,
    NFT,
    RAM,
    Advantage,
    DiffusionDPO,
    FlowGRPO,
    Regulariser,
)
from dgpo_fast.config.watch_options import Watch


def _as_list_of_rewards(given: object) -> Sequence[str]:
    """Turns a single reward into a list. Raises ValueError for anything else that is not a list."""
    rewards = [given] if isinstance(given, str) else given
    if not rewards or not isinstance(rewards, list | tuple) or not all(isinstance(one, str) for one in rewards):
        raise ValueError("write rewards: [jpeg=0.1, red=my_reward:Name]")
    return rewards


Rewards = Annotated[tuple[str, ...], BeforeValidator(_as_list_of_rewards)]
"""Rewards by name, import path, file or address, with their weights."""


@dataclass(kw_only=True, config=STRICT)
class Rollout:
    """How images are drawn with the behaviour weights (the policy, later θ_old): by a few-step ODE, or by an SDE."""

    group_size: Annotated[int, Field(ge=2)] = 16
    """G: images per prompt. The advantage compares the images of one group with each other."""
    groups: Count = 8
    """P: prompts per iteration. Each prompt gets one group of images."""
    solver: Literal["dpmpp_2m", "euler"] = "dpmpp_2m"
    """Solver. dpmpp_2m: DPM-Solver++(2M) on flow sigmas. euler: Euler steps; required if `noise_level` is above 0."""
    noise_level: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Noise added at every step; needs the `euler` solver. 0: a deterministic ODE. Flow-GRPO uses 0.7."""
    noise_kind: Literal["sde", "constant", "cps"] = "sde"
    """Steps with the noise level a. sde: of an SDE with the diffusion coefficient a·√(σ / (1 − σ)), as Flow-GRPO.
    constant: of an SDE with the coefficient a, as DanceGRPO. cps: steps that replace a share of the state's noise, of
    the size σ_next·sin(a·π/2), so that the state's noise level is exactly the grid's."""
    noise_steps: Count | None = None
    """N: only N steps in a row have noise, at a place that is drawn anew in each iteration. None: all steps."""
    noise_among: Count | None = None
    """The steps with noise lie among the first N steps. None: if `noise_steps` is given, among all but the last one."""
    share_initial_noise: bool = False
    """The images of a group start from the same noise, so that only the noise of their steps differs."""
    num_inference_steps: Count = 10
    """Solver steps per image."""
    guidance_scale: ModelGuidance = 4.5
    """Guidance scale, as the model's card has it (docs/families.md). With classifier-free guidance, 1 turns it off,
    which halves the cost of a step."""
    negative_prompt: Text = ""
    """Negative prompt of all prompts that have none of their own (`negative_prompt` in a line of the file). Guidance
    leads away from it: in rollouts, in evaluations and wherever an objective has guidance. None: the empty text."""
    shift: Shift | None = None
    """Timestep shift s of the sigma grid: σ = s·t / (1 + (s − 1)·t). None: the model's own, by its
    scheduler_config.json; with some models it depends on the resolution and on the number of steps."""
    resolution: Resolution | None = None
    """Size of the images in pixels: HEIGHTxWIDTH, such as 512x768, or one number for a square. None: the size that
    the model's files name, sample_size of the transformer × the decoder's factor, which diffusers draws by default.
    A model may have been trained at other sizes too: SD3.5-Medium's files say 1024, and its recipes 512."""
    max_sequence_length: Annotated[int, Field(ge=0)] = 128
    """Number of tokens per prompt; with Stable Diffusion 3, of T5. 0: no T5 tokens, for a pipeline without that
    encoder."""
    batch_size: Count = 32
    """Images per forward pass of the rollout and the decoder. Affects speed and memory, not the images."""

    @property
    def grid_shift(self) -> float:
        """`shift`, after the model's own has been filled in."""
        if self.shift is None:
            raise ValueError("rollout.shift is still to be read from the model")
        return self.shift


@dataclass(kw_only=True, config=STRICT)
class Policy:
    """Which weights are trained, and how they are stored."""

    train: Literal["lora", "full"] = "lora"
    """lora: LoRA adapters, through PEFT. full: all weights of the transformer."""
    weights: Literal["auto", "fp32", "bf16_master", "bf16_stochastic"] = "auto"
    """Storage of the trained weights. fp32: cast in each forward pass of a bf16 run. bf16_master: bf16, with the
    lower 16 bits of an fp32 master stored separately (4 bytes per weight). bf16_stochastic: bf16 with stochastic
    rounding (2 bytes per weight). auto: bf16_master in a bf16 run, else fp32."""
    behaviour: Literal["merged", "adapter"] = "merged"
    """Weights that draw the rollouts when LoRA is trained. merged: a copy of the model with the LoRA merged in.
    adapter: the base model with a second adapter; needs no copy, but each forward pass is slower."""
    forward: Literal["auto", "adapter", "merged"] = "auto"
    """How the policy computes when LoRA is trained; the gradient is the same but for rounding. adapter: the frozen
    layers with the LoRA beside them, as in PEFT. merged: weights with the LoRA merged in; faster, but needs a copy of
    the layers that have a LoRA. auto: merged on a GPU if `behaviour` is merged, else adapter."""
    lora_rank: Count = 64
    """Rank of the LoRA adapters."""
    lora_alpha: Positive = 128.0
    """The adapters are scaled by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ()
    """Linear layers that get an adapter, given by the ends of their names, or by one regular expression of whole names.
    Empty: those of the model's family (docs/families.md), attention in most."""
    micro_batch: Count | Literal["auto"] = 16
    """Images per training forward and backward pass. The gradient does not depend on it. auto: the largest size that
    fits in memory."""
    base_precision: Literal["same", "int8", "nf4"] = "same"
    """Precision in which the frozen base is kept when LoRA is trained. same: the run's. int8, nf4: the weights of its
    blocks in 8 or 4 bits, through bitsandbytes (QLoRA). They are rounded: reference, rollouts and gradients are those
    of the rounded model."""
    allow_distilled: bool = False
    """Train a model that is distilled to a few steps. It loses that: a denoising loss blurs its pictures."""

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
    """adamw: optimizer states in fp32. adamw8bit: states in 8 bits, through bitsandbytes, for a quarter of the
    memory. paged_adamw8bit: as adamw8bit, and states move to the CPU when GPU memory runs out."""
    lr: Positive = 3e-4
    """Learning rate."""
    lr_decay: Literal["none", "linear", "cosine"] = "none"
    """Learning rate schedule over the run's `iterations`. none: constant. linear, cosine: decays to 0."""
    beta1: Decay = 0.9
    """Decay of the first moment."""
    beta2: Decay = 0.999
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: NonNegative = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down to it."""
    max_skipped_steps: Count = 3
    """A step is skipped if its gradient is not finite. Stop the run, with a checkpoint and a dump, after N skipped
    steps in a row."""


@dataclass(kw_only=True, config=STRICT)
class EMA:
    """Moving averages of the trained weights."""

    old_decay_per_step: NonNegative = 0.001
    """Decay of θ_old, the fast average, after t optimizer steps, once per iteration: min(old_decay_max,
    old_decay_start + old_decay_per_step · max(0, t − old_decay_delay))."""
    old_decay_start: Decay = 0.0
    """Decay of θ_old at the start."""
    old_decay_delay: Steps = 0
    """Optimizer steps before θ_old's decay grows."""
    old_decay_max: Decay = 0.3
    """Upper bound of θ_old's decay."""
    switch_ema_ref: Steps | None = 500
    """From iteration N on, θ_old draws the rollouts instead of the policy. None: the policy always draws them."""
    rollout_decay_per_step: NonNegative | None = None
    """If given, an average of its own draws all rollouts, so that θ_old can move at another pace. Its decay after t
    optimizer steps: min(rollout_decay_max, rollout_decay_per_step · max(0, t − rollout_decay_delay)). None: there is
    no such average."""
    rollout_decay_delay: Steps = 0
    """Optimizer steps before the decay of the rollouts' own average grows."""
    rollout_decay_max: Decay = 0.999
    """Upper bound of the decay of the rollouts' own average."""
    eval_decay_max: Decay = 0.9
    """Upper bound of the decay of the slow average, which is evaluated and saved: min(eval_decay_max, (1 + i) / (10
    + i)) in iteration i. 0: no averaging."""
    eval_every: Count = 8
    """Update the slow average every N iterations. The saved average has the last iteration in it, whatever N is. In a
    run shorter than N, the policy itself is saved."""
    offload: bool = False
    """Keep the slow average in CPU memory."""


@dataclass(kw_only=True, config=STRICT)
class Evaluation:
    """Evaluation before and after training, on held-out prompts and with the same initial noise."""

    images: Annotated[int, Field(ge=2)] = 256
    """Images per evaluation, spread evenly over tags and held-out prompts."""
    every: Annotated[int, Field(ge=0)] = 0
    """Also evaluate every N iterations during training. 0: evaluate only before and after."""
    solver: Literal["dpmpp_2m", "euler"] = "dpmpp_2m"
    """ODE solver. dpmpp_2m: DPM-Solver++(2M). euler: Euler. Evaluations never add noise, even if rollouts do."""
    num_inference_steps: Count = 14
    """Solver steps per image."""
    guidance_scale: ModelGuidance = 4.5
    """Guidance scale, as the model's card has it. With classifier-free guidance, 1 turns it off."""
    resolution: Resolution | None = None
    """Size of held-out images in pixels, as `rollout.resolution`. None: that of the rollouts. Training at a smaller
    size takes less memory and time; docs/recipes.md says what carries over."""
    seed: int = 0
    """Seed of the initial noise. It is separate from the run's `seed`, so that runs with different seeds can be
    compared."""


@dataclass(kw_only=True, config=STRICT)
class Checkpoint:
    """Checkpoints, from which `--resume` continues."""

    every: Count = 20
    """Save a checkpoint every N iterations, at the end, and on Ctrl-C."""
    keep: Count = 2
    """Number of checkpoints to keep. Older ones are deleted."""


@dataclass(kw_only=True, config=STRICT)
class Distributed:
    """Training on several processes, started by torchrun. A single process ignores these settings."""

    timeout_s: Positive = 600.0
    """Seconds to wait for the other processes before the run stops with an error."""
    check_every: Annotated[int, Field(ge=0)] = 20
    """Compare checksums of weights and counters between processes every N iterations. 0: never."""
    shard: Literal["none", "full", "hybrid"] = "none"
    """Sharding of weights, gradients and optimizer states in full fine-tuning (FSDP2). none: every process holds all
    of them. full: sharded over all processes. hybrid: sharded over the processes of each machine, and replicated on
    every machine. Sharding needs fp32 weights and `--optimizer.name adamw`."""


@dataclass(kw_only=True, config=STRICT)
class Log:
    """Where metrics are logged, in addition to `metrics.jsonl`."""

    tensorboard: bool = False
    """Write TensorBoard events to the run's folder."""
    wandb: Annotated[str | None, BeforeValidator(lambda given: None if given == "off" else given)] = None
    """Weights & Biases project to log to. None, or off: do not log there."""


@dataclass(kw_only=True, config=STRICT)
class Engine:
    """Speed and memory. Each saving can be switched off alone. Only `rollout_precision: fp8` changes what is learned.

    For "auto", the engine decides by the device and by short measurements at the run's own shapes, and prints its
    choice and the reason.
    """

    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the transformer blocks and the decoder. auto: on for GPUs, and for CPU runs of 33,000 images or
    more; shorter runs do not win back the time it takes to compile. The recipes of the shipped pipeline have it off,
    since compiled blocks round differently: their results do not depend on a compiler."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Record all steps of a rollout as one CUDA graph and replay it. auto: on for GPUs with 40 GiB or more, since a
    recording keeps its memory."""
    attention: Literal["auto", "native", "native_flash", "native_cudnn", "flash", "flash3", "xformers", "matmul"] = (
        "auto"
    )
    """Attention kernel. native: PyTorch's scaled_dot_product_attention. native_flash, native_cudnn: only its flash
    or cuDNN kernel. flash, flash3: the packages FlashAttention 2 and 3. xformers: the package xFormers. matmul:
    plain matrix products, fast for few tokens on a CPU. auto: the fastest kernel that passes a check against
    float64."""
    linear: Literal["auto", "torch", "onednn"] = "auto"
    """Linear layers of fp32 runs on a CPU. torch: PyTorch's default library. onednn: oneDNN, which is faster on some
    processors. auto: whichever is faster here, timed once per machine."""
    epilogue: Literal["auto", "on", "off"] = "auto"
    """Apply the GELU of feed-forwards inside the matrix product before it, in forwards without a gradient. It saves
    memory traffic on a GPU. auto: on for GPUs. Float8 rollouts do not use it."""
    decoder: Literal["auto", "plain", "fast", "phases"] = "auto"
    """Image decoder. plain: as diffusers runs it. fast: in channels_last, and compiled if the blocks are. phases: as
    fast, and each upsampling with its convolution becomes four smaller convolutions, with other rounding. The first
    images are checked against fp32. auto: phases on a GPU and in bf16, fast in fp32 on a CPU."""
    decode_batch: Count | None = None
    """Images decoded at a time. A smaller number takes less memory. None: rollout.batch_size, but at most 16
    images of 512 × 512."""
    overlap: bool = True
    """On a GPU, decode and score one batch while the next one is drawn."""
    batch_timesteps: bool = True
    """Predict with the reference and θ_old for all training timesteps together, in full batches."""
    share_first_level: Literal["auto", "on", "off"] = "auto"
    """With DGPO, one row a group in the forwards and backwards at the noisiest training timestep. A group's inputs are
    equal there if σ is 1 (euler). dpmpp_2m begins at a σ a little below 1, and they differ by 1 − σ. auto: on if σ is
    1, or if 1 − σ is less than a quarter of the eps of the run's precision, which is so in bf16."""
    keep_memory: bool = True
    """On a CPU with glibc, keep up to 1 GiB of freed memory for later tensors."""
    skip_equal_groups: bool = True
    """If all rewards of a group are equal, skip the computations that cannot change the gradient."""
    checkpointing: Literal["none", "selective", "blocks"] = "none"
    """Activation checkpointing: recompute activations in the backward pass to save memory. none: store all.
    selective: store only those that are expensive to recompute. blocks: store only the input of each transformer
    block."""
    rollout_precision: Literal["same", "fp8"] = "same"
    """same: rollouts in the run's precision. fp8: rollouts in float8 through torchao, on GPUs that support it. fp8
    draws slightly different images and so changes what is learned; gradients and evaluations keep the run's
    precision."""


@dataclass(kw_only=True, config=STRICT)
class Config:
    """Reinforce a text-to-image diffusion model with Direct Group Preference Optimization (DGPO)."""

    recipe: str = "tiny-shapes"
    """Recipe that the settings start from."""
    model: PathText = "tiny"
    """The model: `tiny` (shipped), a pipeline's folder in diffusers' format, or a name on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub. None: its default branch."""
    family: str = "auto"
    """How the model is drawn with. auto: by the class that its model_index.json names. Anything else: your own
    `my_module:MyFamily` (docs/families.md)."""
    lora: PathText | None = None
    """A LoRA to start from: a .safetensors file, or the folder that contains it, as another run's. It is merged into
    the model, and the LoRA that the run saves includes it. None: no LoRA."""
    random_weights: bool = False
    """Build the model from its configuration with random weights, without downloading them. For benchmarks."""
    random_text_encoders: bool = False
    """If `random_weights` is set, also build the text encoders. Otherwise, random embeddings replace them."""
    prompts: PathText = "tiny-shapes"
    """Training prompts: a generator (tiny-shapes, tiny-signs, geneval, signs), a .txt file with one prompt per line,
    a GenEval .jsonl file, or a .csv or .tsv file with a column of prompts."""
    eval_prompts: PathText | None = None
    """Held-out prompts for evaluations, given as `prompts` are. None: a part of `prompts` that is never trained on."""
    rewards: Rewards = ("shapes",)
    """Rewards to maximise, each with an optional weight (`NAME=0.5`, default 1): names (shapes, ocr, geneval-hf,
    pickscore, …), your own `my_module:MyReward`, a judge's .yaml file, or the address of a reward server."""
    text_precision: Literal["same", "int8", "nf4"] = "same"
    """Precision of the text encoders while they encode the run's prompts. same: the run's. int8, nf4: their weights
    rounded to 8 or 4 bits, through bitsandbytes, which changes the embeddings."""
    prompt_cache: Annotated[str, Field(min_length=1)] = "auto"
    """Where encoded prompts are stored for later runs. auto: $DGPO_FAST_CACHE, or the user's cache folder. off: in
    memory only. Anything else: a folder."""
    prompt_cache_gib: Positive = 50.0
    """Maximum size of the prompt cache, in GiB. Above it, the least recently used prompts are deleted."""
    reward_workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Number of processes that score images during the rollout, for rewards that run on the CPU. auto: on a GPU, one
    less than the CPU cores per training process, at most 8; on a CPU 0, because rewards and rollout would share the
    cores."""
    reward_deadline_s: Positive = 300.0
    """Seconds that a reward may take to score a group. If a reward in a worker process or on another machine takes
    longer, its group is dropped. If a reward in the trainer's own process takes longer, the run stops."""
    max_lost_iterations: Count = 3
    """Stop the run, with a checkpoint, if a reward fails on all its images in N iterations in a row, or if no group
    can be scored in N iterations in a row."""
    iterations: Count = 60
    """Number of iterations. Each draws groups of images, scores them and trains on them."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the prompt order, initial noise, training noise and timesteps."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: a GPU if there is one, else the CPU."""
    card: Card = None
    """Choose settings with which the run is predicted to fit on a GPU of this memory, as 24GB; auto: on the one that is
    here. The fewest and cheapest are taken: first exact ones, as of `low_memory`, then INEXACT ones, 8-bit optimizer
    states and a base in 8 or 4 bits. The run says what it took and what each costs, and keeps these settings."""
    low_memory: bool = False
    """Use less memory at the cost of speed, with all exact savings that `card` may choose: no merged copy of the model
    (policy.behaviour adapter), checkpointed blocks, images decoded one at a time, the slow average in CPU memory, the
    largest micro-batch that fits, smaller rollout batches and no CUDA graphs."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the model. auto: bf16 on a GPU that supports it, else fp32."""
    runs_dir: PathText = "runs"
    """Folder in which the run's folder is created."""
    name: str | None = None
    """Name of the run's folder. None: recipe, date and time."""
    objective: str = "dgpo"
    """Training objective: dgpo, diffusion_dpo, flow_grpo, nft, awm, ram, crd, kto, or your own
    `my_module:MyObjective`."""
    rollout: Rollout = Field(default_factory=Rollout)
    data: Data = Field(default_factory=Data)
    advantage: Advantage = Field(default_factory=Advantage)
    regulariser: Regulariser = Field(default_factory=Regulariser)
    dgpo: DGPO = Field(default_factory=DGPO)
    diffusion_dpo: DiffusionDPO = Field(default_factory=DiffusionDPO)
    flow_grpo: FlowGRPO = Field(default_factory=FlowGRPO)
    nft: NFT = Field(default_factory=NFT)
    awm: AWM = Field(default_factory=AWM)
    ram: RAM = Field(default_factory=RAM)
    crd: CRD = Field(default_factory=CRD)
    kto: KTO = Field(default_factory=KTO)
    policy: Policy = Field(default_factory=Policy)
    engine: Engine = Field(default_factory=Engine)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    ema: EMA = Field(default_factory=EMA)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    watch: Watch = Field(default_factory=Watch)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    distributed: Distributed = Field(default_factory=Distributed)
    log: Log = Field(default_factory=Log)

    def __post_init__(self) -> None:
        rollout, name = self.rollout, self.objective
        if rollout.noise_level > 0 and rollout.solver != "euler":
            raise ValueError(
                f"rollout.noise_level is {rollout.noise_level:g} but rollout.solver is {rollout.solver}: "
                "only --rollout.solver euler takes noise"
            )
        check_noise(rollout)
        check_averages(self.ema)
        check_watch(self.watch)
        check_base(self.policy, self.engine)
        grid = rollout.num_inference_steps
        if name == "dgpo" and self.dgpo.lowest_sigma is None:
            available = min(self.dgpo.high_noise_steps or grid, grid)
            check_timesteps("dgpo", self.dgpo.timesteps, available, "high_noise_steps")
        if name == "flow_grpo":
            check_trained_steps(self.flow_grpo.steps, rollout)
        bounded = name in ("nft", "crd") or (name == "awm" and self.awm.kl_weight_worst is not None)
        check_advantage(name, self.advantage, rollout.group_size, bounded=bounded)
        check_data(name, self.data, self.advantage)
        if name in ("nft", "awm", "ram", "crd", "kto"):
            check_levels(name, getattr(self, name), grid)

    @property
    def evaluation_resolution(self) -> int | str | None:
        """Of held-out images; None: the model's own."""
        return self.rollout.resolution if self.evaluation.resolution is None else self.evaluation.resolution

    @property
    def kept_images(self) -> int:
        """Images of a group that are trained on."""
        return self.advantage.keep or self.rollout.group_size
