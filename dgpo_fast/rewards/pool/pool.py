"""Rewards off the critical path: groups are scored while the next ones are being drawn.

Where a group is scored depends on its reward:

* with `runs_on_cpu = True`: in worker processes, several groups at a time, under a deadline;
* one that waits for another machine: in threads, `groups_at_once` groups at a time, under a deadline;
* any other: in one thread of the trainer's process, group after group, on a GPU stream of its own.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dgpo_fast.errors import UserError
from dgpo_fast.prompts.prompt import Prompt, shorten
from dgpo_fast.rewards.pool.process import CannotLoad, WorkerProcess
from dgpo_fast.rewards.weighted import Answer, GroupScores, WeightedReward, require_pictures, score_group

if TYPE_CHECKING:
    import torch  # a worker imports this package, and most rewards need no torch

MOST_WORKERS = 8
LEAST_PORTION = 4
"""Images of a group for which a separate process pays off."""


@dataclass(eq=False)
class Task:
    """One reward's work on one group or a portion of it: images uint8 (B, H, W, 3) of a prompt.

    Attributes:
        result: the answer, and the seconds that it took.
        started: when a thread of this process began with it, by `time.perf_counter`; None before, and elsewhere.
    """

    name: str
    images: np.ndarray
    prompt: Prompt
    result: Future[tuple[Answer, float]] = field(default_factory=Future)
    started: float | None = None

    @property
    def taken_s(self) -> float:
        """Seconds since it was begun."""
        return 0.0 if self.started is None else time.perf_counter() - self.started


Tasks = queue.Queue[Task | None]
"""Work for some threads; each None ends one of them."""


def count_workers(setting: str | int, device: torch.device) -> int:
    """The number of worker processes for `reward_workers`, which is "auto" or a number.

    On a GPU, auto leaves one core to the trainer. On a CPU it is 0, since rollout and rewards would share the cores.
    """
    if isinstance(setting, int):
        return setting
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(MOST_WORKERS, cores // trainers - 1)) if device.type == "cuda" else 0


CLOSING_S = 1.0
"""In which the threads must end."""


class RewardPool:
    """Scores groups as they are drawn; results do not depend on where or in which order they were computed.

    Threads and processes start with the first group, and end with the trainer's process at the latest.

    Args:
        reward: the rewards and their weights. Worker processes load those that run on the CPU again.
        workers: number of worker processes; with 0, everything is scored in this process.
        deadline_s: seconds within which a reward must have scored a group. A worker that takes longer is killed and its
            group dropped. In this process nothing can be killed: if a reward waits for another machine, its group is
            dropped and its thread replaced; any other reward ends the run with a UserError.
        device: the trainer's. On a GPU, rewards of this process run during the trainer's own work.
        note: called with one line for the user.
    """

    def __init__(
        self,
        reward: WeightedReward,
        *,
        workers: int,
        deadline_s: float,
        device: torch.device,
        note: Callable[[str], None],
    ):
        self.reward = reward
        self.deadline_s = deadline_s
        self.device = device
        self.note = note
        on_cpu = {name for name, one in reward.rewards.items() if workers and getattr(one, "runs_on_cpu", False)}
        self.processes = [WorkerProcess(deadline_s) for _ in range(workers)] if on_cpu else []
        self.tasks_here, self.tasks_elsewhere = Tasks(), Tasks()
        self.queues: dict[str, Tasks] = {}
        for name, one in reward.rewards.items():
            remote = getattr(one, "groups_at_once", 1) > 1
            self.queues[name] = self.tasks_elsewhere if name in on_cpu else Tasks() if remote else self.tasks_here
        self.threads: dict[threading.Thread, Tasks] = {}
        self.running_here: Task | None = None
        self.lock = threading.Lock()

    def start(self, prompts: Sequence[Prompt], group_size: int) -> Scoring:
        """Prepares to score `group_size` images of each of P prompts. The images can then be added in any portions."""
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        if not self.threads:
            self._start_threads()
        return Scoring(self, prompts, group_size)

    def score_groups(
        self, images: np.ndarray, prompts: Sequence[Prompt], group_size: int, faults: np.ndarray | None = None
    ) -> GroupScores:
        """Scores P groups of G images at once, as `WeightedReward.score_groups` does."""
        scoring = self.start(prompts, group_size)
        scoring.add(images, faults)
        return scoring.result()

    def close(self) -> None:
        """Ends threads and processes; what is still being scored is lost."""
        for tasks in self.threads.values():
            while not tasks.empty():
                tasks.get_nowait()
        for tasks in self.threads.values():
            tasks.put(None)
        for process in self.processes:
            process.kill()
        ends = time.monotonic() + CLOSING_S
        for thread, tasks in self.threads.items():
            # A reward of this process may hold its thread up for ever. One at work when the interpreter ends may abort
            # it.
            thread.join(None if tasks is self.tasks_elsewhere else max(ends - time.monotonic(), 0.0))
        self.threads = {}

    def portions(self, name: str, count: int) -> int:
        """Into how many portions a group of `count` images is cut for a reward."""
        shared = self.queues[name] is self.tasks_elsewhere
        if not shared or not getattr(self.reward.rewards[name], "independent_images", False):
            return 1
        return max(1, min(len(self.processes), count // LEAST_PORTION))

    def submit(self, task: Task) -> None:
        """Hands one task to the threads of its reward."""
        self.queues[task.name].put(task)

    def blocks(self, task: Task) -> bool:
        """Whether `task` would only slow down the trainer's work, because both run on the CPU in one process."""
        return self.device.type == "cpu" and self.queues[task.name] is self.tasks_here

    def wait(self, task: Task) -> tuple[Answer, float]:
        """The answer to a task, once it is there, and the seconds that it took.

        Raises:
            UserError: the reward's own, or because one hangs in this process and cannot be stopped.
        """
        while True:
            try:
                return task.result.result(timeout=min(1.0, self.deadline_s))
            except TimeoutError:
                self._check_deadlines(task)

    def _check_deadlines(self, awaited: Task) -> None:
        task = self.running_here
        if task is not None and task.taken_s > self.deadline_s:
            raise UserError(
                f"reward {task.name!r} has not scored the pictures of {shorten(task.prompt.text)} within "
                f"{self.deadline_s:g} s (reward_deadline_s) and cannot be stopped in the trainer's own process; mend "
                "it, or let it run in worker processes (docs/rewards.md), and --resume"
            )
        if self.queues[awaited.name] is not self.tasks_here and awaited.taken_s > self.deadline_s:
            self._give_up(awaited)

    def _give_up(self, task: Task) -> None:
        """Fails a task whose thread hangs, and puts a new thread in that one's place."""
        reason = f"no answer within {self.deadline_s:g} s, so the run no longer waits for it"
        try:
            task.result.set_result((reason, task.taken_s))
        except InvalidStateError:
            return  # it was answered just now
        tasks = self.queues[task.name]
        self._add_thread(tasks, self._score_remotely, tasks)

    def _start_threads(self) -> None:
        self._add_thread(self.tasks_here, self._score_here)
        for process in self.processes:
            # The thread that starts a process must live as long as it: Linux takes the thread for the parent.
            self._add_thread(self.tasks_elsewhere, self._score_elsewhere, process)
        for name, tasks in self.queues.items():
            if tasks not in (self.tasks_here, self.tasks_elsewhere):
                for _ in range(getattr(self.reward.rewards[name], "groups_at_once", 1)):
                    self._add_thread(tasks, self._score_remotely, tasks)

    def _add_thread(self, tasks: Tasks, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True, name="reward")
        self.threads[thread] = tasks
        thread.start()

    def _score_here(self) -> None:
        with self._own_stream():
            while (task := self.tasks_here.get()) is not None:
                self.running_here = task
                self._answer(task)
                self.running_here = None

    def _score_remotely(self, tasks: Tasks) -> None:
        while (task := tasks.get()) is not None:
            try:
                self._answer(task)
            except InvalidStateError:
                return  # it was given up, and another thread has this one's place

    def _score_elsewhere(self, process: WorkerProcess) -> None:
        while (task := self.tasks_elsewhere.get()) is not None:
            try:
                source = self.reward.sources.get(task.name, task.name)
                task.result.set_result(process.score(task.name, source, task.images, task.prompt))
            except CannotLoad as error:
                self._bring_here(task, error)
            except BaseException as error:
                task.result.set_exception(error)
        process.close()

    def _answer(self, task: Task) -> None:
        task.started = time.perf_counter()
        try:
            answer = score_group(task.name, self.reward.rewards[task.name], task.images, task.prompt)
            task.result.set_result((answer, task.taken_s))
        except BaseException as error:  # the trainer's thread raises it
            task.result.set_exception(error)

    def _bring_here(self, task: Task, error: CannotLoad) -> None:
        with self.lock:
            first = self.queues[task.name] is not self.tasks_here
            self.queues[task.name] = self.tasks_here
        if first:
            self.note(f"reward {task.name!r} is scored in the trainer's own process: in a worker, {error}")
        self.tasks_here.put(task)

    def _own_stream(self) -> AbstractContextManager:
        """On a GPU, a stream of their own for the rewards of this process."""
        stack = ExitStack()
        if self.device.type == "cuda":
            import torch

            stack.enter_context(torch.cuda.device(self.device))
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.default_stream(self.device))  # the rewards' weights are written there
            stack.enter_context(torch.cuda.stream(stream))
        return stack


