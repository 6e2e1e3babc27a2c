"""Pretrains the small pipeline: `python -m dgpo_fast.tiny.pretrain [--output DIR] [--resume] [--seed N] [--minutes M]`.

The stages are in `stages.py`, the loop that runs one is in `optimise.py`.
"""

import argparse
import json
import math
import multiprocessing
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DPMSolverMultistepScheduler, StableDiffusion3Pipeline
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.rewards.shipped.ocr import OcrReward
from dgpo_fast.tiny import PIPELINE_DIR, data
from dgpo_fast.tiny.model import build_pipeline
from dgpo_fast.tiny.optimise import OutOfTime, Session, optimise, say_nothing
from dgpo_fast.tiny.shapes import ShapesReward
from dgpo_fast.tiny.stages import (
    T5_TOKENS,
    Pretraining,
    Stage,
    autoencoder_stage,
    dataset,
    latents,
    misspelt,
    scaled_latents,
    transformer_stage,
)


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
    reward, ocr = ShapesReward(), OcrReward() if find_spec("rapidocr") else None
    results: dict[str, dict[str, float]] = {}
    for name, guidance_scale in (("unguided", 1.0), ("guidance_3", 3.0)):
        graded, parts = reward(sample(pipe, texts, seed, guidance_scale), texts, metadata)
        by_tag = {tag: round(float(graded[tags == tag].mean()), 4) for tag in data.TAGS}
        mean, correct = round(float(graded.mean()), 4), round(float(parts["correct"].mean()), 4)
        results[name] = {"graded": mean, "correct": correct, **by_tag}
        if ocr is not None:
            signs, _ = ocr(sample(pipe, words, seed, guidance_scale), words, [{}] * len(words))
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
def helpers(n: int, run: Callable[[Session], object], session: Session) -> Iterator[None]:
    """Starts `n` more processes that take their share of every batch of `run` while the block runs the same.

    Layers as small as these are too little work to share among threads, above all on a busy machine.
    """
    if n == 0:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // (n + 1)))
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        silent = replace(session, saves=False, report=say_nothing)
        context = multiprocessing.get_context("spawn")
        started = [
            context.Process(target=_help, args=(store, i, n + 1, run, silent), daemon=True) for i in range(1, n + 1)
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


def _help(store: str, rank: int, world: int, run: Callable[[Session], object], session: Session) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    # The first process meets the same bad input and tells the user.
    with suppress(UserError):
        run(session)
    dist.destroy_process_group()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dgpo_fast.tiny.pretrain", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--output", type=Path, default=PIPELINE_DIR, help="pipeline folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/tiny-pretraining"), help="folder of checkpoints (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in --work")
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
            with helpers(options.processes - 1, partial(pretrain, config), session):
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
