"""Two nodes, as network namespaces with addresses of their own: what becomes of a run when one of them is cut off.

    python -m benchmarks.nodes [--table]

Each node has a torchrun with one CPU process. They meet over a link of two virtual network cards, which is taken down
in mid-run and up again. Writes `benchmarks/results/cpu/nodes.json` and the table in
`docs/scaling.md`; `--table` writes only the table. Needs root.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.disturbed import comparable, without_names, workspace
from benchmarks.pages import replace_part
from dgpo_fast.run.metrics import read_metrics, write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/cpu/nodes.json"
ITERATIONS, CHECKPOINT_EVERY, CUT_AT = 40, 2, 5
PORT = 29500
AGAIN_S, END_S = 20, 400
"""Seconds after which a torchrun that has ended is started again, and within which a case must end."""


@dataclass(frozen=True)
class Node:
    """A network namespace.

    Attributes:
        namespace: its name.
        card: of its end of the link.
        address: of that card.
    """

    namespace: str
    card: str
    address: str

    def link(self, state: str) -> None:
        """Takes the card "down" or "up"."""
        ip("-n", self.namespace, "link", "set", self.card, state)


NODES = (Node("dgpo-a", "dgpo-veth-a", "10.77.0.1"), Node("dgpo-b", "dgpo-veth-b", "10.77.0.2"))


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def network() -> Iterator[None]:
    """The two nodes with a link between them."""
    first, second = NODES
    try:
        for node in NODES:
            ip("netns", "add", node.namespace)
        ip(
            "link",
            "add",
            first.card,
            "netns",
            first.namespace,
            "type",
            "veth",
            "peer",
            "name",
            second.card,
            "netns",
            second.namespace,
        )
        for node in NODES:
            ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", node.card)
            ip("-n", node.namespace, "link", "set", "lo", "up")
            node.link("up")
        yield
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "delete", node.namespace], check=False)


class Cluster:
    """One run on both nodes.

    Args:
        folder: the workspace, on the disk that both nodes see.
        name: of the run.
        settings: more of the command line.
    """

    def __init__(self, folder: Path, name: str, settings: list[str]):
        self.folder, self.name, self.settings = folder, name, settings
        self.home = folder / "runs" / name
        self.logs = [folder / f"{name}-{node.namespace}.log" for node in NODES]
        self.torchruns = [self._start(rank) for rank in range(len(NODES))]

    def _start(self, rank: int) -> subprocess.Popen:
        node = NODES[rank]
        command = [
            "ip",
            "netns",
            "exec",
            node.namespace,
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            str(len(NODES)),
            "--nproc-per-node",
            "1",
            "--rdzv-backend",
            "c10d",
            "--rdzv-id",
            self.name,
            "--rdzv-endpoint",
            f"{NODES[0].address}:{PORT}",
            "--local-addr",
            node.address,
            "--rdzv-conf",
            f"is_host={rank == 0}",
            "--max-restarts",
            "3",  # both have this machine's name
            "-m",
            "dgpo_fast.train",
            "small.yaml",
            "--name",
            self.name,
            "--iterations",
            str(ITERATIONS),
            *self.settings,
        ]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "GLOO_SOCKET_IFNAME": node.card, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        with self.logs[rank].open("a") as log:
            return subprocess.Popen(command, cwd=self.folder, env=env, stdout=log, stderr=subprocess.STDOUT)

    def reached(self) -> int:
        """Iterations in the metrics."""
        path = self.home / "metrics.jsonl"
        return len(read_metrics(path)) if path.is_file() else 0

    def wait_for(self, iteration: int) -> None:
        """Until the metrics of `iteration` are written, or a torchrun has ended."""
        while self.reached() < iteration and all(run.poll() is None for run in self.torchruns):
            time.sleep(0.05)

    def end(self) -> tuple[list[int], int]:
        """Exit statuses of the torchruns, and how many had to be started again."""
        again, deadline = 0, time.monotonic() + END_S
        while time.monotonic() < deadline and any(run.poll() is None for run in self.torchruns):
            for rank, run in enumerate(self.torchruns):
                if run.poll():  # a cluster's manager would start it again
                    time.sleep(AGAIN_S)
                    again += 1
                    self.torchruns[rank] = self._start(rank)
            time.sleep(0.1)
        for run in self.torchruns:
            run.terminate()
            run.wait()
        return [run.returncode for run in self.torchruns], again

    def said(self, pattern: str) -> list[str]:
        """What fits `pattern` in both logs."""
        return [found for log in self.logs for found in re.findall(pattern, log.read_text(), re.MULTILINE)]


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        cut_s: seconds that the link was down, 0 for never.
        timeout_s: the run's `distributed.timeout_s`.
        statuses: of the torchruns at the end.
        started_again: torchruns that ended and were started again.
        said: what the processes said of the cut.
        reached: iterations before the cut was noticed.
        resumed_after: the iterations that the run went on from, one for each restart.
        final: iterations at the end.
        equal: whether the metrics are those of a run that was not cut.
    """

    cut_s: float
    timeout_s: float
    statuses: list[int]
    started_again: int
    said: list[str]
    reached: int
    resumed_after: list[int]
    final: int
    equal: bool

    @property
    def happened(self) -> str:
        """For the table."""
        said = ": " + "; ".join(f"`{line}`" for line in self.said[:2]) if self.said else ""
        if not self.resumed_after:
            return f"the run goes on when the link is back{said}"
        by = f", where {self.started_again} torchrun(s) had to be started again" if self.started_again else " by itself"
        return f"both nodes give up{said}; torchrun goes on{by} after iteration {self.resumed_after[-1]}"

    @property
    def lost(self) -> str:
        """For the table."""
        again = self.reached - min(self.resumed_after) if self.resumed_after else 0
        return "nothing" if again == 0 else f"{again} iteration{'s' * (again > 1)}, made again"


