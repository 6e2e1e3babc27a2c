"""Iterations of DGPO here and in Flow-Factory, at equal work on a CPU, in turns.

    python -m benchmarks.flow_factory CHECKOUT [--python FILE] [--rounds 3] [--iterations 4]

CHECKOUT is a clone of github.com/X-GenGroup/Flow-Factory; `--python` an interpreter that has its packages and ours.
Both train a LoRA on the shipped pipeline through their own commands: 4 groups of 16 images, 10 Euler steps, 4 training
levels of the 8 noisiest, the KL term and θ_old's clip on, the same reward. Each round runs both at 16 and at 64 images
a forward, with guidance and without; every other round begins with the other trainer. The first iteration is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

from benchmarks.pages import PERFORMANCE, replace_part
from benchmarks.paired import ratio
from dgpo_fast import tiny
from dgpo_fast.profiling.machine import cpu_name, versions
from dgpo_fast.prompts import load_prompts
from dgpo_fast.run.metrics import write_json

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks/results/cpu/flow_factory.json"
GROUPS, GROUP, STEPS, LEVELS, HIGH_NOISE, SIDE = 4, 16, 10, 4, 8, 64
RANK, LR, BETA, KL_WEIGHT, CLIP_RANGE = 64, 3e-4, 100.0, 0.02, 0.01
CASES = {
    f"{rows} images a forward, {'guided' if guidance > 1 else 'unguided'}": (rows, guidance)
    for rows in (16, 64)
    for guidance in (1.0, 4.5)
}


def main() -> None:
    """Measures every case and writes the result after each round."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("checkout", type=Path)
    arguments.add_argument("--python", default=sys.executable)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--iterations", type=int, default=4)
    arguments.add_argument("--only", default="", help="cases whose name contains this text")
    given = arguments.parse_args()
    package = given.checkout / "src/flow_factory"
    if not package.is_dir():
        arguments.error(f"{given.checkout}: no Flow-Factory there (src/flow_factory): clone it first")
    cases = {name: case for name, case in CASES.items() if given.only in name}
    gradients = {name: _gradient(given, *case) for name, case in cases.items()}
    report = (
        _about(given) | {"gradient": gradients} | {"cases": {name: {"ours": [], "flow_factory": []} for name in cases}}
    )
    for number in range(given.rounds):
        for name, (rows, guidance) in cases.items():
            found = report["cases"][name]
            for which in ("ours", "flow_factory") if number % 2 == 0 else ("flow_factory", "ours"):
                with tempfile.TemporaryDirectory() as folder:
                    run = _ours if which == "ours" else _theirs
                    found[which].append(run(Path(folder), given, rows, guidance))
                print(f"{name}, {which}: {found[which][-1]}", flush=True)
            for key in ("s", "cpu_s"):
                found[f"ratio_{key}"] = ratio(
                    [run[key] for run in found["flow_factory"]], [run[key] for run in found["ours"]]
                )
        write_json(RESULT, report)
    replace_part("flow_factory CHECKOUT", table(report), PERFORMANCE)


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    head = ("case", "trainer", "iteration, s", "CPU seconds", "peak memory, MiB", "forwards", "rows", "with a gradient")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, case in report["cases"].items():
        for which, shown in (("ours", "dgpo_fast"), ("flow_factory", "Flow-Factory")):
            runs = case[which]
            s, cpu_s, peak = (statistics.median(run[key] for run in runs) for key in ("s", "cpu_s", "peak_mib"))
            counts = (runs[0][key] for key in ("forwards", "rows", "rows_with_gradient"))
            cells = (name, shown, f"{s:.2f}", f"{cpu_s:.2f}", f"{peak:.0f}", *(f"{count:.0f}" for count in counts))
            lines.append(f"| {' | '.join(cells)} |")
        apart = (f"{_ratio(case['ratio_s'])}", f"{_ratio(case['ratio_cpu_s'])}")
        lines.append(f"| | **Flow-Factory over dgpo_fast** | {' | '.join(apart)} | | | | |")
    largest = max(found["relative"] for found in report["gradient"].values())
    about = (
        f"{report['work']}; medians of {report['iterations']} iterations without the first one, forwards and rows of "
        f"all of them; {report['machine']}, torch {report['versions']['torch']}; Flow-Factory "
        f"{report['peer']['commit']}; {report['date']}. Gradients on the same noised latents differ by at most "
        f"{largest:.1e} of their norm."
    )
    return "\n".join([*lines, "", about])


def _ratio(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['median']:.2f}× ({low:.2f} to {high:.2f})"


def _about(given: argparse.Namespace) -> dict[str, Any]:
    git = ["git", "-C", str(given.checkout), "log", "-1", "--format=%H %cs"]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "peer": {"repository": "X-GenGroup/Flow-Factory", "commit": subprocess.check_output(git, text=True).strip()},
        "machine": cpu_name(),
        "versions": versions(torch.device("cpu"), None),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "iterations": given.iterations,
        "work": f"{GROUPS} groups of {GROUP} images of {SIDE} x {SIDE} pixels, {STEPS} Euler steps, {LEVELS} of the "
        f"{HIGH_NOISE} noisiest levels, LoRA of rank {RANK}, fp32",
    }


