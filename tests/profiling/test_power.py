"""Energy by hand, and the meter against a driver that answers, lacks a counter, or is not there."""

import sys
import time
import types
from typing import Any

import pytest
import torch

from dgpo_fast.profiling.build import power_row
from dgpo_fast.profiling.power import PowerMeter, PowerSample, energy_between_j
from dgpo_fast.profiling.recorder import Recording


def sample(time_s: float, power_w: float, energy_j: float | None = None, reasons: int = 0) -> PowerSample:
    return PowerSample(time_s, power_w, 1700.0, 2600.0, 90.0, 55.0, energy_j, reasons)


def test_energy_is_the_area_under_the_power() -> None:
    """100 W for a second, then a rise to 300 W in a second: 100 J + 200 J; half a second at either end beyond."""
    samples = [sample(0, 100), sample(1, 100), sample(2, 300)]
    assert energy_between_j(samples, 0, 2) == pytest.approx(300)
    assert energy_between_j(samples, 0.5, 1.5) == pytest.approx(50 + 0.5 * (100 + 200) / 2)
    assert energy_between_j(samples, -0.5, 2.5) == pytest.approx(50 + 300 + 150)


def test_the_gpus_own_counter_counts_where_there_is_one() -> None:
    samples = [sample(0, 1, 1000.0), sample(1, 1, 1400.0), sample(2, 1, 1500.0)]
    assert energy_between_j(samples, 0.5, 2) == pytest.approx(300)


def test_no_samples_no_energy() -> None:
    with pytest.raises(ValueError, match="no power samples"):
        energy_between_j([], 0, 1)


def test_a_power_row_by_hand() -> None:
    """Two seconds at 100 W and 300 W, 8 images; one sample of four held back by the power cap."""
    meter = PowerMeter(torch.device("cpu"))
    meter.samples = [sample(0, 100), sample(1, 100), sample(1.00001, 300, reasons=0x4), sample(2, 300)]
    row = power_row(meter, [Recording(0.0, 1.0), Recording(1.0, 2.0)], images=8)
    assert row is not None
    assert row.energy_j == pytest.approx(400, rel=1e-4) and row.energy_per_image_j == pytest.approx(50, rel=1e-4)
    assert (row.mean_w, row.max_w, row.power_capped_percent) == (pytest.approx(200, rel=1e-4), 300, 25)
    assert row.heat_limited_percent == 0


def test_a_cpu_has_no_power_and_needs_no_note() -> None:
    meter = PowerMeter(torch.device("cpu"))
    meter.start()
    meter.stop()
    assert (meter.samples, meter.note) == ([], None)
    assert power_row(meter, [Recording(0.0, 1.0)], images=8) is None


class Driver(types.SimpleNamespace):
    """Answers as NVML does; 250 W, and a counter where `counter` is set."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self, counter: bool = True, found: bool = True):
        self.counter, self.found = counter, found

    def nvmlInit(self) -> None:
        if not self.found:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.counter:
            raise self.NVMLError_NotSupported("Not Supported")
        return int(time.perf_counter() * 250_000)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-1234"
        return uuid

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlSystemGetDriverVersion": "580.1",
            "nvmlDeviceGetPowerManagementLimit": 700_000,
            "nvmlDeviceGetPowerUsage": 250_000,
            "nvmlDeviceGetClockInfo": 1700,
            "nvmlDeviceGetTemperature": 50,
            "nvmlDeviceGetUtilizationRates": types.SimpleNamespace(gpu=97),
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0,
        }
        return lambda *_: answers[name]


def run_meter(monkeypatch: pytest.MonkeyPatch, driver: Driver | None) -> PowerMeter:
    monkeypatch.setitem(sys.modules, "pynvml", driver)  # None: not installed
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1234"))
    meter = PowerMeter(torch.device("cuda"))
    meter.start()
    time.sleep(0.2)
    meter.stop()
    return meter


@pytest.mark.parametrize("counter", [True, False])
def test_a_gpu_is_sampled_by_its_uuid(counter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = run_meter(monkeypatch, Driver(counter=counter))
    assert meter.note is None and meter.samples and (meter.power_limit_w, meter.driver) == (700, "580.1")
    first, last = meter.samples[0], meter.samples[-1]
    assert (first.power_w, first.sm_clock_mhz, first.utilisation_percent) == (250, 1700, 97)
    energy = energy_between_j(meter.samples, first.time_s, last.time_s)
    assert energy == pytest.approx(250 * (last.time_s - first.time_s), rel=1e-2, abs=0.1)


def test_no_driver_and_no_package_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_meter(monkeypatch, Driver(found=False)).note == "power is not measured: NVML says Driver Not Loaded"
    note = run_meter(monkeypatch, None).note
    assert note is not None and "nvidia-ml-py is not installed" in note
