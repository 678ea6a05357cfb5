"""Onboard: transfer and decode overlap, and each layer says when its KV is in place.

A request's objects are read in units: one layer group of a few consecutive tier blocks. A reader task
keeps the next units in flight while the schedule task opens (verifies, inflates, dequantises) and
projects the present one. Units come in group-major order, so the first layers are ready first.

Nothing wrong is ever served: when a tier block is missing, damaged or late, the request ends in front
of it, the sound blocks before it are still put in place, and the engine is told which tokens to recompute.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from dynamo_kvtc.blocking import run_all, run_to_end
from dynamo_kvtc.codec.base import KvCodec
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.codec.paged_codec import Completion, Payload
from dynamo_kvtc.deadline import in_time
from dynamo_kvtc.errors import (
    BitstreamError,
    KvtcError,
    OnboardCancelledError,
    TierClosedError,
    TransferTimeoutError,
)
from dynamo_kvtc.observability import Counters
from dynamo_kvtc.pipeline.accounting import EndedOnboard
from dynamo_kvtc.pipeline.blocks import TierBlockRef
from dynamo_kvtc.pipeline.boundary import Boundaries, Boundary
from dynamo_kvtc.pipeline.encoders import Encoders
from dynamo_kvtc.pipeline.handle import OnboardHandle
from dynamo_kvtc.pipeline.landing import Landing
from dynamo_kvtc.pipeline.onboard_settings import OnboardSettings
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.pipeline.sound_prefix import SoundPrefix
from dynamo_kvtc.pipeline.turns import Turns
from dynamo_kvtc.pipeline.unit_reader import UnitReader
from dynamo_kvtc.pipeline.units import Unit, cut_units
from dynamo_kvtc.policy import OffloadPolicy, Speeds
from dynamo_kvtc.policy.priorities import times_spared
from dynamo_kvtc.tiers.stack import TierStack
from dynamo_kvtc.tracebacks import without_frames
from dynamo_kvtc.transfer.staging import StagingPool

__all__ = ["OnboardSettings", "Onboarder"]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Opened:
    unit: Unit
    parts: list[Any]
    block_ids: list[int]


class Onboarder:
    """Runs onboards, by priority where many wait. Lives on one event loop.

    Parameters
    ----------
    codec : KvCodec
        Reads headers.
    boundaries : Boundaries
        Decode into the caches that tier blocks go to.
    executor : Executor
        Runs everything that computes, tier blocks and layers side by side; the event loop only waits.
    encoders : Encoders, optional
        Know what streams were encoded with, for measured speeds.
    """

    def __init__(
        self,
        codec: KvCodec,
        boundaries: Boundaries,
        tiers: TierStack,
        staging: StagingPool,
        policy: OffloadPolicy,
        counters: Counters,
        executor: Executor,
        settings: OnboardSettings | None = None,
        speeds: Speeds | None = None,
        encoders: Encoders | None = None,
    ) -> None:
        self._encoders = encoders
        self._codec, self._boundaries = codec, boundaries
        self._tiers, self._staging = tiers, staging
        self._policy, self._counters, self._executor = policy, counters, executor
        self._settings = settings or OnboardSettings()
        self._turns = Turns(self._settings.at_once)
        self.speeds = Speeds() if speeds is None else speeds

    def start(
        self, refs: Sequence[TierBlockRef], destination: PagedKvCache, boundary: Boundary | None = None
    ) -> OnboardHandle:
        """Begin to onboard tier blocks and return at once; `boundary` as in `TierAdapter.onboard`.

        The engine must neither read nor reuse the destination blocks until the handle says so.
        """
        handle = OnboardHandle(self._codec.geometry.num_layers, sum(ref.num_tokens for ref in refs))
        run = _Request(self, list(refs), destination, handle, boundary)
        handle._task = asyncio.get_running_loop().create_task(run.run(), name="kvtc-onboard")
        handle._task.add_done_callback(run.finish)
        return handle


class _Request:
    """One onboard in the making."""

    def __init__(
        self,
        owner: Onboarder,
        refs: list[TierBlockRef],
        destination: PagedKvCache,
        handle: OnboardHandle,
        boundary: Boundary | None,
    ) -> None:
        self._codec, self._tiers, self._staging = owner._codec, owner._tiers, owner._staging
        self._policy, self._counters, self._executor = owner._policy, owner._counters, owner._executor
        self._settings, self._speeds, self._encoders = owner._settings, owner.speeds, owner._encoders
        self._turns, self._priority = owner._turns, refs[0].priority if refs else 0
        self._boundary = boundary or owner._boundaries.of(destination)
        self._after = destination.fenced
        self._landing = Landing(owner._executor)
        self._refs, self._destination, self._handle = refs, destination, handle
        self._timeline = handle.timeline
        self._prefix = SoundPrefix(refs)
        self._reader = UnitReader(
            self._codec,
            self._tiers,
            self._staging,
            self._policy,
            self._settings,
            self._executor,
            self._prefix,
            self._timeline,
            self._counters,
            self._boundary.device_staging,
        )

    async def run(self) -> None:
        """Drive the request to its end; the only place where it succeeds or fails."""
        pinned = self._tiers.pin(ref.key for ref in self._refs)
        try:
            await in_time(self._in_turn(), self._settings.timeout_s)
        except (TimeoutError, asyncio.TimeoutError):
            limit = f"{self._settings.timeout_s:g} s"
            self._prefix.end_before(0, TransferTimeoutError(f"onboarding did not finish within {limit}"))
        except asyncio.CancelledError:
            # Only OnboardHandle.cancel does this; whoever waits is told, the task ends quietly.
            self._prefix.end_before(0, OnboardCancelledError("onboarding was cancelled"))
        except KvtcError as error:
            self._prefix.end_before(0, error)
        except Exception as error:
            _log.exception("onboarding failed by an unexpected error")
            self._prefix.end_before(0, error)
        finally:
            self._tiers.unpin(pinned)
        if isinstance(self._prefix.cause, BitstreamError):
            # Only the codec can see this damage. Dropped, the tier block can be offloaded again.
            with suppress(TierClosedError):
                await self._tiers.evict([self._refs[self._prefix.count].key])
        loaded = self._prefix.keys
        if times := times_spared(self._priority):
            self._tiers.prefer(loaded, times)
        self._tiers.promote(loaded)

    def finish(self, task: asyncio.Task[None]) -> None:
        """Tell everybody who waits how the request ended, even if it was cancelled before it began."""
        if task.cancelled():
            self._prefix.end_before(0, OnboardCancelledError("onboarding was cancelled"))
        elif (error := task.exception()) is not None:
            _log.error("onboarding failed by an unexpected error", exc_info=error)
            self._prefix.end_before(0, error)
        headers = self._reader.headers[: self._prefix.count]
        encoder = None if self._encoders is None else self._encoders.name_of(headers)
        cause, is_decoded = self._prefix.cause, not self._boundary.holds
        ended = EndedOnboard(self._refs, headers, self._timeline, cause, encoder, is_decoded)
        ended.count(self._counters, self._speeds, self._codec.geometry.token_bytes)
        error = self._prefix.error()
        self._handle._finish(None if error is None else without_frames(error))

    async def _in_turn(self) -> None:
        if self._refs:
            async with self._turns.take(self._priority):
                await self._load()

    async def _load(self) -> None:
        await self._reader.read_headers()
        units = cut_units(
            self._reader.headers,
            len(self._codec.layer_groups),
            units=self._settings.units,
            # All units in flight fit into the staging memory together.
            most_bytes=self._staging.nbytes // (self._settings.transfers_in_flight + 1),
            most_tokens=self._boundary.most_open_tokens,
        )
        self._reader.start(units)
        try:
            for group, layers in enumerate(self._codec.layer_groups):
                opened: list[_Opened] = []
                open_bytes = 0
                remaining = sum(unit.group == group for unit in units)
                while remaining:
                    item = await self._reader.next()
                    remaining -= 1
                    async with item.leases:
                        opened += await self._open(item.unit, item.payloads)
                    open_bytes += item.unit.count * self._group_bytes(layers)
                    if remaining and (
                        self._boundary.launches
                        or self._reader.waits
                        or open_bytes >= self._settings.open_bytes
                    ):
                        # A launch costs no time, and nothing must be held open while the next unit waits
                        # for a device's memory; or that unit is still in flight, so there is time to finish
                        # what is here; or as much is open as may be.
                        await self._project(layers, opened)
                        opened, open_bytes = [], 0
                await self._project(layers, opened, last=True)
            await self._landing.end()
        finally:
            try:
                await self._landing.settle()
            finally:
                await self._reader.close()

    def _group_bytes(self, layers: LayerRange) -> int:
        """Bytes of one tier block's KV in these layers."""
        geometry = self._codec.geometry
        return self._policy.tier_block_tokens * geometry.token_bytes * layers.count // geometry.num_layers

    async def _open(self, unit: Unit, payloads: Sequence[Payload]) -> list[_Opened]:
        headers, count = self._reader.headers, min(unit.stop, self._prefix.count) - unit.first
        # All in one batch for a device; for the CPU one tier block each, side by side.
        size = max(count, 1) if self._boundary.launches else 1
        works = [
            partial(
                self._boundary.open_groups,
                headers[unit.first + first : unit.first + min(first + size, count)],
                unit.group,
                payloads[first : min(first + size, count)],
            )
            for first in range(0, count, size)
        ]
        with self._timed("open", unit.group, unit.first, unit.count):
            batches = await run_all(self._executor, works)
            results = [result for batch in batches for result in batch]
            for result in results:
                if isinstance(result, KvtcError):
                    without_frames(result)
            failed = next((i for i, one in enumerate(results) if isinstance(one, KvtcError)), None)
            if failed is not None:
                self._prefix.end_before(unit.first + failed, results[failed])
            opened = results[:failed]
            if not opened:
                return []
            parts = await run_to_end(self._executor, lambda: self._boundary.join(opened))
        refs = self._refs[unit.first : unit.first + len(opened)]
        return [_Opened(unit, parts, [block for ref in refs for block in ref.block_ids])]

    async def _project(self, layers: LayerRange, opened: list[_Opened], *, last: bool = False) -> None:
        """Decode the layers of the opened units and scatter them into the paged cache.

        After the `last` units of a group, each layer is in place for every token when it is done.
        """
        parts = [part for item in opened for part in item.parts]
        block_ids = [block for item in opened for block in item.block_ids]

        def project(some: LayerRange) -> list[Completion]:
            if not opened:
                return []
            unit, count = opened[0].unit, sum(item.unit.count for item in opened)
            with self._timed("project", unit.group, unit.first, count):
                return self._boundary.scatter(parts, some, self._destination, block_ids, self._after)

        def mark(layer: int, launched: Completion | None = None) -> None:
            if last and self._prefix.whole:
                self._handle._mark_layer(layer, launched)

        if self._boundary.launches:
            completions = await run_to_end(self._executor, lambda: project(layers))
            for layer, completion in zip(range(layers.first, layers.stop), completions, strict=False):
                mark(layer, completion)
            self._landing.add(layers, completions, mark)
        else:
            works = [partial(project, LayerRange(one, 1)) for one in range(layers.first, layers.stop)]
            await run_all(self._executor, works, lambda index: mark(layers.first + index))

    @contextmanager
    def _timed(self, stage: str, group: int, first: int, count: int) -> Iterator[None]:
        with self._timeline.record(stage, group, first, count), self._counters.timed("decode"):
            yield
