"""What a profile ran on: the device, its rates, and the versions of all that matters."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil
import torch

import dgpo_fast
from dgpo_fast.models.datasheet import find_datasheet
from dgpo_fast.profiling.rates import Rates
from dgpo_fast.profiling.report import Device
from dgpo_fast.run.version import code_version

PACKAGES = ("torch", "diffusers", "transformers", "peft", "triton", "xformers", "bitsandbytes", "torchao", "numpy")


def device_row(device: torch.device, dtype: torch.dtype, rates: Rates) -> Device:
    """The device with its measured and its datasheet's rates."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else cpu_name()
    sheet = find_datasheet(name) if on_gpu else None
    memory = torch.cuda.mem_get_info(device)[1] if on_gpu else psutil.virtual_memory().total
    return Device(
        kind="cuda" if on_gpu else "cpu",
        name=name,
        dtype=str(dtype).removeprefix("torch."),
        matmul_tflops=rates.matmul_tflops,
        matmul_burst_tflops=rates.matmul_burst_tflops,
        matmul_size=rates.matmul_size,
        copy_gb_per_s=rates.copy_gb_per_s,
        copy_mib=rates.copy_mib,
        memory_mib=memory / 2**20,
        datasheet_tflops=sheet.peak_tflops(dtype) if sheet else None,
        datasheet_source=sheet.source if sheet else None,
    )


def cpu_name() -> str:
    """The processor's name, with its family and model (a cloud's processors of several kinds share one name) and the
    threads that torch uses."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            pairs = (line.partition(":") for line in file.read().split("\n\n")[0].splitlines())
        about = {key.strip(): value.strip() for key, _, value in pairs}
        name = about.get("model name", name)
        if "cpu family" in about and "model" in about:
            name += f" (family {about['cpu family']}, model {about['model']})"
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''} of {os.cpu_count()} cores"


def versions(device: torch.device, driver: str | None) -> dict[str, str]:
    """What ran, by name: code, interpreter, libraries and, if it is known, the GPU's driver."""
    found: dict[str, str | None] = {
        "dgpo_fast": code_version(),
        "commit": commit(),
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if device.type == "cuda":
        found |= {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version()), "driver": driver}
    found["system"] = platform.platform()
    return {name: version for name, version in found.items() if version}


def commit() -> str | None:
    """The commit of the code with `-dirty` if files differ from it; None outside a git checkout."""
    folder = Path(str(dgpo_fast.__file__)).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
