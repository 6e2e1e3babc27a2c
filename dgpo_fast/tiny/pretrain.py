"""Pretrains the small pipeline: `python -m dgpo_fast.tiny.pretrain [--output DIR] [--resume] [--seed N] [--minutes M]`.

First the autoencoder, then the transformer with its text encoders by flow matching on the miniature world's training
prompts; held-out prompts are never drawn. Last, the same on signs that are misspelt, as captions found in the wild: it
leaves room for reinforcement, which a model that spells every word right has not.

A run with the same seed on the same kind of machine gives the same weights, and so does a run that was killed and
resumed.
"""

import argparse
import json
import math
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DPMSolverMultistepScheduler, StableDiffusion3Pipeline
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from dgpo_fast.errors import UserError
from dgpo_fast.rewards.shipped.ocr import OcrReward
from dgpo_fast.tiny import PIPELINE_DIR, data
from dgpo_fast.tiny.model import LATENT_CHANNELS, LATENT_SIZE, build_pipeline
from dgpo_fast.tiny.shapes import ShapesReward

# Harder tags more often than in a uniform mix, the easy ones often enough to be learnt.
PRETRAINING_MIX = {"single_object": 1.5, "two_object": 2, "counting": 3, "colors": 3, "position": 5, "color_attr": 4}
# SD3's T5 slots are zeros here, as many as a caller asks for: a model that saw several numbers draws alike with each.
T5_TOKENS = (0, 0, 0, 0, 4, 16)


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """How a pipeline is pretrained; with the seed it decides the weights.

    Attributes:
        seed: of the weights, the pictures and every draw of training.
        pictures: in the data set, drawn once.
        sign_share: of the pictures that show signs.
        misspelling: share of a sign's letters that are not the caption's in the last stage.
        autoencoder_steps, transformer_steps, misspelling_steps: optimizer steps of each stage.
        autoencoder_batch, transformer_batch: pictures per step.
        autoencoder_lr, transformer_lr, misspelling_lr: peak learning rates (AdamW, cosine).
        kl_weight: of the latents' KL divergence from a unit Gaussian, against the mean reconstruction error.
        caption_dropout: share of captions replaced by "", for guidance.
        sigma_mean, sigma_std: of logit(sigma).
        ema: largest decay of the averaged weights, which are what is saved.
        checkpoint_every_s: seconds between checkpoints.
    """

    seed: int = 0
    pictures: int = 60_000
    sign_share: float = 0.13
    misspelling: float = 0.5
    autoencoder_steps: int = 1000
    transformer_steps: int = 6000
    misspelling_steps: int = 600
    autoencoder_batch: int = 64
    transformer_batch: int = 128
    autoencoder_lr: float = 2e-3
    transformer_lr: float = 1.5e-3
    misspelling_lr: float = 5e-4
    kl_weight: float = 2e-3
    caption_dropout: float = 0.1
    sigma_mean: float = 0.8
    sigma_std: float = 1.0
    ema: float = 0.997
    checkpoint_every_s: float = 60.0


Batch = tuple[Tensor, ...]


@dataclass
class Stage:
    """One optimisation.

    Attributes:
        draw: a batch from a generator: tensors with one row per sample.
        loss: the mean loss over any part of a batch, a scalar.
    """

    name: str
    modules: Sequence[nn.Module]
    draw: Callable[[torch.Generator], Batch]
    loss: Callable[..., Tensor]
    steps: int
    lr: float


def _say_nothing(stage: Stage, step: int, loss: Tensor) -> None:
    """The report of every process but the first."""


@dataclass
class Session:
    """What one process adds: where checkpoints lie, when to stop (time.monotonic()), if it saves, how it reports."""

    config: Pretraining
    folder: Path
    deadline: float
    saves: bool = True
    report: Callable[[Stage, int, Tensor], None] = _say_nothing


class OutOfTime(Exception):
    """The time allowed was spent before the last step."""


def dataset(config: Pretraining) -> tuple[list[data.Prompt], np.ndarray]:
    """Prompts of the training split and a picture of each, uint8 (pictures, 32, 32, 3)."""
    rng = np.random.default_rng(config.seed)
    shapes, signs = data.shape_prompts("train"), data.sign_prompts("train")
    n_signs = round(config.sign_share * config.pictures)
    p = data.weights(shapes, PRETRAINING_MIX)
    prompts = [shapes[i] for i in rng.choice(len(shapes), config.pictures - n_signs, p=p)]
    prompts += [signs[i] for i in rng.integers(len(signs), size=n_signs)]
    return prompts, np.stack([data.render(metadata, rng) for _, metadata in prompts])


