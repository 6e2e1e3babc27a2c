"""The numbers of a profile: `report.json`, written by one command and read back to compare two runs.

What could not be measured on a device is None or empty; `notes` says why if it is not obvious.
"""

import json
from dataclasses import field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dgpo_fast.config.bounds import STRICT
from dgpo_fast.errors import UserError
from dgpo_fast.records import JsonObject
from dgpo_fast.run.metrics import write_json

FILE = "report.json"
SCHEMA = "dgpo_fast profile, version 1"


@dataclass(kw_only=True, config=STRICT)
class Times:
    """Seconds over the measured iterations: median, and the quantiles 0.2 and 0.8."""

    median_s: float
    low_s: float
    high_s: float


@dataclass(kw_only=True, config=STRICT)
class Span:
    """One piece of an iteration, in seconds from its start.

    Attributes:
        inside: the phase that this is a part of; None for a phase.
    """

    name: str
    start_s: float
    end_s: float
    inside: str | None = None


@dataclass(kw_only=True, config=STRICT)
class Iteration:
    """One measured iteration."""

    start_s: float
    seconds: float
    images: int
    spans: list[Span]


@dataclass(kw_only=True, config=STRICT)
class Phase:
    """One phase; `share_percent` is of the median iteration. "other" is what lies in no phase."""

    name: str
    times: Times
    share_percent: float
    peak_memory_mib: float | None = None


@dataclass(kw_only=True, config=STRICT)
class Throughput:
    """Speed of the median iteration.

    Attributes:
        tflop_per_iteration: useful ones, by the flop counter; prompt encoders and reward models left out.
        executed_tflop: those that ran, with padding and recomputation; None in reports of earlier versions.
        mfu_percent: achieved rate of the datasheet's, if the device has one here.
        of_matmul_percent: achieved rate of the matmul rate measured in this run.
    """

    iteration: Times
    images: int
    images_per_s: float
    tflop_per_iteration: float
    achieved_tflops: float
    mfu_percent: float | None
    of_matmul_percent: float
    executed_tflop: float | None = None


@dataclass(kw_only=True, config=STRICT)
class Device:
    """What the device can do.

    Attributes:
        matmul_tflops: measured in this run, a square matmul of side `matmul_size` in the run's dtype, on a GPU over
            two seconds of them back to back.
        matmul_burst_tflops: of a few of them, at the clocks of a GPU that has rested; None in older reports.
        copy_gb_per_s: measured in this run, bytes read and written.
        datasheet_tflops: dense, of the run's dtype.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    dtype: str
    matmul_tflops: float
    matmul_size: int
    copy_gb_per_s: float
    copy_mib: int
    memory_mib: float
    datasheet_tflops: float | None
    datasheet_source: str | None
    matmul_burst_tflops: float | None = None


@dataclass(kw_only=True, config=STRICT)
class Work:
    """One kind of work in the median iteration, a point on the roofline.

    Attributes:
        samples: latents sent through it.
        gbytes: inputs and outputs of every operation, once each: what unfused execution would move.
    """

    name: str
    seconds: float
    samples: int
    tflop: float
    tflops: float
    of_matmul_percent: float
    gbytes: float
    flop_per_byte: float


@dataclass(kw_only=True, config=STRICT)
class Operations:
    """All operations of one class in the traced iteration; FLOPs and bytes are those of the models' own."""

    kind: str
    seconds: float
    share_percent: float
    tflop: float
    tflops: float
    gbytes: float
    gb_per_s: float


@dataclass(kw_only=True, config=STRICT)
class Memory:
    """Memory over the measured iterations.

    Attributes:
        what: which memory.
        samples: (seconds since the first measured iteration, MiB).
        reserved_mib: most held by the allocator, on a GPU.
        held_mib: what weights, averages and optimizer states take, by name.
        predicted_mib: for the run's tensors at their peak, from its settings alone.
    """

    what: str
    samples: list[tuple[float, float]]
    peak_mib: float
    reserved_mib: float | None
    held_mib: dict[str, float]
    predicted_mib: float | None


