"""What rANS should take on a Hopper GPU: how many warps there are, and how long the chain of each is.

A warp codes a chunk, step by step of 32 bytes; nothing but other warps hides the time of a step. Instructions
are those in the machine code of the loops (`tests/gpu/test_gpu_compile.py` bounds them); cycles of a step are
assumed: dependent instructions at the latencies known of NVIDIA's GPUs, rounded up. None of it is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from dynamo_kvtc.codec.entropy import MAX_RANS_CHUNK_BYTES
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.evaluation.gpu.rates import Rates
from dynamo_kvtc.evaluation.gpu.work import STREAM_TOKENS, SideWork

__all__ = ["RANS_ASSUMPTIONS", "rans_seconds"]

#: Multiprocessors of an H100 or H200 SXM; instructions a cycle that one issues, and bf16 operations a cycle
#: of its matrix units, from which and the data sheet the clock follows. By direction: cycles of a step, and
#: instructions of a step, tables and counts with them.
RANS_ASSUMPTIONS = {
    "multiprocessors": 132.0,
    "issued_per_cycle": 4.0,
    "matrix_operations_per_cycle": 4096.0,
    "inflate_cycles": 200.0,
    "inflate_instructions": 44.0,
    "deflate_cycles": 100.0,
    "deflate_instructions": 66.0,
}

_LANES = 32


def rans_seconds(stage: str, sides: Sequence[SideWork], tokens: int, rates: Rates) -> float:
    """Return the seconds of ``"inflate"`` or ``"deflate"`` of all tokens, bytes of memory aside.

    Layer groups are decoded one after the other, each in one launch; encoding takes all of them in one.

    Parameters
    ----------
    sides : Sequence[SideWork]
        Of all layer groups, keys before values.
    """
    assumed = RANS_ASSUMPTIONS
    clock = rates.matrix / (assumed["multiprocessors"] * assumed["matrix_operations_per_cycle"])
    at_once = assumed["multiprocessors"] * GpuDevice.STREAMING
    launches = (
        [sides] if stage == "deflate" else [sides[first : first + 2] for first in range(0, len(sides), 2)]
    )
    cycles = 0.0
    for launch in launches:
        payloads = [STREAM_TOKENS * side.plain_bytes for side in launch]
        of_stream = [ceil(payload / MAX_RANS_CHUNK_BYTES) for payload in payloads]
        chunks = sum(of_stream) * tokens / STREAM_TOKENS
        steps = max(p / n for p, n in zip(payloads, of_stream, strict=True)) / _LANES
        chain = ceil(chunks / at_once) * steps * assumed[f"{stage}_cycles"]
        issued = sum(payloads) * tokens / STREAM_TOKENS / _LANES * assumed[f"{stage}_instructions"]
        cycles += max(chain, issued / (assumed["multiprocessors"] * assumed["issued_per_cycle"]))
    return cycles / clock
