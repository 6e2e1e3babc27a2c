"""Seconds of an iteration against three baselines, and what each saving of the engine is worth.

    python benchmarks/throughput.py [--only TEXT …] [--minutes 9] [--rounds 3] [--groups P]
    python benchmarks/throughput.py paired [--pairs 8] [--iterations 6]
    python benchmarks/throughput.py tables

The first measures every row whose name contains one of TEXT, in one process: on a GPU at the size of SD3.5-Medium with
random weights, on a CPU on the shipped pipeline. Baselines A, B and C are those of `baselines.py`; ours is the
`Trainer`. All of them draw the same prompts and noise, and take turns. Before that, their gradients of one batch are
compared with one of higher precision: where they differ by more than rounding, the comparison is void.

On a GPU, what rollouts in float8 change is measured too: pictures and rewards of the same prompts and noise.

The second runs `python -m dgpo_fast.train` as a user does, with the engine's savings and without, in turns.
Each row is written to `benchmarks/results/<cpu or gpu>/throughput.json` as soon as it is measured, and
`throughput.md` is made of it by `throughput_tables.py`. A row that fails keeps the error's text, the next one goes on,
and the exit status is 1.
"""

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # this folder has a `kernels.py`, which would stand before the library of that name

import numpy as np
import psutil
import torch
from dgpo_kernels import philox_normal
from torch import Tensor

