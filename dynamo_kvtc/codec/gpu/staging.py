"""Device memory for what is in flight: how much a token takes, and a fixed budget that bounds the sum.

The memory itself comes from torch's caching allocator, which knows streams; a batch takes its bytes from the
budget before it allocates, and waits within a deadline where others hold them.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

from dynamo_kvtc.codec.gpu.weights import padded_components, stored_components
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.codec.packing import SectionLayout
from dynamo_kvtc.codec.parameters import AnyParameters
from dynamo_kvtc.codec.plan import BitPlan
from dynamo_kvtc.codec.quantiser import PlanQuantiser
from dynamo_kvtc.codec.rd_packing import RdLayout
from dynamo_kvtc.errors import LayoutError, TransferTimeoutError

__all__ = ["StagingBudget", "decode_bytes_per_token", "encode_bytes_per_token"]

#: Tokens by which sizes per token are taken: sizes round up to whole bytes per component.
_TOKENS = 256


def _payload_bytes(side: Any, plan_id: int) -> int:
    plan = side.plans[plan_id]
    if isinstance(plan, BitPlan):
        return SectionLayout.of(PlanQuantiser(plan)).payload_size(_TOKENS)
    return RdLayout(plan.counts).payload_bounds(_TOKENS)[1]


def _stored(side: Any, plan_id: int) -> int:
    return stored_components(side, plan_id).numel()


def encode_bytes_per_token(parameters: AnyParameters, plan_id: int) -> int:
    """Return the bytes of device memory that a token takes while it is encoded.

    Centred rows in bfloat16 and what leaves the product unpacked (float32 coefficients with kvtc, a byte for
    each ternary symbol with rd) of the side in work; payloads, their aligned copy, coded chunks and the
    stream image of all sides; rotation tables; importance sums.
    """
    sides = [side for group in parameters.groups for side in (group.keys, group.values)]
    rows = max(2 * side.mean.numel() for side in sides)
    if parameters.profile is Profile.RD:
        unpacked = max(int(side.plans[plan_id].counts[3]) for side in sides)
        sums = max(4 * side.mean.numel() // parameters.geometry.head_size for side in sides)
    else:
        unpacked, sums = max(4 * _stored(side, plan_id) for side in sides), 0
    payloads = sum(_payload_bytes(side, plan_id) for side in sides)
    return int(rows + unpacked + sums) + -(-4 * payloads // _TOKENS) + 8 * parameters.geometry.head_size


def decode_bytes_per_token(parameters: AnyParameters, plan_id: int) -> int:
    """Return the bytes of device memory that a token takes while one layer group of it is decoded.

    Stored chunks, inflated ones and the payload (each at most the payload's size), coefficients in bfloat16
    of both sides, rotation tables; of the largest group.
    """
    most = 0
    for group in parameters.groups:
        sides = (group.keys, group.values)
        payloads = sum(_payload_bytes(side, plan_id) for side in sides)
        most = max(most, -(-3 * payloads // _TOKENS) + _coefficients(sides, plan_id))
    return most + 4 * parameters.geometry.head_size


def _coefficients(sides: tuple[Any, ...], plan_id: int) -> int:
    return sum(2 * padded_components(_stored(side, plan_id)) for side in sides)


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
        self._changed = threading.Condition()

    @property
    def taken(self) -> int:
        """Bytes that batches hold."""
        return self._taken

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
                "the codec's staging_bytes, or encode fewer at once"
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
        weakref.finalize(owner, self._give_back, nbytes)

    def _give_back(self, nbytes: int) -> None:
        with self._changed:
            self._taken -= nbytes
            self._changed.notify_all()
