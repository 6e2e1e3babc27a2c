"""The parts of a run and one iteration of it: rollout → reward → advantage → gradient → step."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SD3Transformer2DModel

from dgpo_fast.config import Config
from dgpo_fast.config.reading import to_dict
from dgpo_fast.config.recipes import prompts_note
from dgpo_fast.distributed import ALONE, BatchPart, Processes, Share, SharedError, place
from dgpo_fast.distributed.checks import DriftError, checksum, compare
from dgpo_fast.distributed.shards import Shards, make_shards
from dgpo_fast.engine import Engine
from dgpo_fast.engine.checkpointing import checkpoint_blocks
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.held_out import Evaluation, evaluate
from dgpo_fast.evaluation.results import BEFORE_FILE, earlier_evaluation, write_results, written_to
from dgpo_fast.learning.learner import Learner
from dgpo_fast.learning.optimizers import load_optimizer, optimizer_tensors, state_bytes
from dgpo_fast.memory.plan import MemoryPlan
from dgpo_fast.models.loading import make_pipeline, pick_device, pick_dtype, read_model
from dgpo_fast.models.policy import PolicyModels, Weights
from dgpo_fast.models.prompt_encoder import make_prompt_encoder
from dgpo_fast.models.random_weights import random_weights_note
from dgpo_fast.models.work import WorkMeter
from dgpo_fast.objectives.advantages import advantages
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.prompts import load_prompts
from dgpo_fast.prompts.dealing import GroupSampler
from dgpo_fast.rewards import RewardPool, count_workers, load_rewards
from dgpo_fast.rewards.group_log import GroupLog
from dgpo_fast.rollout.offline import OfflineSource
from dgpo_fast.rollout.online import OnlineSource, RolloutWorker
from dgpo_fast.rollout.sampler import Sampler
from dgpo_fast.rollout.schedule import make_schedule
from dgpo_fast.rollout.source import Groups, Source
from dgpo_fast.run.checkpoint import CheckpointWriter, State, load_newest
from dgpo_fast.run.console import Console
from dgpo_fast.run.metrics import Loggers, MetricsFile, Phases, peak_memory_mib
from dgpo_fast.run.version import code_version
from dgpo_fast.seeds import stream_seed
from dgpo_fast.wording import counted, number, resume_command


class Trainer:
    """One run: its models, prompts, rewards, optimizer and averages, ready to step.

    Everything that can be wrong with a configuration is found here, before a folder is made.

    Args:
        config: every setting of the run.
        processes: those that share the run; the first one alone writes files and talks to the user.
    """

    def __init__(self, config: Config, processes: Processes = ALONE):
        self.processes = processes
        self.console = Console(quiet=not processes.first)
        self.writer: CheckpointWriter | None = None
        place(config.rollout.groups, config.rollout.group_size, processes.count)  # refuses processes without work
        if config.evaluation.images < processes.count:
            raise UserError(f"evaluation.images {config.evaluation.images}: {processes.count} processes need one each")
        self.prompts = load_prompts(config.prompts, eval_source=config.eval_prompts, held_out=config.evaluation.images)
        self.device = processes.own_device(pick_device(config.device))
        self.reward = load_rewards(config.rewards, self.device)
        self.reward.check_prompts([*self.prompts.train, *self.prompts.held_out])
        if config.data.source == "online":  # of offline groups, each is drawn and scored by one process
            self.reward.check_processes(processes.count, config.rollout.groups)
        model = read_model(config)
        self.reward.try_out(
            [*self.prompts.train, *self.prompts.held_out],
            (config.rollout.group_size, 1),
            config.rollout.resolution or model.side,
        )
        self.reward_pool = RewardPool(
            self.reward,
            workers=count_workers(config.reward_workers, self.device),
            deadline_s=config.reward_deadline_s,
            device=self.device,
            note=self.console.note,
        )
        dtype = pick_dtype(config.precision, self.device)
        self.memory = MemoryPlan(model, self.device, dtype, processes, self.console.note)
        config = self.memory.predict(config)
        self.pipeline = make_pipeline(config, device=self.device, dtype=dtype, with_text=False)
        shards = self._shards(config)
        self.models = PolicyModels(self.pipeline.transformer, config.policy, stream_seed(config.seed, "lora"), shards)
        if config.engine.checkpointing != "none":
            checkpoint_blocks(self.models.policy, config.engine.checkpointing)
        self.config = config = self.memory.measure(config, self.models)
        self.encoder = make_prompt_encoder(self.pipeline, config, self.console.note)
        text_tokens = self.encoder([""]).prompt.shape[1]  # finds text encoders that cannot be loaded
        self.engine = Engine(
            config, self.models, self.pipeline, text_tokens, self.console.note, processes=processes.count
        )
        self.engine.adopt(processes.broadcast(self.engine.measured(), "the engine's choices"))
        self.sampler = self._make_sampler(self.engine.rollout_transformer, self.engine.sizes.rollout)
        self.eval_sampler = self._make_sampler(self.models.behaviour, self.engine.sizes.evaluation)
        rollout, evaluation = config.rollout, config.evaluation
        self.schedule = make_schedule(
            rollout.solver, rollout.num_inference_steps, rollout.shift, rollout.noise_level
        ).to(self.device)
        self.eval_schedule = make_schedule(evaluation.solver, evaluation.num_inference_steps, rollout.shift).to(
            self.device
        )
        self.phases = Phases(self.device)
        self.work = WorkMeter(self.models, self.pipeline.vae, config.policy, self.sampler.shape)
        self.learner = Learner(config, self.models, processes, self.phases, self.work, self.console.note)
        self.source = self._make_source()
        self.iteration = 0
        self.group_log = GroupLog(self.reward, config.max_lost_iterations, self.console.note)
        self.folder: Path | None = None
        self._describe()

    def _make_sampler(self, transformer: SD3Transformer2DModel, batch_size: int) -> Sampler:
        return Sampler(
            self.pipeline,
            transformer,
            self.encoder,
            resolution=self.config.rollout.resolution,
            batch_size=batch_size,
            solve=self.engine.solve,
            decode=self.engine.decoder.start,
            decodes_ahead=int(self.engine.decoder.overlaps),
        )

    def _shards(self, config: Config) -> Shards | None:
        how = f"distributed.shard {config.distributed.shard}"
        if config.distributed.shard == "none":
            return None
        if config.policy.train != "full":
            raise UserError(f"{how} is for --policy.train full: LoRA's base weights are not sharded")
        if config.optimizer.name != "adamw":
            raise UserError(f"{how}: states in 8 bits cannot be cut elsewhere; use --optimizer.name adamw")
        if config.policy.weights not in ("auto", "fp32"):
            raise UserError(f"{how} keeps the shards in fp32: use --policy.weights fp32")
        if config.data.source == "offline":
            raise UserError(
                f"{how}: processes draw offline groups one by one, which needs whole weights; draw them before"
            )
        return make_shards(config.distributed.shard, self.processes, self.device)

    def _make_source(self) -> Source:
        config = self.config
        worker = RolloutWorker(
            config.rollout,
            self.models,
            self.sampler,
            self.schedule,
            self.reward_pool,
            keep_transitions=self.learner.objective.needs_transitions,
            phases=self.phases,
            work=self.work,
        )
        if config.data.source == "offline":
            return OfflineSource(config, worker, self.prompts.train, self.processes)
        prompts = GroupSampler(self.prompts.train, config.rollout.groups, config.seed)
        return OnlineSource(worker, prompts, config.seed, self._rollout_weights, self.processes)

    def resume(self, folder: Path) -> None:
        """Goes back to the newest valid checkpoint of the run in `folder`. Raises UserError where there is none."""
        state, passed_over = self._newest_state(folder)
        for line in passed_over:
            self.console.note(line)
        if state.info.get("code") not in (None, code_version()):
            self.console.note(f"the checkpoint was written by other code ({state.info['code']}): results may differ")
        expected = self.models.shapes
        try:
            for part in ("policy", "old", "slow"):
                if {name: tensor.shape for name, tensor in state.part(part).items()} != expected:
                    raise ValueError(f"its {part} weights have other names or shapes")
            self.models.load_weights(self.models.parts(state.part("policy")))
            self.learner.old.load(self.models.parts(state.part("old")))
            self.learner.slow.load(self.models.parts(state.part("slow")))
            load_optimizer(self.learner.optimizer, self.models.parts(state.part("optimizer")))
        except (ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise SharedError(
                f"--resume {folder}: its checkpoint does not fit the model '{self.config.model}' ({reason})"
            ) from None
        self.engine.adopt(state.info.get("engine"))
        self.iteration = state.iteration
        self.console.note(f"resuming after iteration {self.iteration}")

    def _newest_state(self, folder: Path) -> tuple[State, list[str]]:
        """What process 0 finds on its disk, on every process."""
        found = None
        with self.processes.together("the newest checkpoint"):
            if self.processes.first:
                found = load_newest(folder / "checkpoints")
        about = None if found is None else [found[0].iteration, found[0].info, found[1]]
        iteration, info, passed_over = self.processes.broadcast(about, "the newest checkpoint")
        tensors = self.processes.broadcast_tensors(found[0].tensors if found else None, "the newest checkpoint")
        return State(iteration, tensors, info), passed_over

    def prepare(self, folder: Path, should_stop: Callable[[], bool]) -> None:
        """Draws what is drawn before the first iteration, until it is done or `should_stop`."""
        self.source.prepare(folder, self.console, should_stop)
        # What came before is no part of an iteration; the source counts its own seconds.
        self.phases.take(), self.work.take(), self.processes.take_waited_s()

    def encode_prompts(self) -> None:
        """Encodes what no run has encoded before, so that the text encoders can leave before training begins."""
        drawn = self.source.prompts_of(range(self.iteration, self.config.iterations))
        texts = ["", *(prompt.text for prompt in [*self.prompts.held_out, *drawn])]
        # Processes begin at different prompts, and find what the others have encoded in the meantime.
        first = len(texts) * self.processes.rank // self.processes.count
        with self.console.track("encoding prompts") as on_step:
            done = self.encoder.prepare(texts[first:] + texts[:first], on_step)
        self.console.note(done)

    def save(self, folder: Path, wait: bool = True, after: Exception | None = None) -> None:
        """Has a checkpoint written, and waits for the disk if asked to; raises UserError where the disk refused.

        Not where an iteration broke off between two of its optimizer steps: no run could go on from there. Nor of
        sharded weights after an error that not all processes had: nobody has the whole, and the others do not come.
        """
        sharded = self.models.shards is not None
        if self.learner.halfway or not (self.processes.first or sharded):
            return
        if sharded and after is not None and not isinstance(after, SharedError):
            return
        if self.writer is None and self.processes.first:
            info = {"code": code_version(), "config": to_dict(self.config), "processes": self.processes.count}
            info["engine"] = self.engine.measured()
            self.writer = CheckpointWriter(folder / "checkpoints", self.config.checkpoint.keep, info)
        parts: dict[str, Weights] = {
            "policy": self.models.weights,
            "old": self.learner.old.weights,
            "slow": self.learner.slow.weights,
            "optimizer": optimizer_tensors(self.learner.optimizer),
        }
        with self.phases("checkpoint"):
            if sharded:
                parts = {part: self.models.whole(tensors) for part, tensors in parts.items()}
            if self.writer is None:
                return
            self.writer.save(self.iteration, parts, copied=sharded)
            if wait:
                self.writer.wait()

    def anyone(self, flag: bool) -> bool:
        """Whether `flag` is set on any process."""
        return self.processes.any(flag, f"the others at the end of iteration {self.iteration}")

    def open_logs(self, folder: Path, settings: dict[str, Any]) -> None:
        """Opens metrics.jsonl, dropping what lies after the checkpoint resumed from, and the optional loggers."""
        self.folder = self.learner.folder = folder
        if not self.processes.first:
            return
        self.metrics = MetricsFile(folder / "metrics.jsonl", until=self.iteration)
        self.loggers = Loggers(self.config.log, folder, settings, self.console.note)

    def close(self) -> None:
        """Ends what the run has started."""
        self.reward_pool.close()

    def step(self) -> dict[str, Any]:
        """One iteration: draws and scores the groups, takes the optimizer's steps, moves the averages; logs and returns
        what it logged."""
        started, cpu_started = time.perf_counter(), time.process_time()
        if self.writer is not None:
            self.writer.check()
        try:
            with self.processes.waiting(f"the shards of iteration {self.iteration + 1}", counted=False):
                self._meet("the groups")
                batch, metrics = self._collect()
                if batch is not None:
                    self._meet("the learning")
                    metrics |= self.learner.learn(batch)
                    self.learner.average(self.iteration + 1)
        except torch.OutOfMemoryError as error:
            raise self.memory.error(error, self.config, self.phases.current, self.iteration + 1) from None
        self.iteration, self.learner.halfway = self.iteration + 1, False
        seconds = time.perf_counter() - started
        metrics |= {"iteration": self.iteration, "iteration_s": seconds, "cpu_s": time.process_time() - cpu_started}
        metrics |= {"images_per_s": metrics["images_count"] / seconds, **self.work.rates(seconds)}
        try:
            self._compare_processes()
            if self.config.evaluation.every and self.iteration % self.config.evaluation.every == 0:
                metrics |= self._heldout()
            metrics |= self._phases(seconds)
        finally:
            # Whatever broke off, this iteration is done: a checkpoint may be written of it.
            if not self.learner.halfway:
                self._log(metrics)
        return metrics

    def _meet(self, what: str) -> None:
        """Where weights are sharded, waits for the others: forwards need them, and neither name nor time them."""
        if self.models.shards is not None:
            with self.phases("communicate"):
                self.processes.meet(f"{what} of iteration {self.iteration + 1}", self.device)

    def _log(self, metrics: dict[str, Any]) -> None:
        metrics["peak_memory_mib"] = peak_memory_mib(self.device)
        if self.processes.first:
            self.metrics.write({"iteration": self.iteration, **metrics})
            self.loggers.write(metrics)
            self.console.iteration(metrics)

    def _phases(self, iteration_s: float) -> dict[str, Any]:
        """Seconds per phase of this process; of all, how long they waited and how uneven their own work was."""
        mine = self.phases.take()
        if self.processes.count == 1:
            return mine
        what = f"the seconds of iteration {self.iteration}"
        everyone = self.processes.gather({**mine, "waited_s": self.processes.take_waited_s()}, what)
        busy = [max(iteration_s - theirs["waited_s"], 0.0) for theirs in everyone]
        waited_s = sum(theirs["waited_s"] for theirs in everyone) / len(everyone)
        # 1 is even: the slowest process works as long as the mean.
        imbalance = max(busy) * len(busy) / sum(busy) if any(busy) else 1.0
        return {**mine, "waited_s": waited_s, "imbalance": imbalance, "processes": everyone}

    def _compare_processes(self) -> None:
        """Compares weights and counters over the processes, now and then and before every checkpoint.

        Raises DriftError where they differ; nothing is saved from then on.
        """
        every = (self.config.distributed.check_every, self.config.checkpoint.every)
        if self.processes.count == 1 or not any(n and self.iteration % n == 0 for n in every):
            return
        state: dict[str, Any] = {"iteration": self.iteration}
        if self.models.shards is None:  # else each process has its own
            averages = {**self.learner.old.weights, **{f"slow.{n}": w for n, w in self.learner.slow.weights.items()}}
            state |= {"weights": checksum(self.models.weights), "averages": checksum(averages)}
        try:
            compare(state, self.processes, f"after iteration {self.iteration}")
        except DriftError:
            self.learner.halfway = True  # what is here must not be saved
            raise

    def _collect(self) -> tuple[Batch | None, dict[str, Any]]:
        """The iteration's scored groups and what to log of them; no batch where no group could be scored."""
        groups = self.source.collect(self.iteration)
        metrics = self.group_log.take(self.iteration + 1, groups.prompts, groups.scores, self.folder) | groups.metrics
        return (self._batch(groups) if groups.scores.valid.any() else None), metrics

    def _batch(self, groups: Groups) -> Batch:
        """The process's samples of the groups that could be scored, with their advantages."""
        scores, share = groups.scores, groups.share
        size = share.group_size
        valid = np.repeat(scores.valid, size)
        rows = torch.from_numpy(np.flatnonzero(valid[share.start : share.stop])).to(self.device)
        first = int(valid[: share.start].sum())
        everyone = advantages(scores.rewards[scores.valid], self.config.advantage)
        part = BatchPart(
            first,
            int(scores.valid.sum()),
            size,
            everyone,
            any(not other.whole for other in self._shares(groups)),
            self.processes,
            f"the group scores of iteration {self.iteration + 1}",
            None if self.models.shards is None else self._edges(groups, valid),
        )
        return Batch(
            iteration=self.iteration,
            x0=groups.x0[rows],
            text=groups.text[rows],
            empty=self.encoder([""]),
            advantage=everyone[first : first + len(rows)].to(self.device),
            group_index=(rows + share.start) // size,
            group_size=size,
            schedule=self.schedule,
            transitions=None if groups.transitions is None else groups.transitions[rows],
            part=part,
        )

    def _edges(self, groups: Groups, valid: np.ndarray) -> tuple[int, ...]:
        """See `BatchPart.edges`: among the samples that could be scored."""
        return (*(int(valid[: share.start].sum()) for share in self._shares(groups)), int(valid.sum()))

    def _shares(self, groups: Groups) -> list[Share]:
        return place(len(groups.prompts), groups.share.group_size, self.processes.count)

    def _rollout_weights(self) -> Weights:
        switch = self.config.ema.switch_ema_ref
        return self.models.weights if switch is None or self.iteration < switch else self.learner.old.weights

    def _heldout(self) -> dict[str, Any]:
        """Held-out scores between two iterations; where they fail, a note, since the step before them is done."""
        try:
            with self.phases("evaluation"):
                summary = self.evaluate().summary()
        except UserError as error:
            self.console.note(f"evaluation skipped: {error}")
            return {}
        return {f"heldout_{key}": summary[key] for key in ("reward_mean", "reward_ci95")}

    def evaluate(self) -> Evaluation:
        """Held-out scores of the weights that would be saved now; the sampler is left with these weights."""
        return self._evaluate(self._evaluated_weights(), on_step=None)

    def _evaluated_weights(self) -> Weights:
        """The slow average, or the policy itself in a run too short for an average."""
        return self.learner.slow.weights if self.iteration >= self.config.ema.eval_every else self.models.weights

    def _evaluate(self, weights: Weights, on_step: Callable[[float], None] | None, remedy: str = "") -> Evaluation:
        self.models.load_behaviour(weights)
        with self.processes.waiting("the shards of the evaluation", counted=False):
            result = evaluate(
                self.eval_sampler,
                self.prompts.held_out,
                self.reward_pool,
                self.eval_schedule,
                self.config.evaluation,
                on_step,
                self.processes,
                sharded=self.models.shards is not None,
                remedy=remedy,
            )
        if result.failures:
            first, count = result.failures[0], len(result.failures)
            self.console.note(f"evaluation: {counted(count, 'image')} could not be scored; the first: {first}")
        return result

    def evaluate_before(self, folder: Path) -> Evaluation | None:
        """Scores of the model as it came, from the run's folder where a resumed run already has them by its rewards."""
        path = folder / BEFORE_FILE
        earlier = earlier_evaluation(path, self.reward.contents, self.console.note) if self.processes.first else None
        if self.processes.broadcast(earlier is not None, "the evaluation before training"):
            return earlier
        images = counted(self.config.evaluation.images, "image")
        with self.console.track(f"before: {images} of {self.prompts.evaluated}") as on_step:
            again = "; mend it and start the same command again"
            before = self._evaluate(self.models.initial_weights(), on_step, again)
        if not self.processes.first:
            return None
        before.save(path)
        mean = before.summary()["reward_mean"]
        self.console.note(f"before: mean reward {number(mean)}")
        return before

    def finish(self, folder: Path, before: Evaluation | None) -> None:
        """Saves the slow average for plain diffusers, evaluates it, and writes summary and pictures.

        In this order: a reward that is away by now costs the evaluation, not the weights. Raises UserError where the
        disk refuses.
        """
        self._save_weights(folder)
        images = counted(self.config.evaluation.images, "image")
        with self.console.track(f"after: {images} of {self.prompts.evaluated}") as on_step:
            go_on = f"; mend it, then go on with: {resume_command(folder)}"
            after = self._evaluate(self._evaluated_weights(), on_step, go_on)
        if before is None:
            return  # the first process has it, and writes
        with written_to(folder):
            write_results(
                folder,
                before,
                after,
                self.config,
                self.source.summary(),
                self.iteration,
                self.console,
                self.prompts.evaluated,
            )

    def _save_weights(self, folder: Path) -> None:
        """Writes what was trained into the run's folder. All processes must call it together."""
        weights = self._evaluated_weights()
        if self.models.shards is not None:
            weights = self.models.whole(weights)
        with self.processes.together("the trained weights on the disk"):
            if self.processes.first:
                # A LoRA file needs no text encoders, a whole pipeline does.
                is_whole = self.config.policy.train == "full"
                pipeline = self.encoder.whole_pipeline() if is_whole else self.pipeline
                with written_to(folder):
                    self.models.save(weights, folder, pipeline)
        self.console.note(f"the trained weights are in {folder}")

    def _describe(self) -> None:
        trained = self.models.trained_numel
        total = sum(parameter.numel() for parameter in self.models.base.parameters())
        precision = str(self.models.dtype).removeprefix("torch.")
        groups, size = self.config.rollout.groups, self.config.rollout.group_size
        self.console.note(
            f"{self.config.model} on {self.device} in {precision}: training {trained / 1e6:.2f} M weights "
            f"({self.config.policy.train}) of {total / 1e6:.1f} M; {groups} groups of {size} images an iteration"
        )
        shapes = self.models.shapes.values()
        state = sum(state_bytes(shape.numel(), self.config.optimizer.name) for shape in shapes)
        self.console.note(f"{self.config.optimizer.name}: {state / 2**20:.1f} MiB of optimizer state")
        for line in self.engine.reasons.lines:
            self.console.note(line)
        if self.config.random_weights:
            self.console.note(random_weights_note(self.config))
        for note in filter(None, (self.prompts.note, prompts_note(self.config))):
            self.console.note(note)
