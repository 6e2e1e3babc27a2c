"""What separates an iteration of `sd35m-geneval` on an H200 from its floor: estimated from counts, not measured.

    python -m benchmarks.floor [--table]

The floor is the time of all FLOPs at the rate of a large matrix product. FLOPs are counted on tensors without data
(`dgpo_fast/models/work.py`), and the bytes of fused kernels are those that `python -m benchmarks.compiled_blocks H200`
has written. Both become milliseconds a sample by the rates of `Rates`, which are assumptions. Left out are prompts, the
optimizer, the loss, the solver's steps, what lies outside the transformer's blocks, and waiting for the host.

Writes `benchmarks/results/floor.json` and the tables in docs/performance.md; `--table` prints what is written already.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.compiled_blocks.__main__ import RESULTS as COUNTS
from benchmarks.compiled_blocks.programs import BLOCKS, DECODER, DTYPE, FROZEN, LATENT, MERGED, PLAIN
from benchmarks.pages import PERFORMANCE, replace_part
from dgpo_fast.config.command_line import run_command
from dgpo_fast.config.options import Config
from dgpo_fast.config.recipes import get_recipe
from dgpo_fast.engine.upsampling import in_phases
from dgpo_fast.errors import UserError
from dgpo_fast.models.families.sd3 import SD3, sd35_medium
from dgpo_fast.models.family import Guidance
from dgpo_fast.models.meta import sample_shape
from dgpo_fast.models.work import BACKWARD, DECODE, OLD, POLICY, REFERENCE, ROLLOUT, ModelWork
from dgpo_fast.objectives.first_level import first_sigma, is_shared
from dgpo_fast.profiling.machine import commit
from dgpo_fast.records import JsonObject

RESULT = Path(__file__).parent / "results/floor.json"
GPU, RECIPE = "H200", "sd35m-geneval"


@dataclass(frozen=True)
class Rates:
    """Assumed of an H200 in bf16, in TFLOP/s and TB/s.

    Attributes:
        matmul: of a matrix product of 8192³: the floor's.
        products: of matrix products and convolutions at the model's shapes.
        attention, attention_backward: of attention's forward and backward.
        fused: bytes of fused kernels.
        float8_products, float8_attention: of rollouts in float8.
    """

    matmul: float = 790.0
    products: float = 660.0
    attention: float = 390.0
    attention_backward: float = 350.0
    fused: float = 3.6
    float8_products: float = 990.0
    float8_attention: float = 546.0


RATES = Rates()


@dataclass(frozen=True)
class Flops:
    """TFLOP of one forward, backward or decode of a sample."""

    products: float
    attention: float

    @classmethod
    def of(cls, work: ModelWork, kind: str) -> "Flops":
        """Counted of a model without data."""
        counted = work.count(kind).flops
        return cls((counted["matmul"] + counted["convolution"]) / 1e12, counted["attention"] / 1e12)

    @property
    def total(self) -> float:
        return self.products + self.attention


@dataclass(frozen=True)
class Part:
    """One kind of work of an iteration.

    Attributes:
        name: of the work.
        rows: of a sample, on average.
        flops: of a row.
        fused_mb: that fused kernels read and write for a row.
    """

    name: str
    rows: float
    flops: Flops
    fused_mb: float

    @property
    def floor_ms(self) -> float:
        return 1e3 * self.rows * self.flops.total / RATES.matmul

    @property
    def gaps_ms(self) -> dict[str, float]:
        """What it takes longer than its floor, and why."""
        attention = RATES.attention_backward if self.name == BACKWARD else RATES.attention
        return {
            "products": 1e3 * self.rows * self.flops.products * (1 / RATES.products - 1 / RATES.matmul),
            "attention": 1e3 * self.rows * self.flops.attention * (1 / attention - 1 / RATES.matmul),
            "fused kernels": self.rows * self.fused_mb / RATES.fused / 1e3,
        }

    @property
    def estimate_ms(self) -> float:
        return self.floor_ms + sum(self.gaps_ms.values())


def rows_trained(config: Config, shared: bool) -> float:
    """Rows of a sample in each transformer's training forwards, on average over iterations."""
    levels = config.dgpo.timesteps
    if not shared:
        return levels
    drawn = levels / (config.dgpo.high_noise_steps or config.rollout.num_inference_steps)
    return levels - drawn * (1 - 1 / config.rollout.group_size)


def model_work(config: Config, merged: bool, phases: bool) -> ModelWork:
    """SD3.5-Medium without data."""
    family = SD3(sd35_medium())
    with torch.device("meta"):
        transformer = family.build_transformer()
    shape = sample_shape(family, LATENT, config.rollout.max_sequence_length, embedded=False)
    work = ModelWork(transformer, config.policy, DTYPE, shape, merged=merged)
    if phases:
        in_phases(work.vae.decoder)
    return work


