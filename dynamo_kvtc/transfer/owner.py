"""The owner thread: the one thread that makes every call into one NIXL agent.

NIXL makes progress only while somebody polls, and its calls must not overlap. So one thread registers,
posts, polls and releases; everybody else hands it work and is called back.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dynamo_kvtc.errors import TransferError
from dynamo_kvtc.transfer.backend import (
    MEMORY_BACKENDS,
    OBJ,
    VRAM,
    NixlHandle,
    add_gds,
    create_nixl_agent,
    create_object_agent,
)
from dynamo_kvtc.transfer.gds import GDS, gds_options
from dynamo_kvtc.transfer.settings import AgentSettings

__all__ = ["OwnerThread", "Transfer"]

T = TypeVar("T")

# Waiting for a transfer: the next look comes after a tenth of the time already waited, so that polling
# adds a tenth to a transfer's time at most, and a slow device does not burn a core.
_SPIN_S = 50e-6
_LONGEST_NAP_S = 1e-3


@dataclass(eq=False, slots=True)
class Transfer:
    """One transfer: rows of descriptors, posted in pieces, finished once.

    Attributes
    ----------
    operation : str
        ``"WRITE"``: local to remote, or ``"READ"``: remote to local.
    backend, local_kind, remote_kind : str
        Which NIXL backend moves it, and what the local and the remote rows describe.
    local, remote : numpy.ndarray
        uint64 ``[n, 3]``: address (or file offset), bytes, device (or file descriptor).
    minimum_file_bytes : Mapping[int, int]
        Real size that each file descriptor must have, checked before anything is posted.
    on_finished : Callable
        Called in the owner thread with the transfer and its error, when nothing of it is in flight.
    """

    operation: str
    backend: str
    local_kind: str
    remote_kind: str
    local: NDArray[np.uint64]
    remote: NDArray[np.uint64]
    minimum_file_bytes: Mapping[int, int]
    on_finished: Callable[[Transfer, Exception | None], None]
    abandoned: bool = False
    queued: bool = True
    posted_rows: int = 0
    posts_in_flight: int = 0
    error: Exception | None = field(default=None)

    @property
    def exhausted(self) -> bool:
        """Whether nothing of it remains to be posted."""
        return self.abandoned or self.error is not None or self.posted_rows == len(self.local)

    def fail(self, error: Exception) -> None:
        """Remember the first error; nothing more is posted."""
        if self.error is None:
            self.error = error


@dataclass(eq=False, slots=True)
class _Post:
    transfer: Transfer
    handle: NixlHandle
    rows: int


class OwnerThread:
    """A NIXL agent and the thread that owns it.

    Raises
    ------
    TransferError, MissingDependencyError
        From `start`, if NIXL cannot be set up.
    """

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._condition = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._waiting: deque[Transfer] = deque()
        self._posts: list[_Post] = []
        self._rows_in_flight = 0
        self._stopping = False
        self._agent: NixlHandle = None
        self.file_mode = ""
        self._thread = threading.Thread(target=self._run, name=f"{settings.name}-nixl", daemon=True)

    def start(self) -> Future[None]:
        """Start the thread; the future completes when NIXL is ready, or with the reason why not."""
        self._thread.start()
        return self.call(self._create)

    def _create(self) -> None:
        settings = self._settings
        if settings.object_store is not None:
            self._agent = create_object_agent(settings.name, settings.object_store)
        else:
            self._agent, self.file_mode = create_nixl_agent(
                settings.name, io_uring=settings.io_uring, interface=settings.interface
            )
            if settings.gds:
                add_gds(self._agent, gds_options(settings.max_descriptors, settings.max_transfers))
                self.file_mode = "gds"

    def backends_of(self, kind: str) -> list[str]:
        """Return the backends that memory of a kind is registered with."""
        if kind == VRAM:
            return [GDS]
        if self._settings.object_store is not None:
            return [OBJ]
        return [*MEMORY_BACKENDS, GDS] if self._settings.gds else MEMORY_BACKENDS

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` in the owner thread."""
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._push(job)
        return future

    def register(self, rows: list[tuple[int, int, int, str]], kind: str, backends: list[str]) -> NixlHandle:
        """Register memory or a file with NIXL; call it through `call`."""
        return self._agent.register_memory(rows, kind, backends=backends)

    def deregister(self, registration: NixlHandle, backends: list[str]) -> None:
        """Undo `register`; call it through `call`, with nothing of the region in flight."""
        self._agent.deregister_memory(registration, backends=backends)

    def submit(self, transfer: Transfer) -> None:
        """Queue a transfer; `Transfer.on_finished` is called exactly once."""
        self._push(lambda: self._waiting.append(transfer))

    def stop(self) -> None:
        """Let the thread end once nothing is in flight."""
        self._push(self._note_stop)

    @property
    def alive(self) -> bool:
        """Whether the thread runs (after `stop`: whether something is still in flight)."""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; blocking. Returns whether it ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _note_stop(self) -> None:
        self._stopping = True

    def _push(self, job: Callable[[], None]) -> None:
        with self._condition:
            self._inbox.append(job)
            self._condition.notify()

    # --- in the owner thread ---------------------------------------------------------------------

    def _run(self) -> None:
        idle_since = time.monotonic()
        while True:
            for job in self._take_jobs(idle_since):
                job()
            if self._stopping and not self._waiting and not self._posts and not self._inbox:
                break
            posted = self._post_waiting()
            finished = self._poll()
            if posted or finished:
                idle_since = time.monotonic()
        self._agent = None

    def _take_jobs(self, idle_since: float) -> list[Callable[[], None]]:
        with self._condition:
            if not self._inbox:
                if self._posts:
                    idle = time.monotonic() - idle_since
                    if idle > _SPIN_S:
                        self._condition.wait(min(idle / 10, _LONGEST_NAP_S))
                elif not self._waiting and not self._stopping:
                    self._condition.wait()
            jobs = list(self._inbox)
            self._inbox.clear()
            return jobs

    def _post_waiting(self) -> bool:
        """Post pieces of waiting transfers in turn, so that a large one does not hold up the others."""
        posted = False
        for _ in range(len(self._waiting)):
            transfer = self._waiting.popleft()
            if not transfer.exhausted:
                rows = self._next_rows(transfer)
                if self._rows_in_flight + rows > self._settings.max_descriptors and self._posts:
                    self._waiting.appendleft(transfer)
                    break
                self._post(transfer, rows)
                posted = True
            if not transfer.exhausted:
                self._waiting.append(transfer)
            else:
                transfer.queued = False
                self._settle(transfer)
        return posted

    def _next_rows(self, transfer: Transfer) -> int:
        """Rows of the next post: as many as fit into the bounds, at least one."""
        first = transfer.posted_rows
        sizes = transfer.local[first : first + self._settings.max_descriptors, 1]
        within = np.searchsorted(np.cumsum(sizes), self._settings.max_post_bytes, side="right")
        return max(1, int(within))

    def _post(self, transfer: Transfer, rows: int) -> None:
        agent = self._agent
        first = transfer.posted_rows
        transfer.posted_rows += rows
        try:
            if first == 0:
                _check_file_sizes(transfer.minimum_file_bytes)
            handle = agent.initialize_xfer(
                transfer.operation,
                agent.get_xfer_descs(transfer.local[first : first + rows], transfer.local_kind),
                agent.get_xfer_descs(transfer.remote[first : first + rows], transfer.remote_kind),
                agent.name,
                b"",
                backends=[transfer.backend],
            )
        except Exception as error:
            transfer.fail(_as_transfer_error(transfer, error))
            return
        transfer.posts_in_flight += 1
        post = _Post(transfer, handle, rows)
        self._rows_in_flight += rows
        if not self._advance(post, agent.transfer):
            self._posts.append(post)

    def _poll(self) -> bool:
        ended = [post for post in self._posts if self._advance(post, self._agent.check_xfer_state)]
        if ended:
            self._posts = [post for post in self._posts if post not in ended]
            for transfer in {post.transfer for post in ended}:
                self._settle(transfer)
        return bool(ended)

    def _advance(self, post: _Post, step: Callable[[NixlHandle], str]) -> bool:
        """Start or poll a post, and release its handle at its end. Returns whether it ended."""
        transfer = post.transfer
        try:
            state = step(post.handle)
            if state == "PROC":
                return False
            if state != "DONE":
                transfer.fail(TransferError(f"{_describe(transfer)} failed: NIXL reports {state}"))
        except Exception as error:
            transfer.fail(_as_transfer_error(transfer, error))
        try:
            post.handle.release()
        except Exception as error:
            transfer.fail(_as_transfer_error(transfer, error))
        self._rows_in_flight -= post.rows
        transfer.posts_in_flight -= 1
        return True

    @staticmethod
    def _settle(transfer: Transfer) -> None:
        if not transfer.queued and transfer.posts_in_flight == 0:
            transfer.on_finished(transfer, transfer.error)


def _check_file_sizes(minimum_file_bytes: Mapping[int, int]) -> None:
    # Some NIXL versions report reads beyond the end of a file as done.
    for fd, nbytes in minimum_file_bytes.items():
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_size < nbytes:
            raise TransferError(
                f"the file ends at byte {status.st_size}, before byte {nbytes} that is to be read"
            )


def _describe(transfer: Transfer) -> str:
    return f"{transfer.backend} {transfer.operation.lower()} of {len(transfer.local)} ranges"


def _as_transfer_error(transfer: Transfer, error: Exception) -> TransferError:
    if isinstance(error, TransferError):
        return error
    failure = TransferError(f"{_describe(transfer)} failed: {error}")
    failure.__cause__ = error
    return failure
