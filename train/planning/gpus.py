"""How fast are GPUs at most, and how long does a number of operations take on some of them?

Peaks are of dense bfloat16 matrix products with float32 accumulation, from NVIDIA's data sheets
and white papers. Sheets often print the figure with 2:4 sparsity, twice as much; and a table in
wide use lists the H100 with the A100's 312e12.
"""

import functools
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """One model: dense bfloat16 peak in operations a second, memory in GiB, where that stands."""

    peak: float
    memory: float
    source: str


GPUS: dict[str, Gpu] = {
    "B200": Gpu(2250e12, 180, "DGX B200 data sheet: 4.5e15 with sparsity, halved"),
    "H200": Gpu(989.4e12, 141, "H200 data sheet: 1,979e12 with sparsity, halved"),
    "H100": Gpu(989.4e12, 80, "H100 (SXM) data sheet: 1,979e12 with sparsity, halved"),
    "H100-PCIe": Gpu(756e12, 80, "H100 data sheet: 1,513e12 with sparsity, halved"),
    "A100-80": Gpu(312e12, 80, "A100 data sheet"),
    "A100-40": Gpu(312e12, 40, "A100 data sheet"),
    "L40S": Gpu(362e12, 48, "L40S data sheet: 733e12 with sparsity, halved"),
    "A40": Gpu(149.7e12, 48, "A40 data sheet"),
    "A10": Gpu(125e12, 24, "A10 data sheet"),
    "L4": Gpu(121e12, 24, "L4 data sheet: 242e12 with sparsity, halved"),
    "4090": Gpu(165.2e12, 24, "Ada white paper, GeForce RTX 4090, float32 accumulation"),
    "3090": Gpu(71e12, 24, "GA102 white paper, GeForce RTX 3090, float32 accumulation"),
}

# What the driver calls them, as far as that is known.
DEVICE_NAMES = {
    "NVIDIA B200": "B200",
    "NVIDIA H200": "H200",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100-PCIe",
    "NVIDIA A100-SXM4-80GB": "A100-80",
    "NVIDIA A100 80GB PCIe": "A100-80",
    "NVIDIA A100-SXM4-40GB": "A100-40",
    "NVIDIA A100-PCIE-40GB": "A100-40",
    "NVIDIA L40S": "L40S",
    "NVIDIA A40": "A40",
    "NVIDIA A10": "A10",
    "NVIDIA L4": "L4",
    "NVIDIA GeForce RTX 4090": "4090",
    "NVIDIA GeForce RTX 3090": "3090",
}

# Float32: 2 units of 16 lanes, a multiplication and an addition each, at 2 GHz.
CORE_PEAK = 2 * 16 * 2 * 2e9
MEASURING = 0.05  # seconds that measuring a CPU may take, about


def this_cpu(cores: int, memory: int) -> Gpu:
    """Return a CPU of so many cores and bytes of memory, in float32, as if it were a GPU."""
    return Gpu(cores * CORE_PEAK, memory / 2**30, f"{cores} cores of two AVX-512 units at 2 GHz")


def device_name(device: torch.device) -> str:
    """Return what a device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_of(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the operations a second of a device at most; None: nobody knows.

    Args:
        device: a GPU, whose bfloat16 peak counts whatever it computes in, or this CPU.
        dtype: of the CPU's matrix products.
    """
    if device.type == "cpu":
        return measured_peak(dtype, torch.get_num_threads())
    name = DEVICE_NAMES.get(device_name(device))
    return None if name is None else GPUS[name].peak


@functools.cache
def measured_peak(dtype: torch.dtype, threads: int) -> float:
    """Return the operations a second of this CPU's best matrix product, in about 0.05 seconds.

    Args:
        dtype: of the numbers.
        threads: of torch, as it is set; another number is measured anew.
    """
    best, start, size = 0.0, time.perf_counter(), 512
    while time.perf_counter() - start < MEASURING / 2:
        square = torch.ones(size, size, dtype=dtype)
        for _ in range(4):
            before = time.perf_counter()
            torch.mm(square, square)
            best = max(best, 2 * size**3 / (time.perf_counter() - before))
        size *= 2
    return best


def hours(flops: float, gpus: int, peak: float, mfu: float) -> float:
    """Return the hours that `flops` take where `mfu` of the peak of all GPUs is reached."""
    return flops / (gpus * peak * mfu) / 3600
