"""CPU time and score per picture of the `ocr` reward beside RapidOCR as it comes, one thread each.

    python benchmarks/ocr.py

Every picture shows its words, so the best mean score is 1. Prints the table of docs/rewards.md.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from dgpo_fast.prompts import Prompt, load_prompts
from dgpo_fast.rewards.ocr import OcrReward, normalise, similarity
from dgpo_fast.tiny import data

Reader = Callable[[np.ndarray], list[str]]


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


def measure(read: Reader, images: np.ndarray, prompts: list[Prompt]) -> str:
    read(images[:2])
    start = time.process_time()  # not the clock on the wall, which counts what else the machine does
    texts = read(images)
    elapsed_ms = 1000 * (time.process_time() - start) / len(images)
    targets = [normalise(prompt.metadata["text"]) for prompt in prompts]
    scores = [similarity(target, normalise(text)) for target, text in zip(targets, texts, strict=True)]
    return f"{elapsed_ms:.0f} ms, {np.mean(scores):.2f}"


def main() -> None:
    rng = np.random.default_rng(0)
    phrases, signs = load_prompts("signs", held_out=60).held_out, load_prompts("tiny-signs", held_out=200).held_out
    small = np.stack([data.render(prompt.metadata, rng) for prompt in signs])
    cases = {
        "512 × 512, a phrase": (np.stack([phrase(p.metadata["text"], rng) for p in phrases]), phrases),
        "32 × 32, three letters": (small, signs),
        "the same, blurred and noisy": (np.stack([spoilt(image, rng) for image in small]), signs),
    }
    readers = {"RapidOCR as it comes": stock_reader(), "`ocr`": OcrReward(workers=1).read}
    print(f"| pictures | {' | '.join(readers)} |\n|---|---|---|")
    for name, (images, prompts) in cases.items():
        print(f"| {name} | {' | '.join(measure(read, images, prompts) for read in readers.values())} |", flush=True)


if __name__ == "__main__":
    main()