from benchmarks import float8
from benchmarks.baselines import BASELINES, Baseline, Brightness, Inputs, Oracle, Text
from benchmarks.paired import paired
from benchmarks.throughput_tables import read_report, with_tables, write_tables
from dgpo_fast.cli import configure, quieten_libraries
from dgpo_fast.config import Config
from dgpo_fast.engine.choices import memory_gib
from dgpo_fast.errors import UserError
from dgpo_fast.groups import draw_training_steps, stream_seed
from dgpo_fast.metrics import Loggers, write_json
from dgpo_fast.objectives import Batch
from dgpo_fast.profiling.machine import device_row, versions
from dgpo_fast.profiling.power import PowerMeter
from dgpo_fast.profiling.rates import measure_rates
from dgpo_fast.profiling.session import Lines
from dgpo_fast.profiling.work import BACKWARD, DECODE, OLD, POLICY, REFERENCE, ROLLOUT
from dgpo_fast.rollout import initial_noise, predict
from dgpo_fast.text import TextEmbeds
from dgpo_fast.trainer import Trainer

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
OURS = "ours"
QUANTILES = (0.2, 0.5, 0.8)
PART_ROUNDS = 5
COMPARED_NUMEL = 50_000_000
"""Of a larger gradient, evenly chosen elements are compared."""
SMALL_GIB = 100.0
"""On a smaller card there is no room for random text encoders, nor for full fine-tuning beside a baseline."""
ROW_S = {"cuda": 45.0, "cpu": 5.0}
"""A row that has less time left than this is not begun."""
SAVINGS: dict[str, list[str]] = {
    "all settings of the engine": [
        "--engine.compile", "off", "--engine.cuda-graphs", "off", "--engine.attention", "native", "--engine.linear",
        "torch", "--engine.decoder", "plain", "--engine.overlap", "False", "--engine.batch-timesteps", "False",
        "--engine.skip-equal-groups", "False", "--engine.keep-memory", "False",
    ],
    "engine.compile": ["--engine.compile", "off"],
    "engine.cuda_graphs": ["--engine.cuda-graphs", "off"],
    "engine.attention": ["--engine.attention", "native"],
    "engine.linear": ["--engine.linear", "torch"],
    "engine.decoder": ["--engine.decoder", "plain"],
    "engine.overlap": ["--engine.overlap", "False"],
    "engine.batch_timesteps": ["--engine.batch-timesteps", "False"],
    "engine.skip_equal_groups": ["--engine.skip-equal-groups", "False"],
    "policy.behaviour": ["--policy.behaviour", "adapter"],
}  # fmt: skip
"""Name of a saving → what switches it off."""
EQUAL_GROUPS = "engine.skip_equal_groups"
CHANGES: dict[str, list[str]] = {
    "policy.micro_batch auto": ["--policy.micro-batch", "auto"],
    "engine.rollout_precision fp8": ["--engine.rollout-precision", "fp8"],
}
"""What is not on by default. fp8 is inexact: other images are drawn."""
FOR_DEVICE = {
    "engine.cuda_graphs": "cuda", "engine.overlap": "cuda", "engine.linear": "cpu", "policy.micro_batch auto": "cuda",
    "engine.rollout_precision fp8": "cuda",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One kind of run."""

    train: str
    guided: bool
    group_size: int

    @property
    def name(self) -> str:
        trained = {"lora": "LoRA", "full": "full"}[self.train]
        return f"{trained}, {'guided' if self.guided else 'unguided'}, G {self.group_size}"


CASES = [Case(train, guided, size) for train in ("lora", "full") for size in (16, 24) for guided in (True, False)]
FIRST = CASES[0]


class Bench:
    """All rows of one device.

    Args:
        device: "cuda" or "cpu".
        groups: P, groups an iteration.
        rounds: measured iterations of each system, after one that warms up.
        minutes: time for all rows.
        only: texts, of which a row's name must contain one; all rows where there are none.
        path: the results' file; rows that are not measured now stay as they are.
        systems: which of A, B and C stand beside ours.
        settings: further settings of every run.
    """

    def __init__(
        self, device: str, *, groups: int, rounds: int, minutes: float, only: Sequence[str], path: Path,
        systems: Sequence[str] = tuple(BASELINES), settings: Sequence[str] = (),
    ):  # fmt: skip
        self.device, self.groups, self.rounds, self.only = torch.device(device), groups, rounds, only
        self.systems, self.settings = systems, list(settings)
        self.until = time.monotonic() + 60 * minutes
        self.path, self.report = path, read_report(path)
        self.failed = False
        self.kept: Ours | None = None

    def run(self) -> None:
        """Measures and writes all rows that were asked for."""
        for case in CASES:
            self.row("cases", case.name, lambda case=case: self.case(case))
        changes = {**SAVINGS, **CHANGES}
        # Last, since its rewards are others: what the rows before it share can go.
        for name in sorted(changes, key=lambda name: name == EQUAL_GROUPS):
            if FOR_DEVICE.get(name, self.device.type) == self.device.type:
                kind = "savings" if name in SAVINGS else "changes"
                self.row(kind, name, lambda name=name: self.compare(name, changes[name]))

        for name, settings in float8.RUNS.items() if self.device.type == "cuda" else ():
            self.row("float8", name, lambda settings=settings: float8.difference(settings))

    def row(self, section: str, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measures one row and writes it; an error is written in its place."""
        label = f"{section}: {name}"
        if self.only and not any(text in label for text in self.only):
            return
        if self.left_s < ROW_S[self.device.type]:
            print(f"{label}: not measured, the time is up", flush=True)
            return
        print(f"{label} …", flush=True)
        started = time.monotonic()
        try:
            row = measure()
            self.failed |= bool(row.get("failed"))
        except Exception as error:  # whatever fails in a row, the next one goes on
            traceback.print_exc()
            row = {"error": _in_words(error)}
            self.failed = True
        row["machine"] = self.machine
        row["took_s"] = round(time.monotonic() - started, 1)
        row["measured"] = {**self.versions, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        self.report.setdefault(section, {})[name] = row
        self.write()
        if section == "cases":
            torch._dynamo.reset()
        _empty_cache(self.device)

    def write(self) -> None:
        """Writes the results' file and the tables made of it."""
        self.report["machine"] = self.machine
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.report)
        try:
            write_tables(self.path)
        except Exception:  # the numbers are safe, and the tables can be made of them later
            traceback.print_exc()
            self.failed = True

    @property
    def left_s(self) -> float:
        return self.until - time.monotonic()

    @cached_property
    def versions(self) -> dict[str, str]:
        return versions(self.device, PowerMeter(self.device).driver)

    @cached_property
    def machine(self) -> dict[str, Any]:
        """The device and its rates, measured at the first row's end."""
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return asdict(device_row(self.device, dtype, measure_rates(self.device, dtype)))

    @property
    def small(self) -> bool:
        """Whether this is a GPU that has not the memory for everything."""
        return self.device.type == "cuda" and memory_gib(self.device) < SMALL_GIB

    def alone(self, case: Case) -> bool:
        """Whether no baseline fits beside ours."""
        return self.small and case.train == "full"

    def arguments(self, case: Case, text_encoders: bool = False) -> list[str]:
        """The settings of a case, as on a command line. The recipe's resolution, steps and objective stay.

        On a GPU it has `text_encoders` where encoding is timed.
        """
        size = str(case.group_size)
        args = ["sd35m-geneval", "--rewards", "benchmarks.baselines:Brightness", "--rollout.group-size", size]
        args += ["--rollout.groups", str(self.groups), "--rollout.batch-size", size, "--policy.micro-batch", size]
        args += ["--policy.train", case.train, "--evaluation.images", "2", "--reward-workers", "0"]
        args += [] if case.guided else ["--rollout.guidance-scale", "1"]
        if self.device.type == "cuda":
            args += ["--random-weights", "True", "--random-text-encoders", str(text_encoders)]
            args += ["--ema.offload", "True"] if case.train == "full" else []
            args += ["--policy.micro-batch", "4", "--optimizer.name", "adamw8bit"] if self.alone(case) else []
            return [*args, *self.settings]
        args += ["--model", "tiny", "--prompts", "tiny-shapes", "--rollout.resolution", "32", "--device", "cpu"]
        return [*args, "--rollout.max-sequence-length", "0", "--policy.lora-rank", "16", *self.settings]

    def case(self, case: Case) -> dict[str, Any]:
        """A, B, C and ours on the same inputs; ours alone where nothing fits beside it."""
        args = self.arguments(case, text_encoders=case.train == "lora" and not self.small)
        comparison = Comparison(Ours(configure(args), self.device), self, () if self.alone(case) else self.systems)
        row: dict[str, Any] = {"settings": args, "images": self.groups * case.group_size, "note": self.note(case)}
        try:
            row["same_gradient"] = {} if self.alone(case) else comparison.check_gradients()
        except Exception as error:  # the times are still worth having, though they are no comparison
            traceback.print_exc()
            row["same_gradient"] = {"error": _in_words(error)}
        row["systems"] = comparison.measure()
        void = bool(row["same_gradient"]) and not row["same_gradient"].get("same")
        row["failed"] = void or any("error" in system for system in row["systems"].values())
        return row

    def note(self, case: Case) -> str:
        """What a row has otherwise than its name says, or than the same row of another card."""
        if self.alone(case):
            return "ours alone: micro-batches of 4, 8-bit AdamW, an average in the CPU's memory"
        full = self.device.type == "cuda" and case.train == "full"
        notes = ["an average in the CPU's memory"] if full else []
        return "; ".join([*notes, "encoding left out"] if full or self.small else notes)

    def compare(self, name: str, change: list[str]) -> dict[str, Any]:
        """Ours with and without a change of its settings, in turns."""
        args = self.arguments(FIRST)
        if name == EQUAL_GROUPS:
            self.kept = None
            _empty_cache(self.device)
            args += ["--rewards", "benchmarks.baselines:HalfEqual"]
            ours = Ours(configure(args), self.device)
        else:
            ours = self.kept = self.kept or Ours(configure(args), self.device)
        pair = {OURS: ours, "changed": Ours(configure([*args, *change]), self.device)}
        times: dict[str, list[dict[str, float]]] = {name: [] for name in pair}
        warmup = {name: _timed(system.step, self.device)["wall"] for name, system in pair.items()}
        for _ in range(max(self.rounds, 3)):
            for name, system in pair.items():
                times[name].append(_timed(system.step, self.device))
            if self.left_s < 0:
                break
        ratios = [b["iteration"] / a["iteration"] for a, b in zip(*times.values(), strict=True)]
        return {
            "settings": [*args, *change], "ratio": _quantiles(ratios), "rounds": len(ratios), "warmup_s": warmup,
            "seconds": {name: _by_phase(of) for name, of in times.items()},
            "choices": {name: system.trainer.engine.choices.to_dict() for name, system in pair.items()},
            "peak_memory_mib": {name: system.peak_mib for name, system in pair.items()},
        }  # fmt: skip


class Ours:
    """The trainer, with the engine at "auto"; nothing of its run is written."""

    def __init__(self, config: Config, device: torch.device):
        before, started = _memory_mib(device), time.monotonic()
        self.trainer = Trainer(config)
        self.trainer.metrics = Lines()
        self.trainer.loggers = Loggers(config.log, Path(), {}, print)
        self.trainer.console.rich.quiet = True
        if device.type == "cpu":
            self.trainer.phases._now = _clock(device)
        self.trainer.encode_prompts()
        self.trainer.console.start_training(0, 1)
        self.build_s, self.own_mib, self.peak_mib = time.monotonic() - started, _memory_mib(device) - before, None
        self.device = device

    def iteration(self, inputs: Inputs, reward: Brightness) -> dict[str, float]:
        """One step; it draws `inputs` itself. Seconds by phase."""
        return self.step()

    def step(self) -> dict[str, float]:
        """One iteration of the trainer; seconds by phase."""
        line = self.trainer.step()
        return {phase: line[f"{phase}_s"] for phase in ("rollout", "decode", "train", "optimizer")}

    def decode(self, x0: Tensor) -> np.ndarray:
        """As the trainer does."""
        return self.trainer.sampler.decode(x0)

    @torch.no_grad()
    def forward(self, x_t: Tensor, timestep: Tensor, text: Text, empty: Text) -> Tensor:
        """One forward of the reference."""
        return predict(self.trainer.models.base, x_t, timestep, TextEmbeds(text.prompt, text.pooled))

    def inputs(self, iteration: int, groups: int) -> Inputs:
        """What the trainer draws in `iteration`."""
        trainer, config = self.trainer, self.trainer.config
        size, count = config.rollout.group_size, config.dgpo.timesteps
        prompts = trainer.source.prompts.draw(iteration)[:groups]
        samples = torch.arange(groups * size, device=self.device)
        steps = draw_training_steps(
            iteration, count=count, among=config.dgpo.high_noise_steps or trainer.schedule.steps, seed=config.seed
        )
        seed = stream_seed(config.seed, "training noise")
        return Inputs(
            prompts=[prompt.text for prompt in prompts for _ in range(size)],
            noise=initial_noise(
                trainer.sampler.shape, samples, seed=stream_seed(config.seed, "initial noise"), draw=iteration
            ),
            sigmas=[float(trainer.schedule.sigmas[step]) for step in steps],
            timesteps=[float(trainer.schedule.timesteps[step]) for step in steps],
            training_noise=[
                philox_normal(trainer.sampler.shape, samples // size, seed=seed, draw=iteration * count + slot,
                              device=self.device)
                for slot in range(count)
            ],
        )  # fmt: skip

    def gradient(self, batch: Batch, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of `batch`, by name."""
        weights = self.trainer.models.weights
        self.trainer.learner.objective.accumulate(batch, self.trainer.models, old)
        gradient = {name: weight.grad.clone() for name, weight in weights.items()}
        for weight in weights.values():
            weight.grad = None
        return gradient

    def flops(self, images: int) -> int:
        """Of an iteration that trains on all groups: what its samples need, however they are computed."""
        config, work = self.trainer.config, self.trainer.work
        forwards = config.rollout.num_inference_steps * (2 if config.rollout.guidance_scale > 1 else 1)
        trained = images * config.dgpo.timesteps
        guided_reference = config.dgpo.kl_guidance_scale > 1 and config.dgpo.kl_weight > 0
        samples = {ROLLOUT: images * forwards, DECODE: images, POLICY: trained, BACKWARD: trained}
        samples |= {REFERENCE: trained * (2 if guided_reference else 1)}
        return work.flops(samples | ({OLD: trained} if config.dgpo.clip_range is not None else {}))


class Comparison:
    """A, B and C built beside a trainer, from its weights, and measured with it in turns.

    Fully fine-tuned, they do not fit on a GPU together: there one is measured after the other.
    """

    def __init__(self, ours: Ours, bench: Bench, systems: Sequence[str]):
        self.ours, self.bench, self.trainer = ours, bench, ours.trainer
        self.device, self.config = bench.device, ours.trainer.config
        self.encodes = self.device.type == "cpu" or self.config.random_text_encoders
        self.pipeline = self.trainer.encoder.whole_pipeline()
        self._move_weights()
        self.base = {name: tensor.detach() for name, tensor in self.trainer.models.base.state_dict().items()}
        self.systems: dict[str, Any] = {}
        self.about: dict[str, dict[str, float]] = {}
        self.errors: dict[str, str] = {}
        self.about[OURS] = {"build_s": ours.build_s, "own_mib": ours.own_mib}
        apart = self.config.policy.train == "full" and self.device.type == "cuda"
        everyone = [*systems, OURS]
        self.turns = [[name] for name in everyone] if apart else [everyone]

    @contextmanager
    def _built(self, names: Sequence[str]) -> Iterator[None]:
        """With the systems of `names` there, those but that cannot be built."""
        for name in names:
            if name == OURS:
                self.systems[name] = self.ours
            elif name not in self.systems and name not in self.errors:
                self._try(name, lambda name=name: self._build(name, BASELINES[name]))
        yield
        if len(self.turns) > 1:
            self.systems.clear()
            _empty_cache(self.device)

    def _move_weights(self) -> None:
        """Away from where training begins, since the gradient of much of a LoRA is 0 there."""
        models, generator = self.trainer.models, torch.Generator().manual_seed(0)
        if self.config.policy.train == "full":
            self.weights = self.old = {name: weight.detach() for name, weight in models.weights.items()}
            return

        def near(weights: Mapping[str, Tensor], distance: float) -> dict[str, Tensor]:
            return {
                name: w + (distance * (float(w.float().std()) or 0.1) * torch.randn(w.shape, generator=generator)).to(w)
                for name, w in weights.items()
            }

        with torch.no_grad():
            models.load_weights(near(models.weights, 0.1))
        self.weights = {name: weight.detach().clone() for name, weight in models.weights.items()}
        # In bf16 a sample may fall on the other side of the clip by rounding, and then its gradient is another one.
        self.old = near(self.weights, 0.05) if models.dtype == torch.float32 else dict(self.weights)
        self.trainer.learner.old.load(self.old)

    def _build(self, name: str, kind: type[Baseline]) -> None:
        before, started = _memory_mib(self.device), time.monotonic()
        system = kind(self.pipeline, self.base, self.weights, self.config, self.trainer.models.dtype)
        system.set_old(self.old)
        if self.device.type == "cpu":
            system.phases._now = _clock(self.device)
        self.systems[name] = system
        self.about[name] = {"build_s": time.monotonic() - started, "own_mib": _memory_mib(self.device) - before}

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # one system's failure leaves the others' rows
            traceback.print_exc()
            self.errors[name] = _in_words(error)
            self.systems.pop(name, None)
            _empty_cache(self.device)

    def check_gradients(self) -> dict[str, Any]:
        """Relative distance of each system's gradient of one group from one in higher precision, and the verdict.

        Ours and C may be twice as far away as B, which computes in the same dtype without any of the savings.
        """
        size, generator = self.config.rollout.group_size, torch.Generator().manual_seed(1)
        inputs = self.ours.inputs(0, groups=1)
        x0 = torch.randn(inputs.noise.shape, generator=generator).to(self.device)
        advantage = torch.randn(size, generator=generator).to(self.device)
        advantage = advantage - advantage.mean()
        text, empty = self.trainer.encoder(inputs.prompts), self.trainer.encoder([""])
        index = torch.zeros(size, dtype=torch.int64, device=self.device)
        batch = Batch(0, x0, text, empty, advantage, index, size, self.trainer.schedule)
        plain = (x0, advantage, Text(text.prompt, text.pooled), Text(empty.prompt, empty.pooled), inputs)
        self._build("oracle", Oracle)
        exact = _flat(_gradient(self.systems.pop("oracle"), plain), self.weights)
        self.about.pop("oracle")
        _empty_cache(self.device)
        found: dict[str, Tensor] = {}

        def add(name: str) -> None:
            started = time.monotonic()
            ours = name == OURS
            gradient = self.ours.gradient(batch, self.old) if ours else _gradient(self.systems[name], plain)
            found[name] = _flat(gradient, self.weights)
            self.about[name]["first_gradient_s"] = time.monotonic() - started

        for names in self.turns:
            with self._built(names):
                for name in list(self.systems):
                    self._try(name, lambda name=name: add(name))
        return _verdict(found, exact, self.trainer.models.dtype, [name for names in self.turns for name in names])

    def measure(self) -> dict[str, dict[str, Any]]:
        """Each system's row."""
        rows: dict[str, dict[str, Any]] = {}
        for names in self.turns:
            with self._built(names):
                rows |= self._measure()
        rows |= {name: {"error": text} for name, text in self.errors.items()}
        return {name: rows[name] for name in (*BASELINES, OURS) if name in rows}

    def _measure(self) -> dict[str, dict[str, Any]]:
        """Rows of the systems that are there, in turns."""
        times: dict[str, list[dict[str, float]]] = {name: [] for name in self.systems}
        for turn in range(self.bench.rounds + 1):
            inputs = self.ours.inputs(turn, self.bench.groups)
            for name, system in list(self.systems.items()):
                self._try(name, lambda n=name, s=system, i=inputs: times[n].append(self._iteration(s, i)))
            if self.bench.left_s < 0 and turn > 0:
                break
        rows = {name: self._row(times[name]) | self.about[name] for name in self.systems}
        for name, system in list(self.systems.items()):
            self._try(name, lambda n=name, s=system, i=inputs: rows[n].update(self._parts(n, s, i)))
        if OURS in rows:
            rows[OURS]["engine"] = self.trainer.engine.choices.to_dict()
        return rows

    def _iteration(self, system: Any, inputs: Inputs) -> dict[str, float]:
        before = _memory_mib(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = _timed(lambda: system.iteration(inputs, Brightness()), self.device)
        if not self.encodes:
            seconds["iteration"] -= seconds.get("encode", 0.0)  # random numbers stand for the text encoders' work
        if self.device.type == "cuda":
            seconds["beyond_mib"] = torch.cuda.max_memory_allocated(self.device) / 2**20 - before
        return seconds

    def _row(self, times: list[dict[str, float]]) -> dict[str, Any]:
        measured, images = times[1:], self.bench.groups * self.config.rollout.group_size
        if not measured:
            return {"error": "not measured: the time was up after warming up", "warmup_s": times[0]["wall"]}
        beyond = [time.pop("beyond_mib", 0.0) for time in times]
        seconds = _by_phase(measured)
        flops, middle = self.ours.flops(images), seconds["iteration"][1]
        return {
            "rounds": len(measured), "warmup_s": times[0]["wall"], "seconds": seconds,
            "images_per_s": images / middle, "tflop": flops / 1e12, "tflops": flops / middle / 1e12,
            "beyond_mib": max(beyond) if self.device.type == "cuda" else None,
        }  # fmt: skip

    def _parts(self, name: str, system: Any, inputs: Inputs) -> dict[str, list[float]]:
        """Milliseconds per image of the decoder, and of one forward of the reference with a group in it."""
        size = self.config.rollout.group_size
        text, empty = self.trainer.encoder(inputs.prompts[:size]), self.trainer.encoder([""])
        plain = Text(text.prompt, text.pooled), Text(empty.prompt, empty.pooled)
        x_t, timestep = inputs.noise[:size], torch.tensor(inputs.timesteps[0], device=self.device)
        forward = system.forward if name == OURS else torch.no_grad()(system.reference)
        actions = {"decode_ms": lambda: system.decode(x_t), "forward_ms": lambda: forward(x_t, timestep, *plain)}
        times: dict[str, list[float]] = {part: [] for part in actions}
        for _ in range(PART_ROUNDS + 1):
            for part, action in actions.items():
                times[part].append(1e3 * _timed(action, self.device)["iteration"] / size)
        return {part: _quantiles(of[1:]) for part, of in times.items()}


def _gradient(system: Baseline, batch: tuple[Any, ...]) -> dict[str, Tensor]:
    system.accumulate(*batch)
    gradient = {name: tensor.clone() for name, tensor in system.gradient().items() if tensor is not None}
    system.clear_gradient()
    return gradient


def _flat(gradient: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """All of it, or enough, as one fp64 vector on the CPU; 0 where a weight has no gradient."""
    every = -(-sum(weight.numel() for weight in weights.values()) // COMPARED_NUMEL)
    return torch.cat([
        gradient.get(name, torch.zeros_like(weight)).detach().flatten()[::every].to("cpu", torch.float64)
        for name, weight in weights.items()
    ])  # fmt: skip


def _verdict(found: Mapping[str, Tensor], exact: Tensor, dtype: torch.dtype, wanted: Sequence[str]) -> dict[str, Any]:
    norm, largest = float(torch.linalg.norm(exact)), float(exact.abs().max())
    errors = {name: float(torch.linalg.norm(one - exact)) / norm for name, one in found.items()}
    eps = torch.finfo(dtype).eps
    budget = 2 * (errors.get("B", float("nan")) + eps)
    ours = found.get(OURS, torch.full_like(exact, float("nan")))
    apart = {name: float((one - ours).abs().max()) / largest for name, one in found.items() if name != OURS}
    return {
        "same": OURS in found and all(error <= budget for error in errors.values()),
        "missing": [name for name in wanted if name not in found],
        "dtype": str(dtype).removeprefix("torch."), "budget": budget, "relative_error": errors,
        "largest_difference_from_ours": apart,
    }  # fmt: skip


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds; on a CPU those that this process had of it, whatever else the machine does."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def _timed(action: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds of `action` (`_clock`), beside the seconds by phase that it may return."""
    clock = _clock(device)
    _wait(device)
    started, wall = clock(), time.perf_counter()
    phases = action()
    _wait(device)
    seconds = {"iteration": clock() - started, "wall": time.perf_counter() - wall}
    return {**phases, **seconds} if isinstance(phases, dict) else seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _by_phase(times: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {phase: _quantiles([of[phase] for of in times]) for phase in times[0]}


def _quantiles(numbers: Sequence[float]) -> list[float]:
    """20 %, median, 80 %."""
    return [float(number) for number in np.quantile(numbers, QUANTILES)]


def _memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def _empty_cache(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _in_words(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:500]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "paired", "tables"])
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", type=int, default=None)
    parser.add_argument("--systems", nargs="+", choices=list(BASELINES), default=list(BASELINES))
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=None, help="folder; default: benchmarks/results/<cpu or gpu>")
    # Named in the first place alone: elsewhere the value of a setting would be taken for it.
    named = sys.argv[1:] and (not sys.argv[1].startswith("-") or sys.argv[1] in ("-h", "--help"))
    options, settings = parser.parse_known_args(sys.argv[1:] if named else ["run", *sys.argv[1:]])
    quieten_libraries()
    folder = options.results or RESULTS / ("gpu" if options.device.startswith("cuda") else "cpu")
    path = folder / "throughput.json"
    if options.what == "tables":
        write_tables(path)
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
        return 0
    groups = options.groups or (2 if options.device.startswith("cuda") else 4)
    bench = Bench(options.device, groups=groups, rounds=options.rounds, minutes=options.minutes, only=options.only,
                  path=path, systems=options.systems, settings=settings)  # fmt: skip
    if options.what == "paired":
        bench.only = []
        bench.row("paired", "default run", lambda: paired(options.pairs, options.iterations, SAVINGS, settings))
    else:
        bench.run()
    return int(bench.failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
