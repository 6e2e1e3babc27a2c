"""Communication between the processes of a run.

`connect` joins the group that torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT)
describes. Every wait has a name, a timeout and a timer: if the others do not come, the error says what was
waited for, and the seconds waited are logged. If a process fails inside `together`, the others get its error before
they communicate there, so none waits in vain.

Small values are sent as JSON, never as pickles.
"""

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.wording import one_line

Value = TypeVar("Value")
"""Anything that JSON keeps as it is."""


class SharedError(UserError):
    """An error that every process of the run raises; the first one prints it for all."""

    shared = True


class LostError(UserError):
    """Other processes were lost: communication is no longer possible."""


@dataclass(eq=False)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: this process, counted from 0. Process 0 alone writes files and talks to the user.
        count: how many there are. Alone, nothing below communicates.
        local_rank: this process among those of its machine.
        local_count: how many those are.
        timeout_s: seconds to wait for others.
        waited_s: seconds spent waiting, since `take_waited_s`.
        united: whether this process is inside a block of `together`.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    timeout_s: float = 600.0
    local_count: int = 1
    waited_s: float = 0.0
    united: bool = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def set_timeout(self, seconds: float, group: dist.ProcessGroup | None = None) -> None:
        """Sets the timeout; the settings are only known after the group was joined.

        `group` is one of some of the processes; by default it is that of all.
        """
        self.timeout_s = seconds
        if self.count > 1:
            # The library's own trainers change it this way: there is no public function for it.
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group or dist.group.WORLD)

    def own_device(self, device: torch.device) -> torch.device:
        """`device`, or with several processes on GPUs this one's own. Raises UserError if there is none for it."""
        if self.count == 1 or device.type != "cuda":
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {self.rank} is number {self.local_rank + 1} on {socket.gethostname()}, which has "
                f"{torch.cuda.device_count()} CUDA GPUs: start one process a GPU, or use --device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def any(self, flag: bool, what: str) -> bool:
        """Whether any process's `flag` is set."""
        return bool(self.sum(torch.tensor(int(flag)), what))

    def sum(self, tensor: Tensor, what: str) -> Tensor:
        """Sums `tensor` over all processes, in place, and returns it.

        A tensor on a GPU is sent when all processes are ready, since NCCL reports neither a lost process nor the time
        it waited. The sum itself is not waited for.
        """
        if self.count > 1:
            self._hear_failures(what)
            if tensor.is_cuda:
                self.meet(what, tensor.device)
            with self.waiting(what, counted=not tensor.is_cuda):
                dist.all_reduce(tensor)
        return tensor

    def meet(self, what: str, device: torch.device) -> None:
        """Waits until all processes are here, after this process's GPU has finished its own work."""
        if self.count > 1:
            self._hear_failures(what)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            with self.waiting(what):
                dist.all_reduce(torch.zeros(1))

    def gather(self, value: Value, what: str) -> list[Value]:
        """The `value` of every process, in the order of ranks. A value is JSON; NaN and infinity are kept."""
        if self.count == 1:
            return [value]
        self._hear_failures(what)
        return self._gather(value, what)

    def _gather(self, value: Value, what: str) -> list[Value]:
        text = json.dumps(value).encode()
        with self.waiting(what):
            lengths = torch.zeros(self.count, dtype=torch.int64)
            lengths[self.rank] = len(text)
            dist.all_reduce(lengths)
            row = torch.zeros(int(lengths.max()), dtype=torch.uint8)
            row[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            rows = [torch.empty_like(row) for _ in range(self.count)]
            dist.all_gather(rows, row)
        return [json.loads(bytes(row[:n].tolist())) for row, n in zip(rows, lengths.tolist(), strict=True)]

    def broadcast(self, value: object, what: str) -> Any:
        """Process 0's `value`, on every process. A value is JSON, as in `gather`.

        Any is returned: callers know what they have sent.
        """
        if self.count == 1:
            return value
        self._hear_failures(what)
        text = json.dumps(value).encode() if self.first else b""
        with self.waiting(what):
            length = torch.tensor([len(text)])
            dist.broadcast(length, 0)
            row = torch.frombuffer(bytearray(text), dtype=torch.uint8) if self.first else _empty_bytes(length)
            dist.broadcast(row, 0)
        return json.loads(row.numpy().tobytes())

    def broadcast_tensors(self, tensors: dict[str, Tensor] | None, what: str) -> dict[str, Tensor]:
        """Process 0's CPU `tensors` on every process, one after another."""
        if self.count == 1:
            return tensors or {}
        plan = [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in (tensors or {}).items()]
        received = {}
        for name, shape, dtype in self.broadcast(plan, what):
            tensor = tensors[name].contiguous() if tensors else torch.empty(shape, dtype=getattr(torch, dtype))
            with self.waiting(what):
                dist.broadcast(tensor, 0)
            received[name] = tensor
        return received

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """All processes leave the block, or all raise the error of the first one that failed.

        Processes can communicate inside it, but must not nest such blocks.
        """
        failure: Exception | None = None
        self.united = self.count > 1
        try:
            yield
        except (LostError, SharedError):
            raise
        except Exception as error:
            failure = error
        finally:
            self.united = False
        if failure is not None and self.count == 1:
            raise failure
        problems = self._tell(failure, what)
        if failure is not None and not isinstance(failure, UserError):
            raise failure
        _raise_first(problems)

    def _tell(self, failure: Exception | None, what: str) -> list[str | None]:
        """The failures of all processes, one line each. Raises this process's own if the others are lost."""
        try:
            return self.gather(None if failure is None else _one_line(failure), what)
        except LostError:
            if failure is not None:
                raise failure from None
            raise

    def _hear_failures(self, what: str) -> None:
        """Inside `together`, before anything is sent: raises the error of a process that has failed and told it.

        That one is at the block's end, in the same exchange.
        """
        if self.united:
            _raise_first(self._gather(None, what))

    def take_waited_s(self) -> float:
        """Seconds spent waiting for others since the last call."""
        taken, self.waited_s = self.waited_s, 0.0
        return taken

    def close(self) -> None:
        """Leaves the group."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def waiting(self, what: str, counted: bool = True) -> Iterator[None]:
        """Raises LostError, which names `what`, if the others are lost in the block; counts its seconds as waited.

        If the block also does other things, it is not `counted`, and only communication errors become a LostError.
        """
        start = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            if not (counted or isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            seconds = time.perf_counter() - start
            reason = _reason(error)
            raise LostError(
                f"process {self.rank} of {self.count} on {socket.gethostname()} waited {seconds:.0f} s for {what} and "
                f"lost the others ({reason}): a process ended, hangs, or was cut off; see its own message, and --resume"
            ) from None
        finally:
            if counted:
                self.waited_s += time.perf_counter() - start


ALONE = Processes()
"""A run of one process, without a group."""


def connect(timeout_s: float = 600.0) -> Processes:
    """Joins the group that the environment describes, or returns a `Processes` of one if it describes none.

    Args:
        timeout_s: seconds to wait for the others.

    Tensors on GPUs travel by NCCL, all others by gloo. Raises UserError if the environment is incomplete or the
    others cannot be reached.
    """
    count = _integer("WORLD_SIZE", 1)
    if count == 1:
        return Processes(timeout_s=timeout_s)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is {count} but {missing[0]} is not set: start the processes with torchrun")
    rank, local_rank = _integer("RANK", 0), _integer("LOCAL_RANK", 0)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        timeout = timedelta(seconds=timeout_s)
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun may keep its store over a restart, and with it the addresses of processes that are gone.
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = _reason(error)
        raise UserError(
            f"process {rank} of {count} could not meet the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({reason}): check the address and that all processes were started"
        ) from None
    return Processes(rank, count, local_rank, timeout_s, _integer("LOCAL_WORLD_SIZE", count))


def _reason(error: Exception) -> str:
    """The first sentence of a message of gloo or NCCL, without the line of the source that it begins with."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[/\S*\]\s*", "", first).split(". ")[0][:160]


def _integer(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise UserError(f"{name}={os.environ[name]}: not a number; start the processes with torchrun") from None


def _raise_first(problems: list[str | None]) -> None:
    """Raises the first of the processes' problems, one line each, on all of them."""
    for rank, line in enumerate(problems):
        if line is not None:
            where = f" (process {rank})" if problems.count(line) < len(problems) else ""
            raise SharedError(line + where) from None


def _one_line(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else one_line(f"{type(error).__name__}: {error}")


def _empty_bytes(length: Tensor) -> Tensor:
    return torch.empty(int(length), dtype=torch.uint8)
