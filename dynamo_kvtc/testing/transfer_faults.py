"""A transfer agent that fails on purpose, and cancellation at every await of a call."""

from __future__ import annotations

import asyncio
import errno
import os
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from dynamo_kvtc.errors import TransferError, TransferTimeoutError
from dynamo_kvtc.transfer import FileRegion, FileSpan, MemoryRegion, MemorySpan, TransferAgent
from dynamo_kvtc.transfer.descriptors import Span
from dynamo_kvtc.transfer.stats import AgentStats

__all__ = ["FAULTS", "SILENT_FAULTS", "Fault", "FaultyTransfer", "Operation", "cancel_at_every_await"]

T = TypeVar("T")

#: What a transfer may be told to do instead of its work. See `FaultyTransfer`.
Fault = Literal[
    "short", "silently_short", "bit_rot", "torn", "silently_torn", "enospc", "eio", "no_permission", "slow",
    "stuck", "agent_lost", "peer_killed", "peer_frozen", "out_of_order",
]  # fmt: skip

Operation = Literal["copy", "read", "write"]

FAULTS: tuple[Fault, ...] = get_args(Fault)

#: Faults after which the transfer claims success although bytes are wrong.
SILENT_FAULTS: frozenset[Fault] = frozenset({"silently_short", "bit_rot", "silently_torn"})

_ERRNO: dict[Fault, int] = {"enospc": errno.ENOSPC, "eio": errno.EIO, "no_permission": errno.EACCES}

# A killed UCX peer was seen to raise after an eighth of a second.
_PEER_DEATH_S = 0.125
_SLOW_S = 0.05

_Pairs = Sequence[tuple[Any, Any]]
_Move = Callable[[_Pairs, float], Awaitable[None]]


@dataclass
class _Armed:
    fault: Fault
    operation: Operation
    skip: int
    count: int


