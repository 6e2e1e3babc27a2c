"""CPU time and score per picture of the `ocr` reward beside RapidOCR as it comes, one thread each.

    python benchmarks/ocr_accuracy.py

Every picture shows its words, so the best mean score is 1. Writes `benchmarks/results/cpu/ocr_accuracy.json` and prints
the table of docs/rewards.md.
"""

import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from dgpo_fast.profiling.machine import commit
from dgpo_fast.prompts import Prompt, load_prompts
from dgpo_fast.rewards.shipped.ocr import OcrReward, normalise, similarity
from dgpo_fast.tiny import data

Reader = Callable[[np.ndarray], list[str]]
RESULTS = Path(__file__).parent / "results" / "cpu" / "ocr_accuracy.json"


def stock_reader() -> Reader:
    from rapidocr import RapidOCR

    threads = {f"EngineConfig.onnxruntime.{pool}_op_num_threads": 1 for pool in ("intra", "inter")}
    engine: Any = RapidOCR(params={"Global.log_level": "critical", **threads})
    return lambda images: ["".join(engine(image[..., ::-1].copy()).txts or ()) for image in images]


def phrase(text: str, rng: np.random.Generator) -> np.ndarray:
    """A label with `text` in letters of 10 to 32 pixels, turned by up to 8°, on mottled grey; uint8 (512, 512, 3)."""
    ground = Image.fromarray(rng.integers(100, 150, (512, 512, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(3))
    font = ImageFont.load_default(size=float(rng.integers(10, 33)))
    draw = ImageDraw.Draw(ground)
    _, _, width, height = draw.textbbox((0, 0), text, font=font)
    left, top = float(rng.integers(20, 480 - int(width))), float(rng.integers(20, 480 - int(height)))
    draw.rectangle((left - 4, top - 4, left + width + 4, top + height + 4), fill=(240, 235, 220))
    draw.text((left, top), text, fill=(40, 20, 20), font=font)
    return np.asarray(ground.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BICUBIC))


def spoilt(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)))
    return np.clip(blurred + rng.normal(0, 25, image.shape), 0, 255).astype(np.uint8)


def measure(read: Reader, images: np.ndarray, prompts: list[Prompt]) -> dict[str, float]:
    read(images[:2])
    start = time.process_time()  # not the clock on the wall, which counts what else the machine does
    texts = read(images)
    elapsed_ms = 1000 * (time.process_time() - start) / len(images)
    targets = [normalise(prompt.metadata["text"]) for prompt in prompts]
    scores = [similarity(target, normalise(text)) for target, text in zip(targets, texts, strict=True)]
    return {"images": len(images), "cpu_ms_per_image": round(elapsed_ms, 2), "mean_score": round(np.mean(scores), 4)}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    packages = {package: version(package) for package in ("rapidocr", "onnxruntime", "numpy", "pillow")}
    return {
        "cpu": processor(),
        "python": platform.python_version(),
        **packages,
        "commit": commit() or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    rng = np.random.default_rng(0)
    phrases, signs = load_prompts("signs", held_out=60).held_out, load_prompts("tiny-signs", held_out=200).held_out
    large = np.stack([phrase(prompt.metadata["text"], rng) for prompt in phrases])
    small = np.stack([data.render(prompt.metadata, rng) for prompt in signs])
    noisy = np.stack([spoilt(image, rng) for image in small])
    cases = {
        "512 × 512, one phrase in letters of 10 to 32 px, turned by up to 8°": (large, phrases),
        "32 × 32, three letters (`tiny-signs`)": (small, signs),
        "the same, blurred by 1 px and with noise of 25 / 255": (noisy, signs),
    }
    readers = {"RapidOCR as it comes": stock_reader(), "`ocr`": OcrReward(workers=1).read}
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(f"| pictures | {' | '.join(readers)} |\n|---|---|---|")
    for name, (images, prompts) in cases.items():
        results[name] = {reader: measure(read, images, prompts) for reader, read in readers.items()}
        cells = [f"{one['cpu_ms_per_image']:.0f} ms, {one['mean_score']:.2f}" for one in results[name].values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), "results": results}, indent=2, ensure_ascii=False)
    RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
