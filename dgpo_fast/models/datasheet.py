"""Peak dense matmul rates by the makers' datasheets."""

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Datasheet:
    """One GPU's peak rates, TFLOP/s, without sparsity.

    Attributes:
        pattern: regular expression found in the name that torch gives the device.
        bf16_tflops: tensor cores, bf16 inputs and fp32 accumulation.
        fp32_tflops: without tensor cores, which torch's default for fp32 matmuls does not use.
        source: the document.
    """

    pattern: str
    bf16_tflops: float
    fp32_tflops: float
    source: str

    def peak_tflops(self, dtype: torch.dtype) -> float:
        """The rate for matmuls of `dtype`, bf16 or fp32."""
        return self.bf16_tflops if dtype == torch.bfloat16 else self.fp32_tflops


# The most special name first: the first match counts.
DATASHEETS = (
    Datasheet(r"\bB200\b", 2250, 75, "NVIDIA HGX B200 specifications"),
    Datasheet(r"\bH200 NVL\b", 835.5, 60, "NVIDIA H200 NVL datasheet"),
    Datasheet(r"\bG?H200\b", 989, 67, "NVIDIA H200 datasheet"),
    Datasheet(r"\bH100 PCIe\b", 756, 51, "NVIDIA H100 datasheet"),
    Datasheet(r"\bH100 NVL\b", 835.5, 60, "NVIDIA H100 datasheet"),
    Datasheet(r"\bH100\b", 989, 67, "NVIDIA H100 datasheet"),
    Datasheet(r"\bA100\b", 312, 19.5, "NVIDIA A100 datasheet"),
    Datasheet(r"\bL40S\b", 362, 91.6, "NVIDIA L40S datasheet"),
    Datasheet(r"\bL4\b", 121, 30.3, "NVIDIA L4 datasheet"),
    Datasheet(r"\bA10\b", 125, 31.2, "NVIDIA A10 datasheet"),
    Datasheet(r"\bRTX 4090\b", 165.2, 82.6, "NVIDIA Ada architecture whitepaper"),
    Datasheet(r"\bRTX 3090\b", 71, 35.6, "NVIDIA Ampere GA102 architecture whitepaper"),
)


def find_datasheet(device_name: str) -> Datasheet | None:
    """The datasheet of a device by torch's name for it; None for one not listed, or for a slice (MIG) of one."""
    if "MIG" in device_name or "Laptop" in device_name:
        return None
    return next((sheet for sheet in DATASHEETS if re.search(sheet.pattern, device_name)), None)


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The datasheet's rate of `device`, or None if no datasheet is listed."""
    sheet = find_datasheet(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return sheet.peak_tflops(dtype) if sheet else None