def misspelt(prompts: Sequence[data.Prompt], pictures: np.ndarray, config: Pretraining) -> np.ndarray:
    """`pictures` with those of the signs drawn anew, some of their letters replaced."""
    rng = np.random.default_rng([config.seed, 1])
    pictures = pictures.copy()
    for i, (_, metadata) in enumerate(prompts):
        if metadata["tag"] == "ocr":
            word = data.misspell(metadata["text"], config.misspelling, rng)
            pictures[i] = data.render({**metadata, "text": word}, rng)
    return pictures


def autoencoder_stage(pipe: StableDiffusion3Pipeline, pictures: np.ndarray, config: Pretraining) -> Stage:
    images = torch.from_numpy(pictures)
    latent_shape = (config.autoencoder_batch, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)

    def draw(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(images), (config.autoencoder_batch,), generator=generator)
        return _to_pixels(images[chosen]), torch.randn(latent_shape, generator=generator)

    def loss(x: Tensor, noise: Tensor) -> Tensor:
        posterior = pipe.vae.encode(x).latent_dist
        reconstructed = pipe.vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return F.l1_loss(reconstructed, x) + F.mse_loss(reconstructed, x) + config.kl_weight * kl

    return Stage("autoencoder", [pipe.vae], draw, loss, config.autoencoder_steps, config.autoencoder_lr)


def transformer_stage(
    pipe: StableDiffusion3Pipeline, prompts: Sequence[data.Prompt], x0_all: Tensor, config: Pretraining
) -> Stage:
    """Flow matching of x_t = (1 − σ)·x0 + σ·noise to the velocity noise − x0."""
    captions = [text for text, _ in prompts] + [""]

    def draw(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(x0_all), (config.transformer_batch,), generator=generator)
        dropped = torch.rand(len(chosen), generator=generator) < config.caption_dropout
        t5_tokens = torch.tensor(T5_TOKENS)[torch.randint(len(T5_TOKENS), (1,), generator=generator)]
        logit = config.sigma_mean + config.sigma_std * torch.randn(len(chosen), generator=generator)
        x0, noise = x0_all[chosen], torch.randn(len(chosen), *x0_all.shape[1:], generator=generator)
        caption = torch.where(dropped, len(captions) - 1, chosen)
        return x0, noise, torch.sigmoid(logit), caption, t5_tokens.expand(len(chosen))

    def loss(x0: Tensor, noise: Tensor, sigma: Tensor, caption: Tensor, t5_tokens: Tensor) -> Tensor:
        embeds, _, pooled, _ = pipe.encode_prompt(
            [captions[i] for i in caption.tolist()],
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=int(t5_tokens[0]),
        )
        x_t = torch.lerp(x0, noise, sigma[:, None, None, None])
        v = pipe.transformer(x_t, embeds, pooled, timestep=1000 * sigma).sample
        return F.mse_loss(v, noise - x0)

    modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    return Stage("transformer", modules, draw, loss, config.transformer_steps, config.transformer_lr)


def scaled_latents(pipe: StableDiffusion3Pipeline, pictures: np.ndarray) -> Tensor:
    """`latents`, after the scaling is set so that these pictures have mean 0 and variance 1.

    The scaling goes into the autoencoder's configuration, where every diffusers pipeline applies it.
    """
    pipe.vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    x0 = latents(pipe, pictures)
    shift, scale = x0.mean().item(), 1 / x0.std().item()
    pipe.vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (x0 - shift) * scale


@torch.no_grad()
def latents(pipe: StableDiffusion3Pipeline, pictures: np.ndarray) -> Tensor:
    """Encodes pictures, uint8 (P, 32, 32, 3), to float32 (P, C, h, w) on the CPU, with the autoencoder's scaling."""
    batches = torch.from_numpy(pictures).split(256)
    x0 = torch.cat([pipe.vae.encode(_to_pixels(b).to(pipe.device)).latent_dist.mean.cpu() for b in batches])
    return (x0 - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def optimise(stage: Stage, session: Session) -> None:
    """Runs a stage from its checkpoint, if there is one, and leaves the averaged weights in its modules.

    Raises:
        OutOfTime: the deadline passed; a checkpoint is written and the averages so far are in the modules.
    """
    config = session.config
    weights = [p for module in stage.modules for p in module.parameters()]
    average = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.01)
    file = session.folder / f"{stage.name}.pt"
    step = _load_checkpoint(file, config, optimizer, weights, average) if file.exists() else 0
    last_save = time.monotonic()
    time_over = False
    while step < stage.steps and not time_over:
        # Draws depend on seed, stage and step only, so that a resumed run repeats them.
        key = np.random.SeedSequence([config.seed, step, *stage.name.encode()]).generate_state(1, np.uint64)[0]
        batch = stage.draw(torch.Generator().manual_seed(int(key) >> 1))
        loss, time_over = _gradients(stage, batch, weights, time.monotonic() > session.deadline)
        _update(stage, optimizer, weights, step)
        # The first averages forget the random start.
        torch._foreach_lerp_(average, [p.detach() for p in weights], 1 - min(config.ema, (1 + step) / (10 + step)))
        step += 1
        session.report(stage, step, loss)
        if session.saves and time.monotonic() - last_save >= config.checkpoint_every_s:
            _save_checkpoint(file, config, optimizer, weights, average, step)
            last_save = time.monotonic()
    if session.saves:
        _save_checkpoint(file, config, optimizer, weights, average, step)
    with torch.no_grad():
        torch._foreach_copy_([*weights], average)
    if step < stage.steps:
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