def fused_mb(counts: Sequence[JsonObject], weights: str, direction: str = "forward") -> float:
    """Of all blocks for a row; see `compiled_blocks`."""
    of_kind = {row["part"]: row for row in counts if (row["weights"], row["direction"]) == (weights, direction)}
    return sum(number * of_kind[part]["fused_bytes"] / of_kind[part]["rows"] for part, number in BLOCKS.items()) / 1e6


def parts(config: Config, counts: Sequence[JsonObject]) -> list[Part]:
    """An iteration with all exact savings."""
    work, rollout = model_work(config, merged=True, phases=True), config.rollout
    forward, fused = Flops.of(work, REFERENCE), fused_mb(counts, FROZEN)
    trained = rows_trained(config, is_shared("auto", first_sigma(config), DTYPE))
    decoder = decoders(counts)[FROZEN]
    drawn = rollout.num_inference_steps * Guidance(rollout.guidance_scale).forwards
    return [
        Part(ROLLOUT, drawn, forward, fused),
        Part(DECODE, 1, Flops.of(work, DECODE), decoder["fused_bytes"] / decoder["rows"] / 1e6),
        Part(REFERENCE, trained * Guidance(config.dgpo.kl_guidance_scale).forwards, forward, fused),
        Part(OLD, trained, forward, fused),
        Part(POLICY, trained, Flops.of(work, POLICY), fused_mb(counts, MERGED)),
        Part(BACKWARD, trained, Flops.of(work, BACKWARD), fused_mb(counts, MERGED, "backward")),
    ]


def decoders(counts: Sequence[JsonObject]) -> dict[str, JsonObject]:
    """Counts of the decoder without and with phases."""
    return {row["weights"]: row for row in counts if row["part"] == DECODER}


def floors(config: Config, found: Sequence[Part]) -> dict[str, float]:
    """The floor of a row a sample with adapters, and what each saving takes off it, in ms."""
    plain = model_work(config, merged=False, phases=False)
    whole = rows_trained(config, shared=False)
    by_name = {part.name: part for part in found}
    trained = [by_name[name] for name in (REFERENCE, OLD, POLICY, BACKWARD)]
    unshared_ms = sum(part.floor_ms * (whole / by_name[OLD].rows - 1) for part in trained)
    adapters = Flops.of(plain, POLICY).total - by_name[POLICY].flops.total
    adapters += Flops.of(plain, BACKWARD).total - by_name[BACKWARD].flops.total
    savings = {
        "one row a group at the first noise level": unshared_ms,
        "the policy on merged weights": 1e3 * whole * adapters / RATES.matmul,
        "upsampling in four phases": 1e3 * (Flops.of(plain, DECODE).total - by_name[DECODE].flops.total) / RATES.matmul,
    }
    lower_ms = sum(part.floor_ms for part in found)
    return {"floor": lower_ms + sum(savings.values()), **{name: -saved for name, saved in savings.items()}}


def inexact(config: Config, found: Sequence[Part], counts: Sequence[JsonObject]) -> dict[str, float]:
    """What other choices would save of the estimate, in ms; each draws other pictures."""
    rollout = next(part for part in found if part.name == ROLLOUT)
    products, attention = rollout.rows * rollout.flops.products, rollout.rows * rollout.flops.attention
    # Float8 products have no GELU in them.
    epilogue_ms = rollout.rows * (fused_mb(counts, PLAIN) - fused_mb(counts, FROZEN)) / RATES.fused / 1e3
    steps = config.rollout.num_inference_steps
    return {
        "rollouts without guidance": rollout.estimate_ms * (1 - 1 / Guidance(config.rollout.guidance_scale).forwards),
        "products of rollouts in float8": 1e3 * products * (1 / RATES.products - 1 / RATES.float8_products)
        - epilogue_ms,
        f"{steps - 1} steps of a rollout in place of {steps}": rollout.estimate_ms / steps,
        "attention of rollouts in float8": 1e3 * attention * (1 / RATES.attention - 1 / RATES.float8_attention),
    }


def decoder_rows(config: Config, counts: Sequence[JsonObject]) -> list[JsonObject]:
    """The decoder without and with phases: TFLOP, bytes, and milliseconds by the same rates."""
    rows = []
    for name, phases in ((PLAIN, False), (FROZEN, True)):
        flops, counted = Flops.of(model_work(config, merged=True, phases=phases), DECODE), decoders(counts)[name]
        fused, library = (counted[f"{kind}_bytes"] / counted["rows"] / 1e6 for kind in ("fused", "library"))
        part = Part(DECODE, 1, flops, fused)
        products_ms = 1e3 * flops.products / RATES.products
        rows.append(
            {
                "decoder": "phases" if phases else "fast",
                "tflop": flops.total,
                "products_ms": products_ms,
                "fused_mb": fused,
                "fused_ms": part.gaps_ms["fused kernels"],
                "library_mb": library,
                "library_ms": library / RATES.fused / 1e3,
                "estimate_ms": part.estimate_ms,
            }
        )
    return rows


