"""Power, clocks and utilisation of an NVIDIA GPU, sampled through NVML during the run."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

EVERY_S = 0.05
# Bits of NVML's clocks event reasons: software power cap; hardware and software slowdown for heat.
POWER_CAP, HEAT = 0x4, 0x20 | 0x40


@dataclass(frozen=True)
class PowerSample:
    """What NVML said at one moment.

    Attributes:
        time_s: by `time.perf_counter`.
        energy_j: the GPU's own energy counter, if it has one.
        reasons: why the clocks are what they are, NVML's bits.
    """

    time_s: float
    power_w: float
    sm_clock_mhz: float
    memory_clock_mhz: float
    utilisation_percent: float
    temperature_c: float
    energy_j: float | None = None
    reasons: int = 0


def energy_between_j(samples: list[PowerSample], start_s: float, end_s: float) -> float:
    """Energy used between two moments: by the GPU's own counter, else by the trapezoid rule over the power samples.

    The counter is to be preferred: since Ampere, power readings are averages of the last second. Raises ValueError
    without samples.
    """
    if not samples:
        raise ValueError("no power samples")
    times = [sample.time_s for sample in samples]
    counter = [sample.energy_j for sample in samples if sample.energy_j is not None]
    if len(counter) == len(samples):
        start, end = np.interp([start_s, end_s], times, counter)
        return float(end - start)
    inside = [time_s for time_s in times if start_s < time_s < end_s]
    grid = [start_s, *inside, end_s]
    return float(np.trapezoid(np.interp(grid, times, [sample.power_w for sample in samples]), grid))


class PowerMeter:
    """Samples a GPU in a thread between `start` and `stop`.

    If NVML is not available (no nvidia-ml-py, no NVIDIA driver), `note` says why and there are no samples.

    Args:
        device: the run's device.
    """

    def __init__(self, device: torch.device):
        self.samples: list[PowerSample] = []
        self.note: str | None = None
        self.power_limit_w: float | None = None
        self.driver: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="power meter", daemon=True)
        self._handle = self._open(device) if device.type == "cuda" else None

    def start(self) -> None:
        """Begins sampling."""
        if self._handle:
            self._thread.start()

    def stop(self) -> None:
        """Ends sampling."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _open(self, device: torch.device) -> object | None:
        try:
            import pynvml
        except ImportError:
            self.note = 'power is not measured: nvidia-ml-py is not installed (pip install -e ".[gpu]")'
            return None
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self.driver = pynvml.nvmlSystemGetDriverVersion()
            # By its UUID: NVML does not know CUDA_VISIBLE_DEVICES.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._has_counter = _answers(pynvml, lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
            self.power_limit_w = pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1e3
            self._sample(handle)
        except pynvml.NVMLError as error:
            self.note = f"power is not measured: NVML says {error}"
            return None
        return handle

    def _watch(self) -> None:
        while not self._stop.wait(EVERY_S):
            try:
                self.samples.append(self._sample(self._handle))
            except self._nvml.NVMLError as error:
                self.note = f"power was not measured to the end: NVML says {error}"
                return

    def _sample(self, handle: object) -> PowerSample:
        nvml = self._nvml
        return PowerSample(
            time_s=time.perf_counter(),
            power_w=nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            sm_clock_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            utilisation_percent=nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            temperature_c=nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            energy_j=nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3 if self._has_counter else None,
            reasons=nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        )


def _answers(nvml: ModuleType, question: Callable[[], object]) -> bool:
    """Whether this GPU supports what is asked; older ones have no energy counter."""
    try:
        question()
    except nvml.NVMLError_NotSupported:
        return False
    return True
