"""Runs scenarios of `test_distributed.py` as one of several processes: `python -m tests.distributed_runs NAME …`.

Starting a process costs more than a small run does, so each set of processes runs all scenarios. Process 0 prints what
came out of them as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.config.options import Config
from dgpo_fast.distributed import Processes, connect
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.preferences import Judgement, append_judgement
from dgpo_fast.rollout.source import Groups
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.trainer import Trainer

PROMPTS = "a cat\na dog\na house\nbig red car\ntwo birds\na tree\na river\na boat\na hill\na door\n"
SETTINGS = {
    "prompts": "prompts.txt",
    "rewards": ["tests.distributed_runs:Brightness"],
    "iterations": 2,
    "device": "cpu",
    "rollout": {
        "group_size": 4,
        "groups": 3,
        "num_inference_steps": 4,
        "max_sequence_length": 9,
        "batch_size": 2,
        "guidance_scale": 2.0,
    },
    "dgpo": {"timesteps": 2, "high_noise_steps": 3, "beta": 30.0, "kl_weight": 0.001, "clip_range": 0.01},
    # A pair's weight σ(s) has β times the rounding of two losses.
    "diffusion_dpo": {"beta": 1.0},
    "policy": {"train": "lora", "lora_rank": 4, "lora_alpha": 8.0, "micro_batch": 8},
    "optimizer": {"lr": 0.01, "lr_decay": "none"},
    "ema": {"eval_every": 1, "switch_ema_ref": 3},
    # Their rounding depends less on the number of rows than that of the fastest ones.
    "engine": {"attention": "native", "linear": "torch"},
    "evaluation": {"images": 12, "num_inference_steps": 4, "guidance_scale": 2.0},
    "watch": {"every": 0, "prompts": 2, "images_per_prompt": 2},
}
# Adam steps by the learning rate where a gradient is nothing but rounding, unless `eps` is well above that.
SHARDED = ["--policy.train", "full", "--optimizer.lr", "3e-4", "--optimizer.eps", "1e-3", "--distributed.shard", "full"]
START = {"A": (2, 32), "B": (32, 2)}
"""Shapes of the factors that a run starts from."""
CENTRED = ["--objective", "crd", "--ema.switch-ema-ref", "none", "--ema.rollout-decay-per-step", "0.2"]
SCENARIOS: dict[str, list[str]] = {
    "lora": [
        "--iterations",
        "20",
        "--evaluation.every",
        "20",
        "--watch.every",
        "10",
        "--optimizer.lr",
        "1e-3",
        "--optimizer.eps",
        "1e-5",
    ],
    "full": ["--policy.train", "full", "--optimizer.lr", "1e-4"],
    "from a LoRA": ["--lora", "start.safetensors"],
    "merged weights": ["--policy.forward", "merged"],
    "small micro-batches, std of the iteration": [
        "--policy.micro-batch",
        "3",
        "--advantage.std",
        "global",
        "--dgpo.kl-guidance-scale",
        "2",
        "--dgpo.guided-reference",
        "--dgpo.training-sigma",
        "timestep",
    ],
    "samples one by one, uneven shares": [
        "--rollout.batch-size",
        "1",
        "--policy.micro-batch",
        "1",
        "--rollout.group-size",
        "3",
    ],
    "growing and gated KL": [
        "--rewards",
        "tests.distributed_runs:Brightness",
        "tests.distributed_runs:Redness=0",
        "--regulariser.kl-gate",
        "tests.distributed_runs:Redness",
        "--regulariser.kl-growth",
        "100",
        "--dgpo.kl-weight",
        "1",
    ],
    "groups dropped": ["--rewards", "tests.distributed_runs:Flaky", "--iterations", "4"],
    "pairs": ["--objective", "diffusion_dpo"],
    "judged groups of any size": [
        "--data.source",
        "preferences",
        "--data.preferences",
        "votes",
        "--data.folder",
        "latents",
        "--iterations",
        "2",
    ],
    "policy gradient": [
        "--objective",
        "flow_grpo",
        "--rollout.solver",
        "euler",
        "--rollout.noise-level",
        "0.7",
        "--flow-grpo.clip-range",
        "0.1",
        "--ema.switch-ema-ref",
        "none",
    ],
    "regression": ["--objective", "nft", "--ema.switch-ema-ref", "0", "--optimizer.eps", "1e-5"],
    "centred rewards": [*CENTRED, "--policy.micro-batch", "2"],
    "sharded": [
        *SHARDED,
        "--iterations",
        "10",
        "--policy.micro-batch",
        "4",
        "--evaluation.every",
        "10",
        "--watch.every",
        "10",
    ],
    "sharded, groups split": [
        *SHARDED,
        "--rollout.groups",
        "1",
        "--rollout.group-size",
        "3",
        "--policy.micro-batch",
        "1",
    ],
    "sharded, groups dropped": [*SHARDED, "--rewards", "tests.distributed_runs:Flaky", "--iterations", "3"],
    "sharded, pairs": [*SHARDED, "--objective", "diffusion_dpo"],
    "sharded, policy gradient": [
        *SHARDED,
        "--objective",
        "flow_grpo",
        "--rollout.solver",
        "euler",
        "--rollout.noise-level",
        "0.7",
        "--flow-grpo.clip-range",
        "0.1",
        "--ema.switch-ema-ref",
        "none",
        "--flow-grpo.unconditional-gradient",
        "false",
    ],
    "sharded, regression": [*SHARDED, "--objective", "nft", "--ema.switch-ema-ref", "0", "--nft.optimizer-steps", "2"],
    "sharded, centred rewards, groups split": [
        *SHARDED,
        *CENTRED,
        "--rollout.groups",
        "1",
        "--rollout.group-size",
        "3",
    ],
    "hybrid shards": [*SHARDED[:-1], "hybrid"],
    "offline": ["--data.source", "offline", "--data.offline-groups", "7"],
}


class Brightness:
    """How bright an image is: changes with every pixel, so that a difference between runs shows."""

    independent_images = True

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        return images.mean((1, 2, 3), dtype=np.float64) / 255


class Redness(Brightness):
    """How red an image is."""

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        return super().__call__(images[..., :1], prompts, metadata)


class Flaky(Brightness):
    """Cannot score two of the prompts: whole processes may be left without a group."""

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        if prompts[0] in ("a dog", "two birds", "a house", "a tree"):
            raise RuntimeError("no answer")
        return super().__call__(images, prompts, metadata)


def make_workspace(folder: Path, pipeline: Path) -> None:
    """Writes the prompts and settings that `run` reads."""
    (folder / "prompts.txt").write_text(PROMPTS)
    factors = {f"transformer_blocks.0.attn.to_q.lora_{n}.weight": torch.full(s, 0.1) for n, s in START.items()}
    save_file(factors, folder / "start.safetensors")
    (folder / "small.yaml").write_text(yaml.safe_dump({"model": str(pipeline), **SETTINGS}))
    judge_pictures(folder / "votes")


def judge_pictures(folder: Path) -> None:
    """Rated pictures of six prompts: the first has two, the next three, and so on."""
    for number in range(6):
        for rating in range(2 + number):
            image, rng = folder / f"{number}-{rating}.png", np.random.default_rng([number, rating])
            said = Judgement(Prompt(f"judged {number}"), "rating", (image,), rating)
            append_judgement(folder / "preferences.jsonl", said)
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(image)


class Watched(Trainer):
    """Keeps the first iteration's gradient and latents."""

    gradient: torch.Tensor | None = None
    latents: torch.Tensor | None = None

    def __init__(self, config: Config, processes: Processes):
        super().__init__(build(config, processes))
        clip = self.learner._clip

        def kept_first() -> torch.Tensor:
            self._keep_gradient()
            return clip()

        self.learner._clip = kept_first  # type: ignore[method-assign]
        collect = self.source.collect

        def watched(iteration: int) -> list[Groups]:
            groups = collect(iteration)
            if self.latents is None:
                self.latents = groups[0].x0
            return groups

        self.source.collect = watched  # type: ignore[method-assign]

    def _keep_gradient(self) -> None:
        if self.gradient is None:
            gradient = {name: weight.grad for name, weight in self.models.weights.items() if weight.grad is not None}
            gradient = self.models.whole(gradient) if self.models.shards else gradient
            self.gradient = torch.cat([tensor.flatten() for tensor in gradient.values()])