def _ours(folder: Path, given: argparse.Namespace, rows: int, guidance: float) -> dict[str, float]:
    settings = {
        "model": "tiny",
        "rewards": ["benchmarks.rewards:Brightness"],
        "iterations": given.iterations,
        "rollout": {
            "group_size": GROUP,
            "groups": GROUPS,
            "solver": "euler",
            "num_inference_steps": STEPS,
            "guidance_scale": guidance,
            "max_sequence_length": 0,
            "batch_size": rows,
        },
        "dgpo": {
            "beta": BETA,
            "timesteps": LEVELS,
            "high_noise_steps": HIGH_NOISE,
            "kl_guidance_scale": 1.0,
            "kl_weight": KL_WEIGHT,
            "clip_range": CLIP_RANGE,
        },
        "policy": {"train": "lora", "lora_rank": RANK, "lora_alpha": 2 * RANK, "micro_batch": rows},
        "optimizer": {"lr_decay": "none", "lr": LR},
        "evaluation": {"images": 2},
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = ["dgpo_fast.train", "--config", str(path), "--runs-dir", str(folder), "--name", "run"]
    counts = _run(folder, given, command, {})
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text("utf-8").splitlines()][1:]
    seconds = {"s": "iteration_s", "cpu_s": "cpu_s"}
    return {key: statistics.median(line[name] for line in lines) for key, name in seconds.items()} | counts


def _gradient(given: argparse.Namespace, rows: int, guidance: float) -> dict[str, float]:
    """How much its gradient differs from that of our loss on the same noised latents."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gradient.json"
        _theirs(Path(folder), given, rows, guidance, {"FLOW_FACTORY_GRADIENT": str(file)})
        found = json.loads(file.read_text("utf-8"))
    print(f"gradient: {found}", flush=True)
    return found


def _theirs(
    folder: Path, given: argparse.Namespace, rows: int, guidance: float, more: Mapping[str, str] = MappingProxyType({})
) -> dict[str, float]:
    prompts = [prompt.text for prompt in load_prompts("tiny-shapes", eval_source=None, held_out=2).train]
    for part in ("train", "test"):
        (folder / f"{part}.txt").write_text("\n".join(prompts[:64]), encoding="utf-8")
    sampling = {
        "resolution": SIDE,
        "per_device_batch_size": rows,
        "num_inference_steps": STEPS,
        "guidance_scale": guidance,
    }
    settings = {
        "mixed_precision": "no",
        "log": {
            "run_name": "run",
            "logging_backend": "none",
            "save_dir": str(folder / "saved"),
            "save_freq": 0,
            "verbose": False,
        },
        "data": {"dataset_dir": str(folder), "cache_dir": str(folder / "cache"), "dataloader_num_workers": 0},
        "model": {
            "model_name_or_path": str(tiny.PIPELINE_DIR),
            "model_type": "benchmarks.flow_factory.inside.Adapter",
            "master_weight_dtype": "fp32",
            "finetune_type": "lora",
            "lora_rank": RANK,
            "lora_alpha": 2 * RANK,
            "target_modules": "default",
        },
        "train": sampling
        | {
            "trainer_type": "dgpo",
            "max_epochs": given.iterations,
            "group_size": GROUP,
            "unique_sample_num_per_epoch": GROUPS,
            "gradient_step_per_epoch": 1,
            "advantage_aggregation": "sum",
            "global_std": False,
            "dpo_beta": BETA,
            "use_shared_noise": True,
            "clip_dsm": True,
            "clip_range": CLIP_RANGE,
            "kl_type": "v-based",
            "kl_beta": KL_WEIGHT,
            "kl_cfg": 1.0,
            "num_train_timesteps": LEVELS,
            "time_sampling_strategy": "discrete",
            "timestep_range": 0.6,
            "switch_ema_ref": 500,
            "ema_decay": 0.9,
            "ema_update_interval": 8,
            "ema_device": "cpu",
            "ema_ref_device": "cpu",
            "ref_param_device": "cpu",
            "latent_storage_dtype": "fp32",
            "learning_rate": LR,
            "seed": 0,
        },
        "scheduler": {"dynamics_type": "ODE"},
        "eval": sampling | {"eval_freq": 0},
        "rewards": [
            {
                "name": "brightness",
                "reward_model": "benchmarks.flow_factory.inside.Brightness",
                "batch_size": rows,
                "device": "cpu",
                "dtype": "float32",
            }
        ],
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    times = folder / "times.jsonl"
    counts = _run(folder, given, ["flow_factory.train", str(path)], {"FLOW_FACTORY_TIMES": str(times), **more})
    marks = [json.loads(line) for line in times.read_text("utf-8").splitlines()][1:]  # the first iteration ends at [1]
    apart = [{key: after[key] - before[key] for key in before} for before, after in pairwise(marks)]
    return {key: statistics.median(one[key] for one in apart) for key in ("s", "cpu_s")} | counts


def _run(folder: Path, given: argparse.Namespace, command: list[str], more: dict[str, str]) -> dict[str, float]:
    """Runs a module and gives its counts. An error of either trainer ends the measurement, with what it said."""
    counts = folder / "counts.json"
    path = os.pathsep.join(str(one) for one in (ROOT, ROOT / "kernels", given.checkout.resolve() / "src"))
    done = subprocess.run(
        [given.python, "-m", "benchmarks.flow_factory.counted", str(counts), *command],
        env=os.environ | more | {"PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return json.loads(counts.read_text("utf-8"))


if __name__ == "__main__":
    main()