def cut(folder: Path, name: str, cut_s: float, timeout_s: float, undisturbed: Path | None) -> Outcome:
    """A run whose second node is cut off for `cut_s`."""
    run = Cluster(folder, name, ["--distributed.timeout-s", str(timeout_s)])
    run.wait_for(CUT_AT)
    if cut_s:
        NODES[1].link("down")
        time.sleep(cut_s)
        NODES[1].link("up")
    reached = run.reached()
    statuses, again = run.end()
    resumed = [int(found) for found in run.said(r"resuming after iteration (\d+)")]
    said = [without_names(line) for line in run.said(r"^error: (.*)")]
    equal = undisturbed is None or comparable(run.home) == comparable(undisturbed)
    found = Outcome(cut_s, timeout_s, statuses, again, said, reached, resumed, run.reached(), equal)
    print(json.dumps(asdict(found)), flush=True)
    if any(statuses):
        print("\n".join(log.read_text()[-3000:] for log in run.logs), file=sys.stderr)
    return found


def text(outcomes: list[Outcome]) -> str:
    """A table in Markdown."""
    rows = ["| link down for | `distributed.timeout_s` | what happened | what was lost |", "| --- | --- | --- | --- |"]
    cells = [(f"{o.cut_s:.0f} s", f"{o.timeout_s:.0f} s", o.happened, o.lost) for o in outcomes]
    return "\n".join([*rows, *(f"| {' | '.join(row)} |" for row in cells)])


def as_documented(outcomes: list[Outcome]) -> bool:
    """Whether every run came to its end, with the metrics of one that was not cut."""
    return all(one.equal and one.final == ITERATIONS and not any(one.statuses) for one in outcomes)


def written() -> list[Outcome]:
    """The outcomes in the file."""
    return [Outcome(**one) for one in json.loads(RESULTS.read_text(encoding="utf-8"))["cuts"]]


def run_all() -> list[Outcome]:
    """Cuts of different lengths."""
    with tempfile.TemporaryDirectory() as scratch, network():
        folder = workspace(Path(scratch), f"checkpoint: {{every: {CHECKPOINT_EVERY}, keep: 3}}\n")
        whole = cut(folder, "undisturbed", 0, 60, None)
        if any(whole.statuses):
            raise SystemExit("the run that nothing happens to has failed")
        undisturbed = folder / "runs/undisturbed"
        return [
            cut(folder, "short", 5, 60, undisturbed),
            cut(folder, "long", 30, 20, undisturbed),
            cut(folder, "very-long", 100, 20, undisturbed),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        replace_part("nodes", text(written()))
        return
    if os.geteuid() != 0 or shutil.which("ip") is None:
        print("skipped: network namespaces need root and the `ip` command")
        return
    outcomes = run_all()
    write_json(
        RESULTS,
        {
            "nodes": len(NODES),
            "iterations": ITERATIONS,
            "checkpoint_every": CHECKPOINT_EVERY,
            "cuts": [asdict(one) for one in outcomes],
        },
    )
    replace_part("nodes", text(outcomes))
    print(text(outcomes))
    if not as_documented(outcomes):
        raise SystemExit("a run did not end as the undisturbed one")


if __name__ == "__main__":
    main()