def _save_checkpoint(
    file: Path,
    config: Pretraining,
    optimizer: torch.optim.Optimizer,
    weights: list[nn.Parameter],
    average: list[Tensor],
    step: int,
) -> None:
    state = {
        "config": asdict(config),
        "step": step,
        "optimizer": optimizer.state_dict(),
        "weights": [p.detach() for p in weights],
        "average": average,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    # A killed run leaves either the old checkpoint or the new one, never half of one.
    os.replace(partial, file)


def _load_checkpoint(
    file: Path,
    config: Pretraining,
    optimizer: torch.optim.Optimizer,
    weights: list[nn.Parameter],
    average: list[Tensor],
) -> int:
    state = torch.load(file, map_location=weights[0].device, weights_only=True)
    changed = [name for name, value in asdict(config).items() if state["config"].get(name) != value]
    if changed:
        raise UserError(
            f"{file} was made with another {', '.join(changed)}: use the same or start in another --work folder"
        )
    optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        torch._foreach_copy_([*weights], state["weights"])
        torch._foreach_copy_(average, state["average"])
    return int(state["step"])


def _to_pixels(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def sample(
    pipe: StableDiffusion3Pipeline,
    prompts: Sequence[str],
    seed: int,
    guidance_scale: float = 1.0,
    steps: int = 10,
    max_sequence_length: int = T5_TOKENS[0],
) -> np.ndarray:
    """Draws a picture of each prompt with DPM-Solver++(2M), uint8 (B, 32, 32, 3)."""
    euler = pipe.scheduler
    pipe.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=euler.config.shift, prediction_type="flow_prediction"
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for start in range(0, len(prompts), 256):
        drawn = pipe(
            list(prompts[start : start + 256]),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generator,
            output_type="np",
            max_sequence_length=max_sequence_length,
        ).images
        pictures.append((255 * drawn).round().astype(np.uint8))
    pipe.scheduler = euler
    return np.concatenate(pictures)


def evaluate(pipe: StableDiffusion3Pipeline, images: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Mean scores of as many held-out shape prompts as `images`, and a quarter as many signs, unguided and guided.

    Shapes: the graded score, the share of official `correct`, the graded score per tag. Signs: the OCR score, where
    RapidOCR is installed.
    """
    prompts = data.balanced(data.shape_prompts("heldout"), images)
    texts, metadata = [text for text, _ in prompts], [m for _, m in prompts]
    tags = np.array([m["tag"] for m in metadata])
    words = [text for text, _ in data.balanced(data.sign_prompts("heldout"), max(1, images // 4))]
    reward = ShapesReward()
    results: dict[str, dict[str, float]] = {}
    for name, guidance_scale in (("unguided", 1.0), ("guidance_3", 3.0)):
        graded, parts = reward(sample(pipe, texts, seed, guidance_scale), texts, metadata)
        by_tag = {tag: round(float(graded[tags == tag].mean()), 4) for tag in data.TAGS}
        mean, correct = round(float(graded.mean()), 4), round(float(parts["correct"].mean()), 4)
        results[name] = {"graded": mean, "correct": correct, **by_tag}
        if find_spec("rapidocr"):
            signs, _ = OcrReward()(sample(pipe, words, seed, guidance_scale), words, [{}] * len(words))
            results[name]["ocr"] = round(float(signs.mean()), 4)
    return results


@contextmanager
def progress(console: Console) -> Iterator[Callable[[Stage, int, Tensor], None]]:
    """A report function: a bar on a terminal, a line every half minute elsewhere."""
    started = time.monotonic()
    if not console.is_terminal:
        spoken = -math.inf

        def speak(stage: Stage, step: int, loss: Tensor) -> None:
            nonlocal spoken
            now = time.monotonic()
            if now - spoken >= 30 or step == stage.steps:
                spoken = now
                minutes = (now - started) / 60
                print(f"{stage.name} {step}/{stage.steps}  loss {loss.item():.4f}  {minutes:.1f} min", flush=True)

        yield speak
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def show(stage: Stage, step: int, loss: Tensor) -> None:
            if stage.name not in tasks:
                tasks[stage.name] = bar.add_task(stage.name, total=stage.steps)
            # Reading the loss waits for the device.
            text = f"{stage.name}  loss {loss.item():.4f}" if step % 20 == 0 else None
            bar.update(tasks[stage.name], completed=step, description=text)

        yield show


def pretrain(config: Pretraining, session: Session) -> StableDiffusion3Pipeline:
    """Trains both stages and returns the pipeline, complete or, when the time is over, as far as it came."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = build_pipeline(config.seed).to(device)
    prompts, pictures = dataset(config)
    try:
        optimise(autoencoder_stage(pipe, pictures, config), session)
    except OutOfTime:
        scaled_latents(pipe, pictures)
        return pipe
    x0_all = scaled_latents(pipe, pictures)
    misspelt_x0 = latents(pipe, misspelt(prompts, pictures, config))
    with suppress(OutOfTime):
        stage = transformer_stage(pipe, prompts, x0_all, config)
        optimise(stage, session)
        steps, lr = config.misspelling_steps, config.misspelling_lr
        stage = transformer_stage(pipe, prompts, misspelt_x0, config)
        optimise(replace(stage, name="misspelling", steps=steps, lr=lr), session)
    return pipe


@contextmanager
def helpers(n: int, config: Pretraining, session: Session) -> Iterator[None]:
    """Runs `n` more processes that take their share of every batch while the block runs.

    Layers as small as these are too little work to share among threads, above all on a busy machine.
    """
    if n == 0:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // (n + 1)))
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        silent = replace(session, saves=False, report=_say_nothing)
        context = multiprocessing.get_context("spawn")
        started = [
            context.Process(target=_help, args=(store, i, n + 1, config, silent), daemon=True) for i in range(1, n + 1)
        ]
        for process in started:
            process.start()
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=n + 1)
        try:
            yield
            for process in started:
                process.join()
        finally:
            dist.destroy_process_group()
            torch.set_num_threads(threads)


def _help(store: str, rank: int, world: int, config: Pretraining, session: Session) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    # The first process meets the same bad input and tells the user.
    with suppress(UserError):
        pretrain(config, session)
    dist.destroy_process_group()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dgpo_fast.tiny.pretrain", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--output", type=Path, default=PIPELINE_DIR, help="pipeline folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/tiny-pretraining"), help="folder of checkpoints (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --work")
    parser.add_argument(
        "--minutes", type=float, default=60, help="stop and save after this long (default: %(default)s)"
    )
    parser.add_argument(
        "--evaluation-images", type=int, default=768, help="held-out pictures scored at the end (default: %(default)s)"
    )
    processes = 1 if torch.cuda.is_available() else torch.get_num_threads()
    parser.add_argument(
        "--processes",
        type=int,
        default=processes,
        help="processes that share every batch (default: %(default)s, one a core)",
    )
    for name, default in asdict(Pretraining()).items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=type(default), default=default, help="default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    config = Pretraining(**{name: getattr(options, name) for name in asdict(Pretraining())})
    started = time.monotonic()
    try:
        if options.processes < 1 or (options.processes > 1 and torch.cuda.is_available()):
            raise UserError(f"--processes {options.processes}: use 1 on a GPU, and 1 or more on a CPU")
        if not options.resume and list(options.work.glob("*.pt")):
            raise UserError(f"{options.work} holds the checkpoints of a run: pass --resume, or another --work folder")
        with progress(Console()) as report:
            session = Session(config, options.work, started + 60 * options.minutes, report=report)
            with helpers(options.processes - 1, config, session):
                pipe = pretrain(config, session)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    pipe.save_pretrained(options.output, safe_serialization=True)
    record = {
        "command": shlex.join(["python", "-m", "dgpo_fast.tiny.pretrain", *(arguments or sys.argv[1:])]),
        "config": asdict(config),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "device": pipe.device.type,
        "processes": options.processes,
        "resumed": options.resume,
        "torch": torch.__version__,
        "heldout": evaluate(pipe, options.evaluation_images),
    }
    (options.output / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["heldout"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
