"""Small evaluations, and what they wrote."""

import json
from pathlib import Path

PROMPTS = ["a cat", "a dog on a hill", "two birds", "a red house", "a boat", "a river"]


DRAWING = [
    "--prompts",
    "prompts.txt",
    "--num-inference-steps",
    "2",
    "--guidance-scale",
    "2",
    "--resolution",
    "none",
    "--max-sequence-length",
    "9",
    "--batch-size",
    "4",
    "--device",
    "cpu",
]


SMALL = [*DRAWING, "--rewards", "jpeg"]


def index(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


TRAINING = {
    "prompts": "prompts.txt",
    "rewards": ["jpeg"],
    "iterations": 2,
    "device": "cpu",
    "rollout": {
        "group_size": 2,
        "groups": 2,
        "num_inference_steps": 2,
        "max_sequence_length": 9,
        "batch_size": 4,
        "guidance_scale": 2.0,
    },
    "dgpo": {"timesteps": 1, "high_noise_steps": 2, "beta": 1000.0},
    "policy": {"lora_rank": 4, "lora_alpha": 8.0, "micro_batch": 4},
    "optimizer": {"lr": 0.03, "lr_decay": "none"},
    "ema": {"eval_every": 1},
    "evaluation": {"images": 6, "num_inference_steps": 3, "guidance_scale": 2.0},
}