def trained(config: Config, folder: Path, processes: Processes, resume: Path | None) -> Watched:
    """A trainer after its last iteration, with a checkpoint of a few before it in the longer scenarios."""
    trainer = Watched(config, processes)
    if resume is not None:
        trainer.resume(resume)
    if processes.first:
        folder.mkdir(parents=True)
    trainer.watch.begin(folder, trainer.iteration)
    trainer.prepare(folder, lambda: False)
    assert processes.waited_s == 0, "what the set-up waited is no part of an iteration"
    trainer.open_logs(folder, {})
    trainer.console.start_training(trainer.iteration, config.iterations)
    while trainer.iteration < config.iterations:
        if trainer.iteration > 5 and trainer.iteration == config.iterations - 3:
            trainer.save(folder)
        trainer.step()
    return trainer


def run(name: str, folder: Path, processes: Processes, resume: Path | None = None) -> dict[str, Any]:
    """Trains scenario `name` in `folder`; what came out, on process 0 of all."""
    config = configure(["small.yaml", *SCENARIOS[name]])
    with patch.object(processes, "meet", wraps=processes.meet) as met:
        trainer = trained(config, folder, processes, resume)
    weights: Any = trainer.models.whole(trainer.models.weights) if trainer.models.shards else trainer.models.weights
    trainer.close()
    assert trainer.latents is not None and trainer.gradient is not None
    latents = processes.gather(trainer.latents.tolist(), "latents")
    if not processes.first:
        return {}
    if trainer.models.shards:
        trainer.models.save(weights, folder / "pipeline", trainer.encoder.whole_pipeline())
    return {
        "latents": [sample for share in latents for sample in share],
        "gradient": trainer.gradient.tolist(),
        "weights": torch.cat([weight.detach().flatten() for weight in weights.values()]).tolist(),
        "metrics": read_metrics(folder / "metrics.jsonl"),
        "met": [call.args[0] for call in met.call_args_list],
    }


def main(arguments: list[str]) -> None:
    """`NAME …`: the scenarios to run. `NAME=FOLDER` resumes the run in FOLDER."""
    processes = connect(120)
    seen = {}
    for argument in arguments:
        name, _, resume = argument.partition("=")
        folder = Path(f"runs/{processes.count}-{argument.replace('/', '-')}")
        seen[argument] = run(name, folder, processes, Path(resume) if resume else None)
    processes.close()
    if processes.first:
        Path(f"{processes.count}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1:])
