"""Whether a family other than Stable Diffusion 3 learns: a small Z-Image, pretrained and then reinforced with DGPO.

    python -m benchmarks.another_family pretrain [--processes 2] [--minutes 60]
    python -m benchmarks.another_family train [--seeds 0 1] [--setting value …]
    python -m benchmarks.another_family table

The first trains a Z-Image of the shipped pipeline's size on the miniature world, in an hour at most, and saves it in
`runs/another-family/pipeline`. The autoencoder is the shipped one. The second runs the recipe `tiny-shapes` on it for
each seed, and writes `another_family.json`. The third puts the table in docs/families.md. Each goes on where it was
stopped or killed. Further settings are handed on to `python -m dgpo_fast.train`.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from rich.console import Console
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from benchmarks.first_light import RESULTS, machine
from benchmarks.pages import DOCS, replace_part
from dgpo_fast.errors import UserError
from dgpo_fast.models.architecture import Architecture
from dgpo_fast.models.families.z_image import ZImage
from dgpo_fast.run.metrics import write_json
from dgpo_fast.run.start import iterations_done
from dgpo_fast.tiny import PIPELINE_DIR, data
from dgpo_fast.tiny.model import words
from dgpo_fast.tiny.optimise import OutOfTime, Session, optimise
from dgpo_fast.tiny.pretrain import helpers, progress
from dgpo_fast.tiny.stages import Pretraining, Stage, dataset, flow_matching_stage, latents

WORK = Path("runs/another-family")
RESULT = RESULTS / "cpu/another_family.json"
RECIPE = "tiny-shapes"
TEXT_TOKENS = 16
TEXT_WIDTH = 64
WIDTH, HEADS, LAYERS = 96, 3, 3
SHIFT = 4.0
"""Between Stable Diffusion 3's shift, which would mark a Z-Image-Turbo, and the 6 of Z-Image's published scheduler."""
# No signs: their letters take longest to learn, and the reward does not read them.
PRETRAINING = Pretraining(sign_share=0.0, transformer_steps=16_000, transformer_batch=64)
SETTINGS = {
    "rollout.resolution": data.SIZE,
    "rollout.max-sequence-length": TEXT_TOKENS,
    # Z-Image's rule c + g·(c − u) is off at 0, where Stable Diffusion 3's is at 1.
    "rollout.guidance-scale": 0,
    "evaluation.guidance-scale": 0,
}
"""What the recipe needs for Z-Image beside `--model`."""


def build_tokenizer() -> Qwen2Tokenizer:
    """A Qwen2 tokenizer with a token for each word of the world's prompts; any other text becomes one token per byte.

    Its chat template is the prompt and an end: the empty prompt has a token too.
    """
    tokens = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.add_tokens([AddedToken(word, single_word=True, lstrip=True) for word in words()])
    tokenizer.chat_template = "{{ messages[0]['content'] }}<|endoftext|>"
    return tokenizer


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    """Z-Image reads the second last state: the last layer has no part in it."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=TEXT_WIDTH // 2,
        max_position_embeddings=TEXT_TOKENS,
    )
    return Qwen3Model(config)