class Scoring:
    """The scoring of one set of groups; made by `RewardPool.start`.

    Attributes:
        busy_s: seconds of scoring, summed over processes and rewards; complete after `result`.
        wait_s: seconds that the caller waited for it. The rest of busy_s overlapped with the caller's own work.
    """

    def __init__(self, pool: RewardPool, prompts: Sequence[Prompt], group_size: int):
        self.pool = pool
        self.prompts = prompts
        self.group_size = group_size
        self.groups: list[dict[str, list[Task]]] = []
        self.rest: list[np.ndarray] = []
        self.faults = np.zeros(0, np.uint8)
        self.busy_s = self.wait_s = 0.0

    def add(self, images: np.ndarray, faults: np.ndarray | None = None) -> None:
        """Takes the next images, in order; each group is scored from when its last one is there.

        The arrays must stay as they are until `result` returns.

        Args:
            images: uint8 (B, H, W, 3).
            faults: uint8 (B,), see `GroupScores`; None if all images are finite.
        """
        require_pictures(images)
        self.faults = np.concatenate([self.faults, np.zeros(len(images), np.uint8) if faults is None else faults])
        waiting = np.concatenate([*self.rest, images]) if self.rest else images
        whole = len(waiting) // self.group_size
        if len(self.groups) + whole > len(self.prompts):
            raise ValueError(f"more images than {len(self.prompts)} prompts of {self.group_size} images each")
        for index in range(whole):
            self._submit(waiting[index * self.group_size : (index + 1) * self.group_size])
        self.rest = [waiting[whole * self.group_size :]] if whole * self.group_size < len(waiting) else []

    def result(self) -> GroupScores:
        """The scores of all groups, once they are there. Raises UserError if a reward does."""
        if self.rest or len(self.groups) < len(self.prompts):
            raise ValueError(f"images for {len(self.groups)} of {len(self.prompts)} groups of {self.group_size}")
        answers = {}
        for index, group in enumerate(self.groups):
            for name, tasks in group.items():
                results = [self._wait(task) for task in tasks]
                answers[index, name] = joined([answer for answer, _ in results])
                self.busy_s += sum(seconds for _, seconds in results)
        faults = self.faults.reshape(len(self.prompts), self.group_size)
        return self.pool.reward.combine(answers, self.prompts, faults)

    def _submit(self, images: np.ndarray) -> None:
        prompt = self.prompts[len(self.groups)]
        group = {}
        start = len(self.groups) * self.group_size
        is_finite = not self.faults[start : start + self.group_size].any()
        for name in self.pool.reward.chosen(prompt) if is_finite else ():
            portions = np.array_split(images, self.pool.portions(name, len(images)))
            group[name] = [Task(name, portion, prompt) for portion in portions]
        self.groups.append(group)
        tasks = [task for portions in group.values() for task in portions]
        for task in tasks:
            self.pool.submit(task)
        for task in tasks:
            if self.pool.blocks(task):
                self._wait(task)

    def _wait(self, task: Task) -> tuple[Answer, float]:
        started = time.perf_counter()
        result = self.pool.wait(task)
        self.wait_s += time.perf_counter() - started
        return result


def joined(portions: Sequence[Answer]) -> Answer:
    """A group's answer from those for its portions: the first failure, or all scores and the parts that all have."""
    scored = [portion for portion in portions if isinstance(portion, dict)]
    if len(scored) < len(portions):
        return next(portion for portion in portions if isinstance(portion, str))
    return {
        name: np.concatenate([portion[name] for portion in scored])
        for name in scored[0]
        if all(name in portion for portion in scored)
    }