def estimated() -> JsonObject:
    """All of it. Raises UserError if the blocks were not counted."""
    counts = json.loads(COUNTS.read_text(encoding="utf-8")) if COUNTS.exists() else {}
    if GPU not in counts:
        raise UserError(f"{COUNTS.name} has no counts of the {GPU}: run python -m benchmarks.compiled_blocks {GPU}")
    config, programs = get_recipe(RECIPE), counts[GPU]["programs"]
    found = parts(config, programs)
    of_floor = floors(config, found)
    gaps = {f"{part.name}: {why}": ms for part in found for why, ms in part.gaps_ms.items()}
    return {
        "estimated, not measured": True,
        "gpu": GPU,
        "recipe": RECIPE,
        "assumed": asdict(RATES),
        "counted": {"torch": counts[GPU]["torch"], "commit": counts[GPU]["commit"]},
        "commit": commit() or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "parts": [
            {
                "name": part.name,
                "rows": part.rows,
                "tflop": part.rows * part.flops.total,
                "floor_ms": part.floor_ms,
                **part.gaps_ms,
                "estimate_ms": part.estimate_ms,
            }
            for part in found
        ],
        "floor_ms": of_floor,
        "lower_floor_ms": sum(of_floor.values()),
        "estimate_ms": sum(part.estimate_ms for part in found),
        "exact_ms": _largest_first(gaps),
        "inexact_ms": _largest_first(inexact(config, found, programs)),
        "decoder": decoder_rows(config, programs),
    }


def _largest_first(items: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(items.items(), key=lambda item: -item[1]))


def text(report: JsonObject) -> str:
    """The part of docs/performance.md."""
    assumed, total = report["assumed"], report["estimate_ms"]
    rates = (
        f"**Estimated, not measured.** {report['recipe']} on an {report['gpu']}, milliseconds a sample. Assumed: "
        f"{assumed['matmul']:g} TFLOP/s of a large matrix product, which makes the floor; {assumed['products']:g} of "
        f"products and convolutions at the model's shapes, {assumed['attention']:g} of attention and "
        f"{assumed['attention_backward']:g} of its backward, {assumed['fused']:g} TB/s of fused kernels; in float8 "
        f"{assumed['float8_products']:g} and {assumed['float8_attention']:g} TFLOP/s."
    )
    floor = [[name, f"{ms:+.1f}" if ms < 0 else f"{ms:.1f}"] for name, ms in report["floor_ms"].items()]
    floor[0][0] = "floor: a row a sample, adapters, plain decoder"
    floor.append(["**floor with the exact savings**", f"**{report['lower_floor_ms']:.1f}**"])
    made_of = [
        [
            part["name"],
            *(f"{part[key]:.2f}" for key in ("rows", "tflop")),
            *(f"{part[key]:.1f}" for key in ("floor_ms", "products", "attention", "fused kernels", "estimate_ms")),
        ]
        for part in report["parts"]
    ]
    sums = [sum(part[key] for part in report["parts"]) for key in ("tflop", "floor_ms")]
    sums += [sum(part[key] for part in report["parts"]) for key in ("products", "attention", "fused kernels")]
    made_of.append(["**all**", "", f"{sums[0]:.2f}", *(f"{ms:.1f}" for ms in sums[1:]), f"**{total:.1f}**"])
    head = ["work", "rows a sample", "TFLOP", "at the floor's rate", "products", "attention", "fused kernels", "all"]
    items = [
        [kind, name, f"{ms:.1f}", f"{ms / total:.1%}"]
        for kind in ("exact", "inexact")
        for name, ms in report[f"{kind}_ms"].items()
    ]
    columns = {
        "TFLOP": "tflop",
        "products, ms": "products_ms",
        "fused kernels, MB": "fused_mb",
        "fused kernels, ms": "fused_ms",
        "library calls, MB": "library_mb",
        "ms, if only that": "library_ms",
        "estimate, ms": "estimate_ms",
    }
    decoder = [
        [
            f"`{row['decoder']}`",
            *(f"{row[key]:,.0f}" if key.endswith("mb") else f"{row[key]:.2f}" for key in columns.values()),
        ]
        for row in report["decoder"]
    ]
    return "\n\n".join(
        [
            rates,
            _table(["floor", "ms"], floor),
            _table(head, made_of),
            "What separates the estimate from the lower floor (exact: the same result, faster), and what other choices "
            "would save (inexact: other pictures):",
            _table(["", "what", "ms", "of the estimate"], items),
            "The decoder of one image. Its library calls are limited by products: their traffic alone would take less.",
            _table(["`engine.decoder`", *columns], decoder),
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(args: list[str]) -> int:
    """Estimates and writes, or prints what is written."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.floor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="print what was estimated before")
    if not parser.parse_args(args).table:
        report = estimated()
        RESULT.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        replace_part("floor", text(report), PERFORMANCE)
    elif not RESULT.exists():
        raise UserError("nothing is estimated yet: run python -m benchmarks.floor")
    print(text(json.loads(RESULT.read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