def build_transformer() -> ZImageTransformer2DModel:
    """Its blocks start as identities and its output as zero, as those of the shipped pipeline."""
    head = WIDTH // HEADS
    transformer = ZImageTransformer2DModel(
        in_channels=12,
        dim=WIDTH,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        n_layers=LAYERS,
        n_refiner_layers=1,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[head // 4, 3 * head // 8, 3 * head // 8],
        axes_lens=[128, 16, 16],
    )
    for name, p in transformer.named_parameters():
        if "adaLN_modulation" in name or ("all_final_layer" in name and ".linear." in name):
            nn.init.zeros_(p)
        elif "pad_token" in name:
            nn.init.normal_(p)
    return transformer


def build_pipeline(seed: int) -> ZImagePipeline:
    """The whole pipeline, in float32 on the CPU: the shipped autoencoder, and random weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        return ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=AutoencoderKL.from_pretrained(PIPELINE_DIR, subfolder="vae"),
            text_encoder=build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            transformer=build_transformer(),
        )


def transformer_stage(pipe: ZImagePipeline, prompts: list[data.Prompt], x0_all: Tensor, config: Pretraining) -> Stage:
    """Transformer and text encoder by flow matching, through what the package knows of the family."""
    architecture = Architecture(
        transformer=pipe.transformer.config, vae=pipe.vae.config, scheduler=pipe.scheduler.config, index={}
    )
    family = ZImage(architecture)

    def velocity(x_t: Tensor, timestep: Tensor, captions: list[str], length: int) -> Tensor:
        texts, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=length)
        condition = family.stack([{"text": text} for text in texts], 0)
        return family.velocity(pipe.transformer, x_t, timestep, condition, None)

    modules = [pipe.transformer, pipe.text_encoder]
    return flow_matching_stage(modules, velocity, (TEXT_TOKENS,), prompts, x0_all, config)


def pretrain(config: Pretraining, session: Session) -> ZImagePipeline:
    """Trains from the session's checkpoint, if there is one; the pipeline, complete or as far as it came."""
    pipe, (prompts, pictures) = build_pipeline(config.seed), dataset(config)
    with suppress(OutOfTime):
        optimise(transformer_stage(pipe, prompts, latents(pipe, pictures), config), session)
    return pipe


def pretrain_and_save(config: Pretraining, work: Path, minutes: float, processes: int) -> None:
    """Pretrains for so long at most, and saves the pipeline and a record in `work`."""
    with progress(Console()) as report:
        session = Session(config, work, time.monotonic() + 60 * minutes, report=report)
        with helpers(processes - 1, partial(pretrain, config), session):
            pipe = pretrain(config, session)
    pipe.save_pretrained(work / "pipeline")
    record, checkpoint = work / "pretraining.json", work / "transformer.pt"
    before = json.loads(record.read_text("utf-8"))["core_minutes"] if record.exists() else 0.0
    parts = {name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("transformer", "text_encoder")}
    found = {
        "config": asdict(config),
        "steps": torch.load(checkpoint, weights_only=True)["step"],
        "core_minutes": round(before + processes * time.process_time() / 60, 1),
        "weights": parts,
        "machine": machine(),
    }
    write_json(record, found)


def reinforce(seed: int, work: Path, more: list[str]) -> dict[str, Any]:
    """The summary of a run of the recipe, which is begun, resumed or finished already."""
    folder = work / f"{RECIPE}-seed{seed}"
    command = [sys.executable, "-m", "dgpo_fast.train"]
    if iterations_done(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)
        given = {"model": work / "pipeline", "seed": seed, "runs-dir": work, "name": folder.name, **SETTINGS}
        command += [RECIPE, *(word for name, value in given.items() for word in (f"--{name}", str(value))), *more]
    else:
        command += ["--resume", str(folder)]
    if not (folder / "summary.json").exists():
        subprocess.run(command, check=True)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def train(seeds: list[int], work: Path, result: Path, more: list[str]) -> None:
    """Runs each seed, and writes what has come out so far."""
    report: dict[str, Any] = {
        "family": ZImage.title,
        "recipe": RECIPE,
        "settings": SETTINGS,
        "more_settings": more,
        "pretraining": json.loads((work / "pretraining.json").read_text(encoding="utf-8")),
        "machine": machine(),
        "runs": [],
    }
    for seed in seeds:
        report["runs"].append(reinforce(seed, work, more))
        write_json(result, report)
    picture = result.with_name(f"{result.stem}_before_after.png")
    shutil.copy(work / f"{RECIPE}-seed{seeds[0]}" / "before_after.png", picture)


def table(report: Mapping[str, Any]) -> str:
    """The runs as Markdown, below those of the shipped pipeline."""
    shipped = json.loads((RESULTS / f"cpu/{RECIPE}.json").read_text(encoding="utf-8"))
    lines = ["| pipeline | seed | iterations | before | after | gain |", "|---" * 6 + "|"]
    measured = []
    for name, of in (("Stable Diffusion 3, shipped", shipped), (f"{report['family']}, pretrained here", report)):
        for run in of["runs"]:
            scores = [_with_interval(run[when], sign) for when, sign in (("before", ""), ("after", ""), ("gain", "+"))]
            lines.append(f"| {name} | {run['seed']} | {run['iterations']} | {' | '.join(scores)} |")
        on = of["machine"]
        measured.append(f"{name}: {on['device']}, torch {on['torch']}, commit {on['commit']}, {on['date']}.")
    trained = report["pretraining"]
    pretrained = (
        f"Pretraining: {trained['steps']:,} steps of {trained['config']['transformer_batch']} pictures, "
        f"{trained['core_minutes']:.0f} minutes of one core."
    )
    about = ["Mean reward of held-out prompts ± 95 %.", *measured, pretrained]
    return "\n".join([*lines, "", " ".join(about)])


def _with_interval(scores: Mapping[str, Any], sign: str) -> str:
    low, high = scores["reward_ci95"]
    return f"{scores['reward_mean']:{sign}.3f} ± {(high - low) / 2:.3f}"


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first, second, third = (commands.add_parser(name) for name in ("pretrain", "train", "table"))
    for command in (first, second):
        command.add_argument("--work", type=Path, default=WORK, help="folder of checkpoints and runs")
    first.add_argument("--minutes", type=float, default=60, help="stop and save after this long")
    first.add_argument("--processes", type=int, default=1, help="processes that share every batch, one a core")
    for field in ("pictures", "transformer_steps", "transformer_batch"):
        first.add_argument(f"--{field.replace('_', '-')}", type=int, default=getattr(PRETRAINING, field))
    second.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    for command in (second, third):
        command.add_argument("--result", type=Path, default=RESULT, help="file of the results")
    options, more = parser.parse_known_args()
    if more and options.command != "train":
        parser.error(f"unknown: {' '.join(more)}")
    try:
        if options.command == "pretrain":
            changed = {name: value for name, value in vars(options).items() if name in asdict(PRETRAINING)}
            pretrain_and_save(replace(PRETRAINING, **changed), options.work, options.minutes, options.processes)
        elif options.command == "train":
            train(options.seeds, options.work, options.result, more)
        else:
            replace_part("another_family", table(json.loads(options.result.read_text("utf-8"))), DOCS / "families.md")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
