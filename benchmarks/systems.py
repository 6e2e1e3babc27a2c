"""The trainer and the baselines, built from the same weights and timed in turns on the same inputs."""

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from dgpo_kernels import philox_normal
from torch import Tensor

from benchmarks.baselines import Baseline, Inputs, Oracle, Text
from benchmarks.faster_baselines import BASELINES
from benchmarks.rewards import Brightness
from dgpo_fast.build import build
from dgpo_fast.config.options import Config
from dgpo_fast.models.family import Guidance
from dgpo_fast.models.forward import predict
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.models.work import BACKWARD, DECODE, OLD, POLICY, REFERENCE, ROLLOUT
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.objectives.levels import draw_training_steps, training_sigmas
from dgpo_fast.rollout.sampler import initial_noise
from dgpo_fast.seeds import stream_seed
from dgpo_fast.trainer import Trainer

OURS = "ours"
Result = TypeVar("Result")
QUANTILES = (0.2, 0.5, 0.8)
PART_ROUNDS = 5
COMPARED_NUMEL = 50_000_000
"""Of a larger gradient, evenly chosen elements are compared."""


class Ours:
    """The trainer, with the engine at "auto"; nothing of its run is written."""

    def __init__(self, config: Config, device: torch.device):
        before, started = _memory_mib(device), time.monotonic()
        self.trainer = Trainer(build(config))
        self.trainer.console.rich.quiet = True
        if device.type == "cpu":
            self.trainer.phases._now = _clock(device)
        self.trainer.encode_prompts()
        self.trainer.console.start_training(0, 1)
        self.build_s, self.own_mib = time.monotonic() - started, _memory_mib(device) - before
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
        return self.trainer.sampler.decode(x0).images

    @torch.no_grad()
    def forward(self, x_t: Tensor, timestep: Tensor, text: Text, empty: Text) -> Tensor:
        """One forward of the reference."""
        return predict(
            self.trainer.models.base,
            x_t,
            timestep,
            TextEmbeds.of_samples({"prompt": text.prompt, "pooled": text.pooled}),
        )

    def inputs(self, iteration: int, groups: int) -> Inputs:
        """What the trainer draws in `iteration`."""
        trainer, config = self.trainer, self.trainer.config
        size, count = config.rollout.group_size, config.dgpo.timesteps
        prompts = trainer.source.prompts.draw(iteration)[:groups]
        samples = torch.arange(groups * size, device=self.device)
        steps = draw_training_steps(
            iteration, count=count, among=config.dgpo.high_noise_steps or trainer.draw.schedule.steps, seed=config.seed
        )
        sigmas = training_sigmas(trainer.draw.schedule, config.dgpo.training_sigma)
        seed = stream_seed(config.seed, "training noise")
        return Inputs(
            prompts=[prompt.text for prompt in prompts for _ in range(size)],
            noise=initial_noise(
                trainer.sampler.shape, samples, seed=stream_seed(config.seed, "initial noise"), draw=iteration
            ),
            sigmas=[float(sigmas[step]) for step in steps],
            timesteps=[float(trainer.draw.schedule.timesteps[step]) for step in steps],
            training_noise=[
                philox_normal(
                    trainer.sampler.shape, samples // size, seed=seed, draw=iteration * count + slot, device=self.device
                )
                for slot in range(count)
            ],
        )

    def gradient(self, batch: Batch, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of `batch`, by name."""
        weights = self.trainer.models.weights
        self.trainer.learner.objective.accumulate(batch, self.trainer.models, old)
        gradient = {name: weight.grad.clone() for name, weight in weights.items()}
        for weight in weights.values():
            weight.grad = None
        return gradient

    def flops(self, images: int) -> int:
        """Of an iteration that trains on all groups: what its samples need, however they are computed.

        At a first noise level that a group's samples share, a group needs one row; how often it is drawn is an average.
        """
        config, work = self.trainer.config, self.trainer.work
        trained = images * config.dgpo.timesteps
        if self.trainer.engine.choices.share_first_level:
            steps = self.trainer.draw.schedule.steps
            drawn = config.dgpo.timesteps / min(config.dgpo.high_noise_steps or steps, steps)
            trained -= round(drawn * (images - images / config.rollout.group_size))
        reference = Guidance(config.dgpo.kl_guidance_scale).forwards if config.dgpo.kl_weight > 0 else 1
        samples = {ROLLOUT: images * self.trainer.draw.forwards, DECODE: images, POLICY: trained, BACKWARD: trained}
        samples |= {REFERENCE: trained * reference}
        return work.flops(samples | ({OLD: trained} if config.dgpo.clip_range is not None else {}))


class Comparison:
    """A, B, C and C′ built beside a trainer, from its weights, and measured with it in turns.

    Each round begins with another one: whichever comes first finds a GPU that has rested. A baseline whose micro-batch
    does not fit the GPU's memory has half of it, as often as needed, down to one group. Fully fine-tuned, they do not
    fit on a GPU together: there one is measured after the other.

    Args:
        ours: the trainer.
        systems: which of the baselines, by name.
        groups: P, groups an iteration.
        rounds: measured iterations of each system, after one that warms up.
        until: the time of `time.monotonic` after which no further round is begun.
    """

    def __init__(self, ours: Ours, systems: Sequence[str], *, groups: int, rounds: int, until: float):
        self.ours, self.trainer, self.groups, self.rounds, self.until = ours, ours.trainer, groups, rounds, until
        self.device, self.config = ours.device, ours.trainer.config
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
            empty_cache(self.device)

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
            self.errors[name] = in_words(error)
            self.systems.pop(name, None)
            empty_cache(self.device)

    def check_gradients(self) -> dict[str, Any]:
        """Relative distance of each system's gradient of one group from one in higher precision, and the verdict.

        Ours and C may be twice as far away as B, which computes in the same dtype without any of the savings.
        """
        size, generator = self.config.rollout.group_size, torch.Generator().manual_seed(1)
        inputs = self.ours.inputs(0, groups=1)
        x0 = torch.randn(inputs.noise.shape, generator=generator).to(self.device)
        advantage = torch.randn(size, generator=generator).to(self.device)
        advantage = advantage - advantage.mean()
        text, empty = (self.trainer.encoder(prompts) for prompts in (inputs.prompts, [""]))
        index = torch.zeros(size, dtype=torch.int64, device=self.device)
        batch = Batch(0, x0, text, advantage, index, torch.arange(size).to(index), size, self.trainer.draw.schedule)
        plain = (x0, advantage, Text(**text.gathered()), Text(**empty.gathered()), inputs)
        self._build("oracle", Oracle)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = _flat(_gradient(self.systems.pop("oracle"), plain), self.weights)
        self.about.pop("oracle")
        empty_cache(self.device)
        found: dict[str, Tensor] = {}

        def add(name: str) -> None:
            started = time.monotonic()
            if name == OURS:
                gradient = self.ours.gradient(batch, self.old)
            else:
                gradient = self._fitting(name, lambda system: _gradient(system, plain))
            found[name] = _flat(gradient, self.weights)
            self.about[name]["first_gradient_s"] = time.monotonic() - started

        for names in self.turns:
            with self._built(names):
                for name in list(self.systems):
                    self._try(name, lambda name=name: add(name))
        verdict = _verdict(found, exact, self.trainer.models.dtype, [name for names in self.turns for name in names])
        errors = ", ".join(f"{name} {error:.2g}" for name, error in verdict["relative_error"].items())
        print(f"  gradients apart from one in higher precision: {errors}; allowed {verdict['budget']:.2g}", flush=True)
        return verdict

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
        for turn in range(self.rounds + 1):
            inputs = self.ours.inputs(turn, self.groups)
            for name in rotated(list(self.systems), turn):
                self._try(name, lambda n=name, i=inputs: times[n].append(self._iteration(n, i)))
                if times[name]:  # what is printed outlives a run that is cut off before its row is written
                    print(f"  {name}, iteration {turn}: {times[name][-1]['iteration']:.2f} s", flush=True)
            if time.monotonic() > self.until and turn > 0:
                break
        rows = {name: self._row(name, times[name]) for name in self.systems}
        for name, parts in self._parts(inputs).items():
            rows[name] |= parts
        if OURS in rows:
            rows[OURS]["engine"] = self.trainer.engine.choices.to_dict()
        return rows

    def _fitting(self, name: str, action: Callable[[Baseline], Result]) -> Result:
        """`action` of a baseline, with half of its micro-batch if the GPU has not the memory for all of it."""
        system, group = self.systems[name], self.config.rollout.group_size
        while True:
            try:
                return action(system)
            except torch.OutOfMemoryError:
                if system.micro_batch == group:
                    raise
            system.clear_gradient()
            system.phases.take()
            system.micro_batch = max(system.micro_batch // 2 // group, 1) * group
            empty_cache(self.device)

    def _iteration(self, name: str, inputs: Inputs) -> dict[str, float]:
        def timed_iteration(system: Any) -> tuple[dict[str, float], float | None]:
            return timed_with_memory(lambda: system.iteration(inputs, Brightness()), self.device)

        found = timed_iteration(self.ours) if name == OURS else self._fitting(name, timed_iteration)
        seconds, beyond_mib = found
        if not self.encodes:
            seconds["iteration"] -= seconds.get("encode", 0.0)  # random numbers stand for the text encoders' work
        return seconds if beyond_mib is None else seconds | {"beyond_mib": beyond_mib}

    def _row(self, name: str, times: list[dict[str, float]]) -> dict[str, Any]:
        measured, images, about = times[1:], self.groups * self.config.rollout.group_size, self.about[name]
        if not measured:
            return {"error": "not measured: the time was up after warming up", "warmup_s": times[0]["wall"], **about}
        beyond_mib = max(time.pop("beyond_mib", 0.0) for time in times)
        seconds = by_phase(measured)
        flops, middle = self.ours.flops(images), seconds["iteration"][1]
        return {
            **about,
            "micro_batch": self.config.policy.micro_batch_size if name == OURS else self.systems[name].micro_batch,
            "rounds": len(measured),
            "warmup_s": times[0]["wall"],
            "seconds": seconds,
            "images_per_s": images / middle,
            "tflop": flops / 1e12,
            "tflops": flops / middle / 1e12,
            "peak_memory_mib": about["own_mib"] + beyond_mib if self.device.type == "cuda" else None,
        }

    def _parts(self, inputs: Inputs) -> dict[str, dict[str, list[float]]]:
        """Milliseconds per image of each system's decoder, and of one forward of its reference with a group in it."""
        size = self.config.rollout.group_size
        text, empty = (self.trainer.encoder(prompts) for prompts in (inputs.prompts[:size], [""]))
        plain = Text(**text.gathered()), Text(**empty.gathered())
        x_t, timestep = inputs.noise[:size], torch.tensor(inputs.timesteps[0], device=self.device)
        times: dict[str, dict[str, list[float]]] = {name: {"decode_ms": [], "forward_ms": []} for name in self.systems}

        def measure(name: str) -> None:
            system = self.systems[name]
            forward = system.forward if name == OURS else torch.no_grad()(system.reference)
            actions = {"decode_ms": lambda: system.decode(x_t), "forward_ms": lambda: forward(x_t, timestep, *plain)}
            for part, action in actions.items():
                times[name][part].append(1e3 * timed(action, self.device)["iteration"] / size)

        for turn in range(PART_ROUNDS + 1):
            for name in rotated(list(self.systems), turn):
                self._try(name, lambda n=name: measure(n))
        return {name: {part: quantiles(of[1:]) for part, of in times[name].items()} for name in self.systems}


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """`names` in the order of round `turn`, each round beginning with the next one."""
    first = turn % max(len(names), 1)
    return [*names[first:], *names[:first]]


def _gradient(system: Baseline, batch: tuple[Any, ...]) -> dict[str, Tensor]:
    system.accumulate(*batch)
    gradient = {name: tensor.clone() for name, tensor in system.gradient().items() if tensor is not None}
    system.clear_gradient()
    return gradient


def _flat(gradient: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """All of it, or enough, as one fp64 vector on the CPU; 0 if a weight has no gradient."""
    every = -(-sum(weight.numel() for weight in weights.values()) // COMPARED_NUMEL)
    return torch.cat(
        [
            gradient.get(name, torch.zeros_like(weight)).detach().flatten()[::every].to("cpu", torch.float64)
            for name, weight in weights.items()
        ]
    )


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
        "dtype": str(dtype).removeprefix("torch."),
        "budget": budget,
        "relative_error": errors,
        "largest_difference_from_ours": apart,
    }


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds; on a CPU those that this process had of it, whatever else the machine does."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def timed(action: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds of `action` (`_clock`), beside the seconds by phase that it may return."""
    clock = _clock(device)
    _wait(device)
    started, wall = clock(), time.perf_counter()
    phases = action()
    _wait(device)
    seconds = {"iteration": clock() - started, "wall": time.perf_counter() - wall}
    return {**phases, **seconds} if isinstance(phases, dict) else seconds


def timed_with_memory(action: Callable[[], Any], device: torch.device) -> tuple[dict[str, float], float | None]:
    """`timed`, and the MiB that a GPU held at the peak beyond what it held before; None without a GPU."""
    if device.type != "cuda":
        return timed(action, device), None
    before = _memory_mib(device)
    torch.cuda.reset_peak_memory_stats(device)
    return timed(action, device), torch.cuda.max_memory_allocated(device) / 2**20 - before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def by_phase(times: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Quantiles of each phase's seconds."""
    return {phase: quantiles([of[phase] for of in times]) for phase in times[0]}


def quantiles(numbers: Sequence[float]) -> list[float]:
    """20 %, median, 80 %."""
    return [float(number) for number in np.quantile(numbers, QUANTILES)]


def _memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def empty_cache(device: torch.device) -> None:
    """Gives back what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def in_words(error: Exception) -> str:
    """What a row says in place of numbers."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:500]
