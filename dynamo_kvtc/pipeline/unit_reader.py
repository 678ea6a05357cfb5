"""The reading half of an onboard: headers first, then units in order, the next ones always in flight."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import torch

from dynamo_kvtc.blocking import run_to_end
from dynamo_kvtc.codec.base import KvCodec
from dynamo_kvtc.codec.bitstream import StreamHeader
from dynamo_kvtc.codec.paged_codec import Payload
from dynamo_kvtc.deadline import wait_out
from dynamo_kvtc.errors import KvtcError, ObjectMissingError, StreamMismatchError
from dynamo_kvtc.observability import Counters
from dynamo_kvtc.pipeline.device_staging import DeviceStaging
from dynamo_kvtc.pipeline.onboard_settings import OnboardSettings
from dynamo_kvtc.pipeline.sound_prefix import SoundPrefix
from dynamo_kvtc.pipeline.timeline import Timeline
from dynamo_kvtc.pipeline.units import Unit
from dynamo_kvtc.policy import OffloadPolicy
from dynamo_kvtc.tiers.base import ReadRequest
from dynamo_kvtc.tiers.stack import TierStack
from dynamo_kvtc.transfer.device_memory import tensor_of
from dynamo_kvtc.transfer.memory import MemorySpan
from dynamo_kvtc.transfer.staging import StagingPool

__all__ = ["ReadUnit", "UnitReader"]

_log = logging.getLogger(__name__)

#: Reads end at this share of an onboard's deadline, so that a tier is told when it was what took too long.
_READ_SHARE = 0.95


@dataclass(slots=True)
class ReadUnit:
    """A unit whose bytes have arrived.

    Attributes
    ----------
    payloads : Sequence[Payload]
        The layer group's bytes of each tier block of the unit that was sound when it was read: all of them on
        the host, or all of them on the device.
    leases : AsyncExitStack
        Holds the staging memory they lie in, and the unit's place among those in flight; whoever takes the
        unit closes it.
    """

    unit: Unit
    payloads: Sequence[Payload]
    leases: AsyncExitStack


class UnitReader:
    """Reads the tier blocks of one request into staging memory.

    A tier block that is missing, damaged or late shortens the request, which is no error here.

    Parameters
    ----------
    prefix : SoundPrefix
        The request; it is shortened by what fails.
    executor : Executor
        Checks headers.
    device_staging : DeviceStaging, optional
        Where units go that need not pass through the host.
    """

    def __init__(
        self,
        codec: KvCodec,
        tiers: TierStack,
        staging: StagingPool,
        policy: OffloadPolicy,
        settings: OnboardSettings,
        executor: Executor,
        prefix: SoundPrefix,
        timeline: Timeline,
        counters: Counters,
        device_staging: DeviceStaging | None = None,
    ) -> None:
        self._codec, self._tiers, self._staging, self._policy = codec, tiers, staging, policy
        self._settings, self._executor, self._prefix = settings, executor, prefix
        self._timeline, self._counters, self._device = timeline, counters, device_staging
        self._until = time.monotonic() + _READ_SHARE * settings.timeout_s
        #: Headers of the leading tier blocks, once they are read.
        self.headers: list[StreamHeader] = []
        self._slots = asyncio.Semaphore(settings.transfers_in_flight)
        # None is the end.
        self._arrived: asyncio.Queue[ReadUnit | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def read_headers(self) -> None:
        """Read and check every tier block's header, in one batch of small reads."""
        refs, sizes = self._prefix.refs, []
        for ref in refs:
            bound = self._codec.max_header_bytes(ref.num_tokens, self._policy.sinks_in(ref.first_position))
            stored = self._tiers.size_of(ref.key)
            # An object that is gone fails the read below, which says so.
            sizes.append(bound if stored is None else min(bound, stored))
        async with self._staging.lease(sum(sizes), timeout_s=self._settings.timeout_s) as span:
            spans, offset = [], 0
            for size in sizes:
                spans.append(span.slice(offset, size))
                offset += size
            reads = [ReadRequest(ref.key, 0, into) for ref, into in zip(refs, spans, strict=True)]
            await self._get(reads, Unit(-1, 0, len(reads)))
            checks = [partial(self._check_header, index, spans[index]) for index in range(self._prefix.count)]
            self.headers, failure = await run_to_end(self._executor, lambda: _until_failure(checks))
        if failure is not None:
            self._prefix.end_before(len(self.headers), failure)

    def start(self, units: Sequence[Unit]) -> None:
        """Begin to read `units`, so many at a time as the settings say."""
        self._task = asyncio.get_running_loop().create_task(self._run(units))

    async def next(self) -> ReadUnit:
        """Return the next unit in order.

        Raises
        ------
        BaseException
            What ended the reading early.
        """
        item = await self._arrived.get()
        if item is None:
            assert self._task is not None
            self._task.result()  # raises what ended the reader early
            raise AssertionError("the reader ended before its last unit")
        return item

    @property
    def waits(self) -> bool:
        """Whether the next unit is still in flight."""
        return self._arrived.empty()

    async def close(self) -> None:
        """Stop reading and give back the memory of the units that nobody took, also if cancelled."""
        cancelled = None
        if self._task is not None:
            self._task.cancel()
            cancelled = await wait_out(self._task)
        while not self._arrived.empty():
            if (item := self._arrived.get_nowait()) is not None:
                await item.leases.aclose()
        if cancelled is not None:
            try:
                raise cancelled
            finally:
                del cancelled  # its traceback holds this frame

    async def _run(self, units: Sequence[Unit]) -> None:
        """Keep the next units in flight; hand them over in order."""
        try:
            for unit in units:
                await self._slots.acquire()
                async with AsyncExitStack() as leases:
                    leases.callback(self._slots.release)
                    payloads = await self._read(unit, leases)
                    self._arrived.put_nowait(ReadUnit(unit, payloads, leases.pop_all()))
        finally:
            self._arrived.put_nowait(None)

    async def _read(self, unit: Unit, leases: AsyncExitStack) -> Sequence[Payload]:
        spans_in_stream = [
            self.headers[index].group_span(unit.group)
            for index in range(unit.first, min(unit.stop, self._prefix.count))
        ]
        total = sum(stop - start for start, stop in spans_in_stream)
        if not total:  # the request ended in front of this unit, or its plan stores nothing
            return [memoryview(b"")] * len(spans_in_stream)
        if self._device is not None:
            landed = await self._land(self._device, unit, spans_in_stream, leases)
            if landed is not None:
                return landed
        lease = self._staging.lease(total, timeout_s=self._settings.timeout_s)
        span = await leases.enter_async_context(lease)
        reads = self._requests(unit, spans_in_stream, span)
        await self._get(reads, unit)
        return [read.into.view for read in reads]

    def _requests(
        self, unit: Unit, spans_in_stream: Sequence[tuple[int, int]], into: MemorySpan
    ) -> list[ReadRequest]:
        """Return what to read of each of a unit's tier blocks, one behind the other into `into`."""
        reads, offset = [], 0
        for ref, (start, stop) in zip(self._prefix.refs[unit.first :], spans_in_stream, strict=False):
            reads.append(ReadRequest(ref.key, start, into.slice(offset, stop - start)))
            offset += stop - start
        return reads

    async def _land(
        self,
        device: DeviceStaging,
        unit: Unit,
        spans_in_stream: Sequence[tuple[int, int]],
        leases: AsyncExitStack,
    ) -> list[torch.Tensor] | None:
        """Read a unit into the device's memory.

        Returns
        -------
        list[torch.Tensor] or None
            None if that cannot be, or fails: read over the host, the unit is judged there.
        """
        some = slice(unit.first, unit.first + len(spans_in_stream))
        total = sum(stop - start for start, stop in spans_in_stream)
        keys = [ref.key for ref in self._prefix.refs[some]]
        span = device.try_lease(keys, self.headers[some], total)
        if span is None:
            return None
        async with AsyncExitStack() as lease:
            lease.callback(device.release, span)
            reads = self._requests(unit, spans_in_stream, span)
            try:
                await self._transfer(reads, unit)
            except KvtcError as error:
                _log.debug("a unit could not be read into the device's memory: %s", error)
                return None
            leases.push_async_callback(lease.pop_all().aclose)
        device.landed_bytes += total
        return [tensor_of(read.into) for read in reads]

    async def _transfer(self, reads: Sequence[ReadRequest], unit: Unit) -> None:
        record = self._timeline.record("transfer", unit.group, unit.first, unit.count)
        with record, self._counters.timed("transfer"):
            await self._tiers.get(reads, timeout_s=max(0.0, self._until - time.monotonic()))

    async def _get(self, reads: list[ReadRequest], unit: Unit) -> None:
        """Read a unit; a failure ends the request in front of the first tier block that fails."""
        try:
            await self._transfer(reads, unit)
        except KvtcError as error:
            missing = unit.first
            if isinstance(error, ObjectMissingError):
                absent = [i for i, read in enumerate(reads) if self._tiers.size_of(read.key) is None]
                missing += min(absent, default=0)
            self._prefix.end_before(missing, error)
            # What lies in front of the failed block is sound but unread: read it again without the rest.
            if missing > unit.first:
                await self._get(reads[: missing - unit.first], unit)

    def _check_header(self, index: int, span: MemorySpan) -> StreamHeader:
        ref = self._prefix.refs[index]
        header = self._codec.read_header(span.view, binding=ref.key)
        if (header.first_position, header.num_tokens) != (ref.first_position, ref.num_tokens):
            raise StreamMismatchError(
                f"object holds tokens {header.first_position}+{header.num_tokens}, "
                f"asked for {ref.first_position}+{ref.num_tokens}; it is treated as a miss"
            )
        return header


def _until_failure(
    checks: Sequence[Callable[[], StreamHeader]],
) -> tuple[list[StreamHeader], KvtcError | None]:
    """Return the results up to the first failure, and the failure."""
    headers: list[StreamHeader] = []
    for check in checks:
        try:
            headers.append(check())
        except KvtcError as error:
            return headers, error
    return headers, None
