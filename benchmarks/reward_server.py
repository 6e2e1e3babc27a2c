"""What a reward costs over HTTP: pictures a second in this process, and through a reward server.

    python benchmarks/reward_server.py

The reward is `jpeg`, which takes less time than a picture's way through the server: the way is what is measured.
Pictures are photographs of 512 × 512 in groups of 16, of which 1, 4 and 16 are under way at a time. Writes
`benchmarks/results/cpu/reward_server.json`.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from dgpo_fast.rewards import golden, load_rewards
from dgpo_fast.rewards.protocol import Reward
from dgpo_fast.rewards.remote import png

RESULTS = Path(__file__).parent / "results" / "cpu" / "reward_server.json"
GROUPS, GROUP_SIZE = 16, 16
Scorer = Callable[[np.ndarray], Any]


def groups() -> list[np.ndarray]:
    """Crops of a photograph with a little noise, uint8 (16, 512, 512, 3) each."""
    photo, rng = golden.photo()[0], np.random.default_rng(0)
    made = []
    for _ in range(GROUPS):
        tops = rng.integers(0, photo.shape[0] - 511, GROUP_SIZE)
        crops = np.stack([photo[top : top + 512, :512] for top in tops]).astype(np.int16)
        made.append((crops + rng.integers(-3, 4, crops.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8))
    return made


def images_per_s(score: Scorer, images: list[np.ndarray], clients: int) -> float:
    """Pictures scored a second, wall clock, with so many groups under way at a time."""
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(score, images[:clients]))
        start = time.perf_counter()
        list(pool.map(score, images))
        return round(len(images) * GROUP_SIZE / (time.perf_counter() - start), 1)


def scorer(reward: Reward) -> Scorer:
    return lambda images: reward(images, ["a photo"] * len(images), [{}] * len(images))


def main() -> None:
    images = groups()
    results: dict[str, float] = {}
    results["in this process"] = images_per_s(scorer(load_rewards(["jpeg"]).rewards["jpeg"]), images, 1)
    command = [sys.executable, "-m", "dgpo_fast.reward_server", "--reward", "jpeg", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        address = re.search(r"http://\S+", server.stdout.readline())
        assert address, "the server did not start"
        reward = load_rewards([address[0]]).rewards[address[0]]
        for clients in (1, 4, 16):
            results[f"reward server, {clients} at a time"] = images_per_s(scorer(reward), images, clients)
    finally:
        server.terminate()
        server.wait()
    print("| where | images/s |\n|---|---|")
    for name, speed in results.items():
        print(f"| {name} | {speed:g} |")
    sent = round(float(np.mean([len(png.encode_png(image)) for image in images[0]])) * 4 / 3)
    machine = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "bytes_sent_per_image": sent, "images_per_s": results}
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
