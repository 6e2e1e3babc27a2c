"""What reward workers and the prompt cache are worth.

    python benchmarks/rewards_and_prompts.py [RECIPE …] [--workers 0 1 2] [--iterations 8] [--setting value …]

For each recipe (tiny-shapes and tiny-ocr by default), one trainer goes through iterations that differ in the number of
worker processes alone, one after another in turn, so that what else the machine does falls on all alike. Then it
encodes prompts, and reads them back from the cache on disk. Medians go to
`benchmarks/results/<cpu or gpu>/rewards_and_prompts.json`.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from first_light import RESULTS, machine

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.models.prompt_cache import PromptCache
from dgpo_fast.models.prompt_encoder import PromptEncoder
from dgpo_fast.rewards import RewardPool
from dgpo_fast.trainer import Trainer

PROMPTS = 64
KEPT = ("iteration_s", "reward_busy_s", "reward_wait_s")


def alternate(trainer: Trainer, workers: list[int], iterations: int) -> dict[str, dict[str, float]]:
    """Workers → medians of seconds, over `iterations` of each after one that starts the processes."""
    config, lines = trainer.config, dict[int, list[dict[str, Any]]]()
    pools = {
        count: RewardPool(
            trainer.reward, workers=count, deadline_s=config.reward_deadline_s, device=trainer.device, note=print
        )
        for count in workers
    }
    for turn in range(iterations + 1):
        for count, pool in pools.items():
            trainer.source.worker.rewards = pool  # type: ignore[attr-defined]
            metrics = trainer.step()
            if turn:
                lines.setdefault(count, []).append(metrics)
    for pool in pools.values():
        pool.close()
    return {
        str(count): {name: statistics.median(line[name] for line in of) for name in KEPT} for count, of in lines.items()
    }


def encoding(trainer: Trainer, folder: Path) -> dict[str, float]:
    """Milliseconds per prompt to encode, to store and to read back, and the size of a file in kB."""
    texts = list(dict.fromkeys(prompt.text for prompt in trainer.prompts.train))[:PROMPTS]
    encoder = PromptEncoder(trainer.encoder.whole_pipeline(), trainer.config.rollout.max_sequence_length)
    encoder(texts[:1])
    plain = _median_ms(lambda text: encoder._encode(text), texts)
    cache = PromptCache(folder, {}, 2**40, print)
    rows = {text: encoder._encode(text) for text in texts}
    store = _median_ms(lambda text: cache.save(text, rows[text]), texts)
    read = _median_ms(cache.load, texts)
    size = max(path.stat().st_size for path in folder.glob("*/*/*.safetensors"))
    return {"encode_ms": plain, "store_ms": store, "read_ms": read, "file_kb": round(size / 1000, 1)}


def _median_ms(work: Any, texts: list[str]) -> float:
    times = []
    for text in texts:
        started = time.perf_counter()
        work(text)
        times.append(time.perf_counter() - started)
    return round(1000 * statistics.median(times), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=["tiny-shapes", "tiny-ocr"])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=8)
    options, settings = parser.parse_known_args()
    report: dict[str, Any] = {"machine": machine(), "settings": " ".join(settings), "recipes": {}}
    for recipe in options.recipes:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(build(configure([recipe, "--prompt-cache", f"{folder}/cache", *settings])))
            trainer.open_logs(Path(folder), {})
            trainer.console.start_training(0, len(options.workers) * (options.iterations + 1))
            trainer.encode_prompts()
            found = {
                "workers": alternate(trainer, options.workers, options.iterations),
                "prompts": encoding(trainer, Path(folder) / "measured"),
            }
            trainer.console.stop_training()
            trainer.close()
        report["recipes"][recipe] = found
        print(json.dumps({recipe: found}, indent=2))
    path = RESULTS / ("gpu" if torch.cuda.is_available() else "cpu") / "rewards_and_prompts.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
