"""The rates that floors are made of: measured on a device, or of its data sheet for predictions."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.stages import StageClock
from dynamo_kvtc.errors import EvaluationError

__all__ = ["DATA_SHEETS", "Rates", "best_seconds", "data_sheet", "measure_rates"]

#: Edge of the square matrices, and bytes of the copies, that rates are measured with.
_MATRIX, _COPY_BYTES = 8192, 1 << 30
_SMALL_MATRIX, _SMALL_COPY_BYTES = 256, 1 << 20


@dataclass(frozen=True, slots=True)
class Rates:
    """What one device does at best.

    Attributes
    ----------
    device : str
        Its name.
    source : str
        ``"measured"`` or ``"data sheet"``.
    matrix : float
        Operations a second of bf16 matrix products that are summed in float32.
    memory : float
        Bytes a second of a copy on the device, read and written ones together.
    to_device, to_host : float
        Bytes a second between pinned host memory and the device.
    """

    device: str
    source: str
    matrix: float
    memory: float
    to_device: float
    to_host: float


#: NVIDIA's data sheets: bf16 tensor cores without sparsity, memory, and PCIe 5 x16 in one direction.
DATA_SHEETS: dict[str, Rates] = {
    "H100": Rates("H100 SXM", "data sheet", 989e12, 3.35e12, 64e9, 64e9),
    "H200": Rates("H200 SXM", "data sheet", 989e12, 4.8e12, 64e9, 64e9),
}


def data_sheet(device: str) -> Rates:
    """Return the rates of a device's data sheet.

    Raises
    ------
    EvaluationError
        If none is known.
    """
    if device.upper() not in DATA_SHEETS:
        raise EvaluationError(f"no data sheet of {device!r} is known; choose one of {', '.join(DATA_SHEETS)}")
    return DATA_SHEETS[device.upper()]


def best_seconds(gpu: GpuDevice, work: Callable[[], object], *, repetitions: int = 10) -> float:
    """Return the shortest of some runs on the device's stream, after one that is not counted."""
    clock = StageClock()
    with gpu.active():
        gpu.after_engine(None)  # operands were made on the default stream
        work()
        spans = []
        for _ in range(repetitions):
            start = clock.mark(gpu.stream)
            work()
            spans.append((start, clock.mark(gpu.stream)))
        return max(
            min(clock.between(*span) for span in spans), time.get_clock_info("perf_counter").resolution
        )


def measure_rates(gpu: GpuDevice) -> Rates:
    """Measure the best that torch reaches on a device, with all of its SMs; small sizes without a GPU."""
    real = gpu.stream is not None
    device = gpu.device
    edge, nbytes = (_MATRIX, _COPY_BYTES) if real else (_SMALL_MATRIX, _SMALL_COPY_BYTES)
    a, b = (torch.randn((edge, edge), device=device).to(torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    matrix = 2 * edge**3 / best_seconds(gpu, lambda: torch.matmul(a, b, out=product))
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    memory = 2 * nbytes / best_seconds(gpu, lambda: target.copy_(source))
    pinned = torch.ones(nbytes, dtype=torch.uint8, pin_memory=real)
    return Rates(
        torch.cuda.get_device_name(device) if real else "CPU, Triton's interpreter",
        "measured",
        matrix,
        memory,
        nbytes / best_seconds(gpu, lambda: target.copy_(pinned, non_blocking=True)),
        nbytes / best_seconds(gpu, lambda: pinned.copy_(source, non_blocking=True)),
    )
