"""The transfer agent: registered memory and files, and awaitable transfers between them.

Every transfer has a deadline. One that is cancelled or misses its deadline is abandoned: it goes on
until NIXL has drained it, because NIXL's handles must not be released in flight, and until then its
buffers are parked (`TransferAgent.on_drained` tells when they are free). If it never drains, NIXL's agent
is taken for broken and a fresh one takes over.

Memory to memory goes over UCX with the agent itself as the remote side; within one process that is a
copy in the thread that owns NIXL. UCX reads its own environment: unset, it works; if the engine sets
`UCX_TLS`, the list must allow tcp or a fabric, because shared memory alone cannot report failures.

After a fork the child must not use its parent's agent: spawn, or create the agent in the child.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from dynamo_kvtc.blocking import run_to_end
from dynamo_kvtc.deadline import in_time, wait_out
from dynamo_kvtc.errors import TransferError, TransferTimeoutError
from dynamo_kvtc.transfer.backend import DRAM, FILE, POSIX, UCX
from dynamo_kvtc.transfer.descriptors import Span, cut_pairs, furthest_ends, local_kind
from dynamo_kvtc.transfer.files import FileRegion, FileSpan
from dynamo_kvtc.transfer.gds import GDS, open_direct
from dynamo_kvtc.transfer.in_flight import InFlight
from dynamo_kvtc.transfer.memory import MemoryRegion, MemorySpan
from dynamo_kvtc.transfer.owner import OwnerThread, Transfer
from dynamo_kvtc.transfer.pinning import pin
from dynamo_kvtc.transfer.registration import register, release, start_owner
from dynamo_kvtc.transfer.settings import AgentSettings
from dynamo_kvtc.transfer.stats import AgentStats
from dynamo_kvtc.transfer.succession import Succession

__all__ = ["AgentStats", "TransferAgent"]


class TransferAgent:
    """Moves bytes between registered memory and files. Make one with `create`; one event loop owns it."""

    def __init__(self, settings: AgentSettings, owner: OwnerThread) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._slots = asyncio.Semaphore(settings.max_transfers)
        self._memory: set[MemoryRegion] = set()
        self._files: set[FileRegion] = set()
        self._in_flight = InFlight()
        self._owners = Succession(settings, owner, lambda: [*self._memory, *self._files])
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False
        self._moved = {"copy": 0, "read": 0, "write": 0}
        self._transfers = self._failed = self._timed_out = 0
        self._busy_s, self._busy_since = 0.0, 0.0

    @classmethod
    async def create(cls, settings: AgentSettings | None = None) -> TransferAgent:
        """Start NIXL with its UCX and POSIX backends and try both.

        Raises
        ------
        MissingDependencyError
            If no NIXL package is installed.
        TransferError
            If a backend does not work on this machine.
        """
        settings = settings or AgentSettings()
        return cls(settings, await start_owner(settings))

    # --- regions ---------------------------------------------------------------------------------

    async def allocate(self, nbytes: int, *, pinned: bool = False) -> MemoryRegion:
        """Allocate and register page-aligned, zeroed host memory of `nbytes` bytes.

        Physical pages are taken as they are first written, or at once if the memory is to be pinned for CUDA.

        Raises
        ------
        TransferError
            If the memory cannot be had or registered.
        ValueError
            If `nbytes` is below 1.
        """
        self._check_usable()
        region = MemoryRegion.allocate(nbytes)
        await self.register_memory(region)
        if pinned:
            await self._pin(region)
        return region

    async def register_memory(self, region: MemoryRegion) -> None:
        """Register memory that is there already, such as a `DeviceRegion`; `free` undoes it.

        Raises
        ------
        TransferError
            If it cannot be registered.
        """
        self._check_usable()
        await self._register(region)
        self._memory.add(region)

    async def _pin(self, region: MemoryRegion) -> None:
        """Pin a region for CUDA; a cancelled caller waits until that is over, and the region goes."""
        pinning = self._loop.run_in_executor(None, pin, region.address, region.nbytes)
        stopped = await wait_out(pinning) or pinning.exception()
        region.pinned = pinning.exception() is None and pinning.result()
        if stopped is not None:
            await self.free(region)
            try:
                raise stopped
            finally:
                del stopped, pinning, region  # its traceback holds this frame

    async def free(self, region: MemoryRegion) -> None:
        """Deregister a region; its memory goes when nothing refers to it any more. Idempotent.

        While a transfer may still touch the region, that waits until it has drained.
        """
        await self._owners.settled()
        if region in self._memory:
            self._memory.discard(region)
            self.on_drained(region, lambda: release(self._owners.owner, region))

    async def open_file(
        self, path: str | os.PathLike[str], *, nbytes: int, flags: int = os.O_RDWR
    ) -> FileRegion:
        """Open and register a file of which bytes ``[0, nbytes)`` may be transferred.

        Parameters
        ----------
        flags : int
            As for `os.open`; files are created with mode 0600.

        Raises
        ------
        OSError
            From opening the file.
        """
        self._check_usable()
        fd = await run_to_end(None, partial(os.open, path, flags | os.O_CLOEXEC, 0o600), os.close)
        try:
            return await self.register_file(fd, nbytes, name=Path(path).name, owns_fd=True)
        except BaseException:
            os.close(fd)
            raise

    async def register_file(
        self, fd: int, nbytes: int, *, name: str = "", owns_fd: bool = False
    ) -> FileRegion:
        """Register an open file descriptor of which bytes ``[0, nbytes)`` may be transferred."""
        self._check_usable()
        if not self._settings.gds:
            region = FileRegion(fd, nbytes, name or f"file {fd}", owns_fd, None)
            await self._register(region)
        else:
            region = await self._register_direct(fd, nbytes, name or f"file {fd}")
            if owns_fd:
                os.close(fd)
        self._files.add(region)
        return region

    async def _register_direct(self, fd: int, nbytes: int, name: str) -> FileRegion:
        direct = await run_to_end(None, partial(open_direct, fd), os.close)
        try:
            region = FileRegion(direct, nbytes, name, True, None, direct=True)
            await self._register(region)
        except BaseException:
            os.close(direct)
            raise
        return region

    async def close_file(self, region: FileRegion) -> None:
        """Deregister a file and close its descriptor if the agent opened it. Idempotent.

        While a transfer may still touch the file, that waits until it has drained.
        """
        await self._owners.settled()
        if region in self._files:
            self._files.discard(region)
            self.on_drained(region, lambda: release(self._owners.owner, region))

    # --- transfers -------------------------------------------------------------------------------

    async def copy(self, pairs: Sequence[tuple[MemorySpan, MemorySpan]], timeout_s: float) -> None:
        """Copy memory to memory, all ``(source, destination)`` pairs as one transfer.

        Raises
        ------
        ValueError
            If a pair's spans differ in length or belong to a region this agent does not hold.
        TransferTimeoutError
            If it did not finish in time; see `on_drained` for when its buffers are free.
        TransferError
            If it failed; the destination's contents are undefined.
        """
        await self._move("copy", "WRITE", UCX, DRAM, pairs, timeout_s)

    async def read_file(self, pairs: Sequence[tuple[FileSpan, MemorySpan]], timeout_s: float) -> None:
        """Read ``(source, destination)`` pairs as one transfer; raises as `copy` does.

        Reading beyond the end of a file is a `TransferError`.
        """
        reads = [(into, source) for source, into in pairs]
        await self._move("read", "READ", self._file_backend, FILE, reads, timeout_s)

    async def write_file(self, pairs: Sequence[tuple[MemorySpan, FileSpan]], timeout_s: float) -> None:
        """Write ``(source, destination)`` pairs as one transfer; raises as `copy` does. Never syncs."""
        await self._move("write", "WRITE", self._file_backend, FILE, pairs, timeout_s)

    @property
    def _file_backend(self) -> str:
        return GDS if self._settings.gds else POSIX

    async def _move(
        self,
        kind: str,
        operation: str,
        backend: str,
        remote_kind: str,
        pairs: Sequence[tuple[MemorySpan, Span]],
        timeout_s: float,
    ) -> None:
        self._check_usable()
        self._check_held(pairs)
        local, remote = cut_pairs(pairs, self._settings.max_post_bytes)
        if not len(local):
            return
        near_kind, ends = local_kind(pairs), furthest_ends(remote) if kind == "read" else {}
        deadline = self._loop.time() + timeout_s
        if timeout_s <= 0:
            self._timed_out += 1
            raise TransferTimeoutError(f"the deadline of a {kind} passed before it began")
        await self._acquire_slot(timeout_s)
        finished: asyncio.Future[None] = self._loop.create_future()
        report = self._report(finished)
        transfer = Transfer(operation, backend, near_kind, remote_kind, local, remote, ends, report)
        self._started(transfer, pairs)
        self._owners.owner.submit(transfer)
        try:
            await asyncio.wait({finished}, timeout=max(0.0, deadline - self._loop.time()))
        except asyncio.CancelledError:
            self._abandon(transfer, finished)
            raise
        if not finished.done():
            self._timed_out += 1
            self._abandon(transfer, finished)
            nbytes = int(local[:, 1].sum())
            raise TransferTimeoutError(
                f"{kind} of {nbytes} bytes did not finish within {timeout_s:g} s; "
                f"its buffers stay parked until it drains"
            )
        try:
            finished.result()
        except TransferError:
            self._failed += 1
            raise
        self._moved[kind] += int(local[:, 1].sum())

    async def _acquire_slot(self, timeout_s: float) -> None:
        if self._owners.is_in_place and not self._slots.locked():
            await self._slots.acquire()
            return

        async def ready_slot() -> None:
            await self._owners.in_place()
            await self._slots.acquire()

        try:
            await in_time(ready_slot(), timeout_s, give_back=lambda _: self._slots.release())
        except asyncio.TimeoutError:
            self._timed_out += 1
            raise TransferTimeoutError(
                f"no transfer slot within {timeout_s:g} s "
                f"({len(self._in_flight)} transfers in flight, {self._in_flight.parked} of them parked)"
            ) from None
        if self._closed or self._owners.broken is not None:
            self._slots.release()
            self._check_usable()

    def _report(self, finished: asyncio.Future[None]) -> Callable[[Transfer, Exception | None], None]:
        def on_finished(transfer: Transfer, error: Exception | None) -> None:
            # The loop may be gone: then nobody waits any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._settle, transfer, finished, error)

        return on_finished

    def _started(self, transfer: Transfer, pairs: Sequence[tuple[MemorySpan, Span]]) -> None:
        self._transfers += 1
        if not self._in_flight:
            self._busy_since = time.monotonic()
            self._idle.clear()
        self._in_flight.add(transfer, [span for pair in pairs for span in pair])

    def _settle(self, transfer: Transfer, finished: asyncio.Future[None], error: Exception | None) -> None:
        """Nothing of the transfer is in flight any more: wake its caller or free its parked buffers."""
        abandoned = self._in_flight.end(transfer)
        if not self._in_flight:
            self._busy_s += time.monotonic() - self._busy_since
            self._idle.set()
        if abandoned:
            return
        self._slots.release()
        if error is None:
            finished.set_result(None)
        else:
            finished.set_exception(error)

    # --- abandoned transfers ---------------------------------------------------------------------

    def on_drained(self, what: Span | MemoryRegion | FileRegion, callback: Callable[[], object]) -> None:
        """Call `callback` once nothing in flight can touch `what` any more; at once if nothing can.

        Whoever hands out memory for transfers calls this before handing it out again. For a span only
        abandoned transfers count, since whoever holds it awaits its own; for a region all do.
        """
        self._in_flight.on_drained(what, callback)

    def _abandon(self, transfer: Transfer, finished: asyncio.Future[None]) -> None:
        if finished.done():
            finished.exception()
            return
        transfer.abandoned = True
        self._slots.release()
        self._in_flight.abandon(transfer)
        self._loop.call_later(self._settings.drain_limit_s, self._check_drained, transfer, self._owners.owner)

    def _check_drained(self, transfer: Transfer, owner: OwnerThread) -> None:
        if transfer in self._in_flight and not self._closed:
            self._owners.replace(owner)

    # --- the rest --------------------------------------------------------------------------------

    def stats(self) -> AgentStats:
        """Return the counters."""
        busy_now = time.monotonic() - self._busy_since if self._in_flight else 0.0
        return AgentStats(
            bytes_copied=self._moved["copy"],
            bytes_read=self._moved["read"],
            bytes_written=self._moved["write"],
            transfers=self._transfers,
            failed=self._failed,
            timed_out=self._timed_out,
            in_flight=len(self._in_flight),
            parked=self._in_flight.parked,
            replaced=self._owners.replaced,
            busy_s=self._busy_s + busy_now,
            file_mode=self._owners.owner.file_mode,
        )

    async def close(self) -> None:
        """Let transfers in flight end, deregister everything and stop NIXL. Idempotent.

        What does not end within `AgentSettings.close_timeout_s` is left to its thread and never released.
        """
        if self._closed:
            return
        self._closed = True
        await self._owners.end(self._settings.close_timeout_s)
        with contextlib.suppress(asyncio.TimeoutError):
            await in_time(self._idle.wait(), self._settings.close_timeout_s)
        for memory in list(self._memory):
            await self.free(memory)
        for file in list(self._files):
            await self.close_file(file)
        self._owners.owner.stop()
        if not self._in_flight:
            await asyncio.to_thread(self._owners.owner.join, self._settings.close_timeout_s)

    async def __aenter__(self) -> TransferAgent:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _check_usable(self) -> None:
        if self._closed:
            raise TransferError("the transfer agent is closed")
        if self._owners.broken is not None:
            raise TransferError(f"the transfer agent is broken: {self._owners.broken}")
        if asyncio.get_running_loop() is not self._loop:
            raise TransferError(
                "the transfer agent belongs to another event loop; call it from the one that made it"
            )

    def _check_held(self, pairs: Sequence[tuple[MemorySpan, Span]]) -> None:
        held = self._memory | self._files
        if not all(span.region in held for pair in pairs for span in pair):
            raise ValueError("a span's region is not (or no longer) registered with this agent")

    async def _register(self, region: MemoryRegion | FileRegion) -> None:
        await self._owners.settled()
        await register(self._owners.owner, region)
