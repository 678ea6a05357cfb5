"""Device memory for what is in flight: how much a batch takes, and a fixed budget that bounds the sum.

The memory itself comes from torch's caching allocator, which knows streams; a batch takes its bytes from the
budget before it allocates, and waits within a deadline where others hold them.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dynamo_kvtc.codec.gpu.weights import padded_components, stored_components
from dynamo_kvtc.codec.header import align, header_size
from dynamo_kvtc.codec.packing import SectionLayout
from dynamo_kvtc.codec.parameters import AnyParameters
from dynamo_kvtc.codec.plan import BitPlan
from dynamo_kvtc.codec.quantiser import PlanQuantiser
from dynamo_kvtc.codec.rd_packing import RdLayout
from dynamo_kvtc.errors import LayoutError, TransferTimeoutError

__all__ = [
    "Batch",
    "StagingBudget",
    "decode_bytes",
    "decode_bytes_per_token",
    "encode_bytes",
    "encode_bytes_per_token",
]

#: Tokens of the tier blocks by which sizes per token are taken, unless told.
_TOKENS = 256

#: Bytes of a token's cosines and sines, with what making them takes, by channel of a head: float64 angles,
#: float32 cosines and sines before and after padding, half as many as channels each.
_ROTATION_BYTES = 24

#: Bytes of a token's place, owner, position, importance, scale and level.
_INDEX_BYTES = 48

#: Bytes of a token's place among bytes of ternary symbols (`TritTiles`).
_TRIT_BYTES = 16


def _plan(side: Any, plan_id: int) -> RdLayout | SectionLayout:
    plan = side.plans[plan_id]
    return SectionLayout.of(PlanQuantiser(plan)) if isinstance(plan, BitPlan) else RdLayout(plan.counts)


def _section(layout: RdLayout | SectionLayout, tokens: int) -> tuple[int, list[int]]:
    """Return the bytes of the largest payload, and its chunks."""
    if isinstance(layout, RdLayout):
        return layout.payload_bounds(tokens)[1], [sum(runs) for runs in layout.max_chunks(tokens)]
    return layout.payload_size(tokens), list(layout.chunk_sizes(tokens))


def _aligned(sizes: Sequence[int]) -> int:
    return sum(map(align, sizes))


def encode_bytes(
    parameters: AnyParameters,
    plan_id: int,
    counts: Sequence[int],
    coder_bytes: Callable[[Sequence[int]], int] = _aligned,
) -> int:
    """Return the bytes of device memory that a batch takes while it is encoded.

    Of the side in work: centred rows in bfloat16, importance sums, lists of escapes. Of all sides: payloads,
    their copy in aligned slots, the coder's slots, the image of the streams. Rotation tables and indices.

    Parameters
    ----------
    counts : Sequence[int]
        Coded tokens of each tier block.
    coder_bytes : Callable
        `BatchCoder.encode_bytes`: of chunks of given sizes. A coder's own scratch memory is not known and not
        counted.
    """
    sides = [side for group in parameters.groups for side in (group.keys, group.values)]
    layouts = [_plan(side, plan_id) for side in sides]
    geometry, work = parameters.geometry, 0
    for side, layout in zip(sides, layouts, strict=True):
        row = side.mean.numel()
        if isinstance(layout, RdLayout):
            sums = 4 * row // geometry.head_size + _TRIT_BYTES
            lists = 8 * len(counts) * max(map(layout.max_escapes, counts))
        else:
            sums, lists = 0, 0
        work = max(work, (2 * row + sums) * sum(counts) + lists)
    payloads, chunks, headers = 0, [], 0
    for tokens in counts:
        sections = [_section(layout, tokens) for layout in layouts]
        payloads += sum(size for size, _ in sections)
        own = [size for _, sizes in sections for size in sizes]
        headers += header_size(len(own) + 2 * len(sections))
        chunks += own
    fixed = (_ROTATION_BYTES * geometry.head_size + _INDEX_BYTES) * sum(counts)
    return work + payloads + 2 * _aligned(chunks) + coder_bytes(chunks) + headers + fixed


def decode_bytes(
    parameters: AnyParameters, plan_id: int, group: int, counts: Sequence[int], inflate_bytes: int
) -> int:
    """Return the bytes of device memory that one layer group of a batch takes while it is decoded.

    Parameters
    ----------
    counts : Sequence[int]
        Coded tokens of each tier block.
    inflate_bytes : int
        Stored chunks, inflated ones and payloads: `InflatePlan.total_bytes`. nvCOMP's own scratch memory is
        not known and not counted.
    """
    sides = (parameters.groups[group].keys, parameters.groups[group].values)
    stored = sum(padded_components(stored_components(side, plan_id).numel()) for side in sides)
    token = 2 * stored + _ROTATION_BYTES * parameters.geometry.head_size + _INDEX_BYTES
    return inflate_bytes + token * sum(counts)


def encode_bytes_per_token(
    parameters: AnyParameters,
    plan_id: int,
    *,
    block_tokens: int = _TOKENS,
    coder_bytes: Callable[[Sequence[int]], int] = _aligned,
) -> int:
    """Return `encode_bytes` of one tier block, by token, rounded up."""
    return -(-encode_bytes(parameters, plan_id, [block_tokens], coder_bytes) // block_tokens)


def decode_bytes_per_token(parameters: AnyParameters, plan_id: int, *, block_tokens: int = _TOKENS) -> int:
    """Return `decode_bytes` of the largest group of a tier block that did not shrink, by token."""
    most = 0
    for group, sides in enumerate(parameters.groups):
        sections = [_section(_plan(side, plan_id), block_tokens) for side in (sides.keys, sides.values)]
        inflated = sum(2 * _aligned(sizes) + align(payload) for payload, sizes in sections)
        most = max(most, decode_bytes(parameters, plan_id, group, [block_tokens], inflated))
    return -(-most // block_tokens)


class Batch:
    """What the parts of a batch share: while any of them is referenced, it holds their bytes of a budget."""


class StagingBudget:
    """A fixed number of bytes, shared by all batches of a codec. Thread-safe.

    Parameters
    ----------
    nbytes : int
        The budget.
    timeout_s : float
        How long a batch waits for its bytes.
    """

    def __init__(self, nbytes: int, timeout_s: float = 30.0) -> None:
        self.nbytes = nbytes
        self._timeout_s = timeout_s
        self._taken = 0
        self._held: dict[int, int] = {}
        # Garbage collection may run a finalizer in a thread that holds the lock.
        self._changed = threading.Condition(threading.RLock())

    @property
    def taken(self) -> int:
        """Bytes that batches hold."""
        return self._taken

    @contextmanager
    def taken_by(self, owner: object, nbytes: int) -> Iterator[None]:
        """Take bytes as `take` does, and give them back at once if the block fails."""
        self.take(nbytes, owner)
        try:
            yield
        except BaseException:
            self.shrink(owner, 0)
            raise

    def take(self, nbytes: int, owner: object) -> None:
        """Take bytes until `owner` is no longer referenced; blocks the thread while others hold them.

        Raises
        ------
        LayoutError
            If the batch is larger than the budget.
        TransferTimeoutError
            If the bytes did not become free in time.
        """
        if nbytes > self.nbytes:
            raise LayoutError(
                f"a batch takes {nbytes} bytes of device memory, the GPU codec may use {self.nbytes}: raise "
                "codec.gpu.memory, or lower policy.tier_block_tokens"
            )
        deadline = time.monotonic() + self._timeout_s
        with self._changed:
            while self._taken + nbytes > self.nbytes:
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise TransferTimeoutError(
                        f"no {nbytes} bytes of device staging memory within {self._timeout_s:g} s "
                        f"({self._taken} of {self.nbytes} are in use)"
                    )
            self._taken += nbytes
            self._held[id(owner)] = nbytes
        weakref.finalize(owner, self._shrink, id(owner), 0)

    def shrink(self, owner: object, nbytes: int) -> None:
        """Give back all but `nbytes` of what an owner holds."""
        self._shrink(id(owner), nbytes)

    def _shrink(self, owner: int, nbytes: int) -> None:
        with self._changed:
            held = self._held.pop(owner, 0)
            left = min(held, nbytes)
            self._taken -= held - left
            if left:
                self._held[owner] = left
            self._changed.notify_all()