class FaultyTransfer(TransferAgent):
    """A real agent around which transfers go wrong as ordered by `arm`; without orders it changes nothing.

    - ``short``, ``torn``: the first half is moved, then the transfer fails.
    - ``silently_short``, ``silently_torn``: the first half is moved, the rest of the destination is zeros
    (memory) or
      left as it was (a file), and the transfer reports success.
    - ``bit_rot``: everything is moved, one bit of it changed, success reported.
    - ``enospc``, ``eio``, ``no_permission``: nothing is moved, the transfer fails as NIXL reports these.
    - ``slow``: done, but later. ``stuck``, ``peer_frozen``: nothing happens until the deadline.
    - ``peer_killed``: fails after an eighth of a second. ``agent_lost``: this and every later transfer of any
    kind
      fails, until `restore`.
    - ``out_of_order``: completes only after the next transfer has, or after a while.
    """

    def __init__(self, inner: TransferAgent) -> None:
        self.inner = inner
        self.met: list[Fault] = []
        self._armed: list[_Armed] = []
        self._lost = False
        self._next_done = asyncio.Event()

    def arm(self, fault: Fault, operation: Operation, *, skip: int = 0, count: int = 1) -> None:
        """Let the next `count` transfers of a kind, after `skip` of them, meet a fault."""
        self._armed.append(_Armed(fault, operation, skip, count))

    def restore(self) -> None:
        """Forget all orders; a lost agent is back."""
        self._armed.clear()
        self._lost = False

    @property
    def is_lost(self) -> bool:
        """Whether the agent is lost, until `restore`."""
        return self._lost

    async def copy(self, pairs: Sequence[tuple[MemorySpan, MemorySpan]], timeout_s: float) -> None:
        """See `TransferAgent.copy`."""
        await self._run("copy", self.inner.copy, pairs, [into for _, into in pairs], timeout_s)

    async def read_file(self, pairs: Sequence[tuple[FileSpan, MemorySpan]], timeout_s: float) -> None:
        """See `TransferAgent.read_file`."""
        await self._run("read", self.inner.read_file, pairs, [into for _, into in pairs], timeout_s)

    async def write_file(self, pairs: Sequence[tuple[MemorySpan, FileSpan]], timeout_s: float) -> None:
        """See `TransferAgent.write_file`."""
        await self._run("write", self.inner.write_file, pairs, [into for _, into in pairs], timeout_s)

    async def _run(
        self, operation: Operation, move: _Move, pairs: _Pairs, into: Sequence[Span], timeout_s: float
    ) -> None:
        fault = self._due(operation)
        if fault is None:
            await move(pairs, timeout_s)
            self._next_done.set()
            return
        self.met.append(fault)
        if fault in ("short", "torn", "silently_short", "silently_torn"):
            await move([_first_half(pair) for pair in pairs], timeout_s)
            for span in into:
                if isinstance(span, MemorySpan):
                    span.view[span.nbytes // 2 :] = bytes(span.nbytes - span.nbytes // 2)
            if fault in ("short", "torn"):
                raise TransferError(f"the {operation} moved only a part (ordered)")
        elif fault == "bit_rot":
            await move(pairs, timeout_s)
            for span in into:
                _flip_one_bit(span)
        elif fault in _ERRNO:
            reason = os.strerror(_ERRNO[fault])
            raise TransferError(f"the {operation} failed: {reason} (ordered)") from OSError(
                _ERRNO[fault], reason
            )
        elif fault == "slow":
            await asyncio.sleep(min(_SLOW_S, timeout_s))
            await move(pairs, timeout_s - _SLOW_S)
        elif fault in ("stuck", "peer_frozen"):
            await asyncio.sleep(timeout_s)
            raise TransferTimeoutError(f"the {operation} did not finish within {timeout_s:g} s (ordered)")
        elif fault == "out_of_order":
            await move(pairs, timeout_s)
            self._next_done.clear()
            await asyncio.wait({asyncio.ensure_future(self._next_done.wait())}, timeout=_SLOW_S)
            self._next_done.set()
        else:
            if fault == "peer_killed":
                await asyncio.sleep(min(_PEER_DEATH_S, timeout_s))
            raise TransferError(f"the {operation} failed: the other side is gone (ordered)")

    def _due(self, operation: Operation) -> Fault | None:
        if self._lost:
            return "agent_lost"
        for armed in self._armed:
            if armed.operation != operation:
                continue
            if armed.skip:
                armed.skip -= 1
                continue
            armed.count -= 1
            if not armed.count:
                self._armed.remove(armed)
            self._lost = armed.fault == "agent_lost"
            return armed.fault
        return None

    # --- handed on -------------------------------------------------------------------------------

    async def allocate(self, nbytes: int, *, pinned: bool = False) -> MemoryRegion:
        """See `TransferAgent.allocate`."""
        return await self.inner.allocate(nbytes, pinned=pinned)

    async def free(self, region: MemoryRegion) -> None:
        """See `TransferAgent.free`."""
        await self.inner.free(region)

    async def open_file(
        self, path: str | os.PathLike[str], *, nbytes: int, flags: int = os.O_RDWR
    ) -> FileRegion:
        """See `TransferAgent.open_file`."""
        return await self.inner.open_file(path, nbytes=nbytes, flags=flags)

    async def register_file(
        self, fd: int, nbytes: int, *, name: str = "", owns_fd: bool = False
    ) -> FileRegion:
        """See `TransferAgent.register_file`."""
        return await self.inner.register_file(fd, nbytes, name=name, owns_fd=owns_fd)

    async def close_file(self, region: FileRegion) -> None:
        """See `TransferAgent.close_file`."""
        await self.inner.close_file(region)

    def on_drained(self, what: Span | MemoryRegion | FileRegion, callback: Callable[[], object]) -> None:
        """See `TransferAgent.on_drained`."""
        self.inner.on_drained(what, callback)

    def stats(self) -> AgentStats:
        """See `TransferAgent.stats`."""
        return self.inner.stats()

    async def close(self) -> None:
        """See `TransferAgent.close`."""
        await self.inner.close()


def _first_half(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    near, far = pair
    half = near.nbytes // 2
    return _leading(near, half), _leading(far, half)


def _leading(span: Span, nbytes: int) -> Span:
    return (
        span.slice(0, nbytes) if isinstance(span, MemorySpan) else FileSpan(span.region, span.offset, nbytes)
    )


def _flip_one_bit(span: Span) -> None:
    place = span.nbytes // 2
    if isinstance(span, MemorySpan):
        span.view[place] ^= 0x10
    else:
        old = os.pread(span.region.fd, 1, span.offset + place)
        os.pwrite(span.region.fd, bytes([old[0] ^ 0x10]), span.offset + place)


async def cancel_at_every_await(
    make: Callable[[], Coroutine[Any, Any, T]], after: Callable[[bool], Awaitable[None]], *, most: int = 200
) -> int:
    """Run a call again and again, each time cancelled at its next await, until it ends by itself.

    Parameters
    ----------
    make : Callable
        Makes the call anew.
    after : Callable
        Awaited after each run, with whether the call ended by itself; looks for what was left behind.
    most : int
        Awaits after which this gives up.

    Returns
    -------
    int
        How many awaits there were.
    """
    for number in range(most):
        task = asyncio.ensure_future(_cancelled_at(make(), number))
        await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
        await after(not task.cancelled())
        if not task.cancelled():
            return number
    raise AssertionError(f"the call has more than {most} awaits")


@types.coroutine
def _cancelled_at(call: Coroutine[Any, Any, T], at: int) -> Generator[Any, Any, T]:
    """Drive a coroutine; cancel its task in the moment in which it waits for the time number `at`."""
    task = asyncio.current_task()
    assert task is not None
    error: BaseException | None = None
    for number in range(1 << 30):
        try:
            waiting = call.send(None) if error is None else call.throw(error)
        except StopIteration as stop:
            result: T = stop.value
            return result
        if number == at:
            task.cancel()
        try:
            yield waiting
            error = None
        except BaseException as raised:
            error = raised
    raise AssertionError("the call does not end")
