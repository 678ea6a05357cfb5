"""Compiles every kernel, as the codec launches it, to machine code of a GPU that need not be there.

A program of its own: the interpreter, which the tests choose, and the compiler exclude each other.
Prints a JSON object for each kernel: registers, shared memory and spills, as Triton's own assembler reports
them, and what its machine code does in the loop of its product.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # each launch says what it wants
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "codec")]

import torch
import triton
from synthetic import make_block, make_parameters, make_rd_parameters
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dynamo_kvtc.codec.bitstream import StreamHeader
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.entropy_batch import HostBatchCoder, place
from dynamo_kvtc.codec.gpu.gpu_codec import GpuCodec
from dynamo_kvtc.codec.gpu.kernels.xxh3 import check_chunks, make_keys
from dynamo_kvtc.codec.gpu.rans_batch import RansBatchCoder
from dynamo_kvtc.codec.open import open_codec

#: What is counted in the innermost loop that has an instruction: of products, of a warp's rANS lanes.
LOOPS = {
    "HGMMA": {
        "products": r"\bHGMMA",
        "wide asynchronous loads": r"\bLDGSTS\S*\.128",
        "other loads": r"\bLDG\.|\bLDGSTS(?!\S*\.128)",
        "local memory": r"\b(LDL|STL)",
        "divisions": r"\bMUFU\.RCP",
    },
    "REDUX": {
        "instructions": r".",
        "sums over lanes": r"\bREDUX",
        "counts of bits": r"\bPOPC",
        "shuffles": r"\bSHFL",
        "loads": r"\bLDG",
        "stores": r"\bSTG",
        "local and shared memory": r"\b(LDL|STL|LDS|STS)",
        "divisions and barriers": r"\b(MUFU|BAR|CALL)",
    },
}


class _Driver:
    """What the compiler asks of a driver, without a device."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiled:
    """Takes the place of launches: compiles, and keeps the outcome by kernel and options."""

    def __init__(self) -> None:
        self.kernels: dict[str, Any] = {}
        self._run = JITFunction.run

    def __call__(self, function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = self._run(function, *args, grid=grid, warmup=True, **options)
        self.kernels[f"{function.fn.__module__.rsplit('.', 1)[-1]}.{kernel.hash[:6]}"] = kernel


def _dump(kernel: Any, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _describe(kernel: Any) -> dict[str, Any]:
    usage, code = _dump(kernel, "--dump-resource-usage"), _dump(kernel, "--dump-sass")
    found: dict[str, Any] = {"shared": kernel.metadata.shared}
    for name in ("REG", "STACK"):
        match = re.search(rf"{name}:(\d+)", usage)
        found[name.lower()] = int(match[1]) if match else -1
    steps = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    loops = []
    for at, step in steps:
        match = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", step)
        if match and int(match[1], 16) < at:
            loops.append((int(match[1], 16), at))
    for first, last in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        body = [step for at, step in steps if first <= at <= last]
        for sign, patterns in LOOPS.items():
            if any(sign in step for step in body):
                found["loop"] = {
                    name: sum(bool(re.search(pattern, step)) for step in body)
                    for name, pattern in patterns.items()
                }
                return found
    return found


def compile_rans(gpu: GpuDevice) -> None:
    """Launch the kernels of rANS, which the codec leaves out where it encodes DEFLATE."""
    coder, slots = RansBatchCoder(gpu), place([300])
    plain = torch.zeros(slots.total, dtype=torch.uint8)
    coder.encode(plain, slots)
    coder.decode(plain, slots, plain, slots)


def compile_xxh3(gpu: GpuDevice) -> None:
    """Launch the kernel of checksums, which only chunks that arrive in device memory need."""
    chunks = torch.zeros((3, 3), dtype=torch.int64)
    check_chunks(gpu, torch.zeros(1024, dtype=torch.uint8), chunks, make_keys(gpu))


def main() -> None:
    capability = int(sys.argv[1])
    triton.runtime.driver.set_active(_Driver(capability))  # type: ignore[arg-type]
    compiled = _Compiled()
    JITFunction.run = lambda self, *args, **options: compiled(self, *args, **options)  # type: ignore[method-assign]
    shared = {80: 163, 90: 227}.get(capability, 99) << 10
    gpu = GpuDevice(torch.device("cpu"), programs=4, shared_bytes=shared)
    geometry = KvGeometry(4, 2, int(sys.argv[2]), sys.argv[3])
    for parameters in (
        make_parameters(geometry, groups=2, ratios=(4.0,)),
        make_rd_parameters(geometry, groups=2),
    ):
        host = open_codec(parameters, ratio=next(iter(parameters.ratios.values())), threads=1)
        codec = GpuCodec(host, gpu, coder=HostBatchCoder(gpu, host.coder))
        block = make_block(parameters, 140, sink_tokens=4)
        codec.encode([block])
        stream = host.encode([block])[0]
        header: StreamHeader = host.read_header(stream)
        part = codec.open_group(header, 0, stream[slice(*header.group_span(0))])
        views = [torch.empty((18, 8, 2, geometry.head_size), dtype=geometry.torch_dtype)] * 4
        codec.scatter([part], LayerRange(0, 1), views, views, [*range(17), -1])
    compile_rans(gpu)
    compile_xxh3(gpu)
    for name, kernel in sorted(compiled.kernels.items()):
        print(json.dumps({"name": name, **_describe(kernel)}))


if __name__ == "__main__":
    main()