@dataclass(kw_only=True, config=STRICT)
class Gaps:
    """Idle gaps between two lengths."""

    from_us: float
    to_us: float | None
    count: int
    total_ms: float


@dataclass(kw_only=True, config=STRICT)
class PhaseLaunches:
    """What the trace shows of one phase on a GPU."""

    name: str
    busy_percent: float
    kernels: int
    kernel_launches: int
    graph_launches: int
    synchronisations: int


@dataclass(kw_only=True, config=STRICT)
class GpuTrace:
    """What the trace shows of the whole iteration on a GPU."""

    busy_percent: float
    idle_ms: float
    kernels: int
    copies: int
    fills: int
    kernel_launches: int
    graph_launches: int
    synchronisations: int
    gaps: list[Gaps]
    phases: list[PhaseLaunches]


@dataclass(kw_only=True, config=STRICT)
class Operation:
    """All calls of one kernel, or of one operation on a CPU; the share is of all of them together."""

    name: str
    kind: str
    calls: int
    total_ms: float
    share_percent: float


@dataclass(kw_only=True, config=STRICT)
class Candidate:
    """One way to do something that was timed before one of them was chosen; `note` says why one could not be."""

    name: str
    forward_ms: float | None
    backward_ms: float | None
    chosen: bool
    note: str = ""


@dataclass(kw_only=True, config=STRICT)
class Power:
    """Of the GPU over the measured iterations, by NVML.

    Attributes:
        samples: (seconds since the first measured iteration, W, SM clock in MHz, utilisation in %).
        power_capped_percent, heat_limited_percent: share of samples in which this held the clocks back.
    """

    mean_w: float
    max_w: float
    limit_w: float | None
    energy_j: float
    energy_per_image_j: float
    sm_clock_median_mhz: float
    sm_clock_min_mhz: float
    memory_clock_median_mhz: float
    utilisation_mean_percent: float
    temperature_max_c: float
    power_capped_percent: float
    heat_limited_percent: float
    samples: list[tuple[float, float, float, float]]


@dataclass(kw_only=True, config=STRICT)
class Rewards:
    """Seconds of the median iteration: how long rewards took, and how long the training waited for them."""

    busy_s: float
    wait_s: float
    hidden_s: float


@dataclass(kw_only=True, config=STRICT)
class Process:
    """One of several processes, at the medians of its iterations' seconds.

    Attributes:
        phases: by name, the waiting in them included.
        waited_s: of all phases together, how long the others were waited for.
    """

    number: int
    waited_s: float
    phases: dict[str, float]


@dataclass(kw_only=True, config=STRICT)
class Processes:
    """How even the work of several processes was.

    Attributes:
        imbalance: how long the slowest one worked, over the mean; 1 is even.
    """

    imbalance: float
    rows: list[Process]


@dataclass(kw_only=True, config=STRICT)
class Report:
    """One profile."""

    schema_name: str = SCHEMA
    recipe: str
    model: str
    created: str
    command: str
    warmup_iterations: int
    traced_iteration_s: float
    trace_file: str
    device: Device
    throughput: Throughput
    iterations: list[Iteration]
    phases: list[Phase]
    work: list[Work]
    operations: list[Operations]
    hottest: list[Operation]
    memory: Memory
    gpu: GpuTrace | None = None
    power: Power | None = None
    rewards: Rewards | None = None
    processes: Processes | None = None
    candidates: dict[str, list[Candidate]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: JsonObject
    versions: dict[str, str]


ADAPTER = TypeAdapter(Report)


def write_report(report: Report, folder: Path) -> None:
    """Writes `report.json` into `folder`."""
    write_json(folder / FILE, ADAPTER.dump_python(report, mode="json"))


def read_report(path: Path) -> Report:
    """The report in `path`, a file or a profile's folder. Raises UserError if there is none."""
    path = path / FILE if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("schema_name") != SCHEMA:
            raise UserError(f"{path}: not a report of `python -m dgpo_fast.profile` that this version reads")
        return ADAPTER.validate_python(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: damaged at '{where}': {first['msg'].lower()}; profile the run again") from None
    except ValueError:
        raise UserError(f"{path}: not JSON; give the report.json of a profile") from None
