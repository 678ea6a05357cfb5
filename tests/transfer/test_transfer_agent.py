"""Transfers between memory and files through real NIXL."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_kvtc.errors import MissingDependencyError, TransferError, TransferTimeoutError
from dynamo_kvtc.transfer import AgentSettings, FileRegion, TransferAgent, backend
from dynamo_kvtc.transfer.owner import OwnerThread

_CREATE = os.O_RDWR | os.O_CREAT


async def filled_file(agent: TransferAgent, path: Path, nbytes: int) -> FileRegion:
    path.write_bytes(random.Random(1).randbytes(nbytes))
    return await agent.open_file(path, nbytes=1 << 30)


async def test_copy_moves_every_pair(agent: TransferAgent) -> None:
    source, destination = await agent.allocate(1 << 20), await agent.allocate(1 << 20)
    source.array[:] = bytearray(random.Random(0).randbytes(1 << 20))
    pairs = [(0, 300_000, 1), (1, 500_000, 200_001), (500_000, 7, 200_000), (600_000, 0, 0)]
    await agent.copy([(source.span(a, n), destination.span(b, n)) for a, b, n in pairs], 10)
    for a, b, n in pairs:
        assert destination.span(b, n).view == source.span(a, n).view
    assert agent.stats().bytes_copied == sum(n for *_, n in pairs)
    assert int(destination.array[:7].sum()) == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 199), st.integers(0, 5000)), max_size=30))
def test_files_give_back_what_was_written(tmp_path: Path, pieces: list[tuple[int, int]]) -> None:
    """Pieces go to slots of a file (a later one over an earlier one) and come back."""

    async def main() -> None:
        async with await TransferAgent.create() as agent:
            memory = await agent.allocate(200 * 5000)
            file = await agent.open_file(tmp_path / "slots", nbytes=200 * 5000, flags=_CREATE)
            os.ftruncate(file.fd, 200 * 5000)
            slots = dict(pieces)
            contents = {slot: random.Random(slot).randbytes(size) for slot, size in slots.items()}
            for slot, content in contents.items():
                memory.span(slot * 5000, len(content)).view[:] = content
            spans = [(memory.span(s * 5000, n), file.span(s * 5000, n)) for s, n in slots.items()]
            await agent.write_file(spans, 10)
            memory.array[:] = 0
            await agent.read_file([(there, here) for here, there in spans], 10)
            for slot, content in contents.items():
                assert memory.span(slot * 5000, len(content)).view == content

    asyncio.run(main())


async def test_transfers_larger_than_any_bound_are_posted_in_pieces(tmp_path: Path) -> None:
    bounds = AgentSettings(max_descriptors=4, max_post_bytes=4096, max_transfers=2)
    async with await TransferAgent.create(bounds) as agent:
        memory = await agent.allocate(1 << 20)
        file = await filled_file(agent, tmp_path / "f", 1 << 20)
        pairs = [(file.span(at, 10_000), memory.span(at, 10_000)) for at in range(0, 1_000_000, 10_000)]
        await asyncio.gather(*(agent.read_file(pairs[first::8], 20) for first in range(8)))
        assert memory.span(0, 1_000_000).view == (tmp_path / "f").read_bytes()[:1_000_000]


async def test_io_uring_and_aio_move_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(random.Random(1).randbytes(100_000))
    for io_uring in (True, False):
        async with await TransferAgent.create(AgentSettings(io_uring=io_uring)) as agent:
            assert agent.stats().file_mode in (("io_uring", "aio") if io_uring else ("aio",))
            memory = await agent.allocate(100_000)
            file = await agent.open_file(tmp_path / "f", nbytes=100_000, flags=os.O_RDONLY)
            await agent.read_file([(file.span(0, 100_000), memory.span())], 10)
            assert memory.span().view == (tmp_path / "f").read_bytes()


async def test_reading_beyond_the_end_of_a_file_fails(agent: TransferAgent, tmp_path: Path) -> None:
    memory = await agent.allocate(64 << 10)
    file = await filled_file(agent, tmp_path / "f", 10_000)
    for offset, nbytes in ((9_999, 2), (10_000, 1), (1 << 20, 5_000)):
        with pytest.raises(TransferError, match="ends at byte 10000"):
            await agent.read_file(
                [
                    (file.span(0, 10), memory.span(0, 10)),
                    (file.span(offset, nbytes), memory.span(10, nbytes)),
                ],
                10,
            )
    await agent.read_file([(file.span(9_999, 1), memory.span(0, 1))], 10)
    stats = agent.stats()
    assert (stats.failed, stats.bytes_read, stats.in_flight) == (3, 1, 0)


async def test_a_failing_write_leaves_the_agent_usable(agent: TransferAgent, tmp_path: Path) -> None:
    memory = await agent.allocate(4096)
    (tmp_path / "f").write_bytes(bytes(4096))
    read_only = await agent.open_file(tmp_path / "f", nbytes=4096, flags=os.O_RDONLY)
    with pytest.raises(TransferError):
        await agent.write_file([(memory.span(), read_only.span(0, 4096))], 10)
    await agent.read_file([(read_only.span(0, 4096), memory.span())], 10)


async def test_misuse_is_refused(agent: TransferAgent, tmp_path: Path) -> None:
    memory = await agent.allocate(4096)
    file = await filled_file(agent, tmp_path / "f", 100)
    with pytest.raises(ValueError):
        await agent.copy([(memory.span(0, 10), memory.span(100, 11))], 1)
    with pytest.raises(ValueError):
        await agent.allocate(0)
    with pytest.raises(ValueError):
        memory.span(4000, 97)
    with pytest.raises(ValueError):
        memory.span(0, 10).slice(5, 6)
    with pytest.raises(ValueError):
        file.span(1 << 30, 1)
    await agent.free(memory)
    await agent.free(memory)
    with pytest.raises(ValueError, match="registered"):
        await agent.copy([(memory.span(0, 10), memory.span(100, 10))], 1)
    with pytest.raises(FileNotFoundError):
        await agent.open_file(tmp_path / "absent", nbytes=1)


async def test_a_closed_agent_and_a_foreign_loop_are_refused(agent: TransferAgent) -> None:
    memory = await agent.allocate(4096)

    def elsewhere() -> None:
        asyncio.run(agent.copy([(memory.span(0, 1), memory.span(1, 1))], 1))

    with pytest.raises(TransferError, match="loop"):
        await asyncio.to_thread(elsewhere)
    await agent.close()
    await agent.close()
    with pytest.raises(TransferError, match="closed"):
        await agent.allocate(10)


async def test_closing_gives_descriptors_back(tmp_path: Path) -> None:
    async with await TransferAgent.create() as agent:
        file = await filled_file(agent, tmp_path / "f", 100)
        await agent.close_file(file)
        await agent.allocate(1)  # one more turn of the owner thread
        with pytest.raises(OSError):
            os.fstat(file.fd)
        kept = await agent.register_file(os.open(tmp_path / "f", os.O_RDONLY), 100)
    os.close(kept.fd)


# --- transfers that do not end ------------------------------------------------------------------------
# An empty pipe is a real file that NIXL reads from without end: the read ends when somebody writes.


class Pipe:
    """A registered pipe: reads from it are in flight until `fill`."""

    def __init__(self, region: FileRegion, write_end: int) -> None:
        self.region = region
        self.write_end = write_end

    @classmethod
    async def open(cls, agent: TransferAgent) -> Pipe:
        if agent.stats().file_mode != "io_uring":
            pytest.skip("without io_uring a read from a pipe blocks inside NIXL")
        read_end, write_end = os.pipe()
        return cls(await agent.register_file(read_end, 1 << 20, owns_fd=True), write_end)

    def fill(self, nbytes: int) -> None:
        os.write(self.write_end, b"x" * nbytes)


async def until(condition: object) -> None:
    async def wait() -> None:
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(1e-3)

    await asyncio.wait_for(wait(), 20)


async def test_a_late_transfer_parks_its_buffers_until_it_drains(agent: TransferAgent) -> None:
    pipe, memory = await Pipe.open(agent), await agent.allocate(1 << 20)
    with pytest.raises(TransferTimeoutError, match="parked"):
        await agent.read_file([(pipe.region.span(0, 100), memory.span(1000, 100))], 0.02)
    free: list[str] = []
    agent.on_drained(memory.span(0, 1000), lambda: free.append("before it"))
    agent.on_drained(memory.span(1100, 10), lambda: free.append("behind it"))
    agent.on_drained(memory.span(1099, 2), lambda: free.append("overlapping"))
    agent.on_drained(memory, lambda: free.append("region"))
    assert free == ["before it", "behind it"]
    assert agent.stats().parked == 1
    await agent.copy([(memory.span(0, 10), memory.span(20, 10))], 10)
    pipe.fill(100)
    await until(lambda: len(free) == 4)
    assert memory.span(1000, 100).view == b"x" * 100
    stats = agent.stats()
    assert (stats.parked, stats.in_flight, stats.timed_out, stats.replaced) == (0, 0, 1, 0)


async def test_a_cancelled_transfer_is_drained_and_its_file_closed_afterwards(agent: TransferAgent) -> None:
    pipe, memory = await Pipe.open(agent), await agent.allocate(4096)
    reading = asyncio.create_task(agent.read_file([(pipe.region.span(0, 10), memory.span(0, 10))], 10))
    await until(lambda: agent.stats().in_flight)
    await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await agent.close_file(pipe.region)
    await agent.free(memory)
    os.fstat(pipe.region.fd)
    pipe.fill(10)
    await until(lambda: not agent.stats().parked)
    await agent.allocate(1)  # one more turn of the owner thread
    with pytest.raises(OSError):
        os.fstat(pipe.region.fd)


async def test_a_file_in_use_is_closed_only_after_its_transfer(agent: TransferAgent) -> None:
    pipe, memory = await Pipe.open(agent), await agent.allocate(4096)
    reading = asyncio.create_task(agent.read_file([(pipe.region.span(0, 10), memory.span(0, 10))], 10))
    await until(lambda: agent.stats().in_flight)
    await agent.close_file(pipe.region)
    await agent.free(memory)
    os.fstat(pipe.region.fd)
    pipe.fill(10)
    await reading
    assert memory.span(0, 10).view == b"x" * 10
    await agent.allocate(1)
    with pytest.raises(OSError):
        os.fstat(pipe.region.fd)


async def test_a_transfer_that_never_drains_makes_nixl_be_replaced(
    agent: TransferAgent, tmp_path: Path
) -> None:
    pipe, memory = await Pipe.open(agent), await agent.allocate(1 << 20)
    file = await filled_file(agent, tmp_path / "f", 1000)
    with pytest.raises(TransferTimeoutError):
        await agent.read_file([(pipe.region.span(0, 10), memory.span(0, 10))], 0.01)
    await until(lambda: agent.stats().replaced)
    await agent.read_file([(file.span(0, 1000), memory.span(5000, 1000))], 10)
    await agent.copy([(memory.span(5000, 1000), memory.span(6000, 1000))], 10)
    assert memory.span(6000, 1000).view == (tmp_path / "f").read_bytes()
    assert agent.stats().parked == 1
    pipe.fill(10)
    await until(lambda: not agent.stats().parked)


@pytest.mark.parametrize("kind", ["memory", "file"])
async def test_a_region_whose_caller_was_cancelled_does_not_stay_registered(
    agent: TransferAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The cancellation comes while NIXL is at it, so that it cannot be called back."""
    at_it, go_on, registered = threading.Event(), threading.Event(), 0

    class Watched(OwnerThread):
        def register(self, rows: list[tuple[int, int, int, str]], kind: str, backends: list[str]) -> Any:
            nonlocal registered
            registration = OwnerThread.register(self, rows, kind, backends)
            registered += 1
            at_it.set()
            assert go_on.wait(20)
            return registration

        def deregister(self, registration: Any, backends: list[str]) -> None:
            nonlocal registered
            OwnerThread.deregister(self, registration, backends)
            registered -= 1

    monkeypatch.setattr(agent._owners.owner, "__class__", Watched)
    (tmp_path / "f").write_bytes(b"x" * 100)
    coming = agent.allocate(4096) if kind == "memory" else agent.open_file(tmp_path / "f", nbytes=100)
    caller = asyncio.create_task(coming)
    await until(at_it.is_set)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert registered == 1
    go_on.set()
    await until(lambda: registered == 0)


async def test_a_file_whose_opening_was_cancelled_does_not_stay_open(
    agent: TransferAgent, tmp_path: Path
) -> None:
    """A named pipe opens for reading only once somebody opens it for writing."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    opening = asyncio.create_task(agent.open_file(path, nbytes=10, flags=os.O_RDONLY))
    await asyncio.sleep(0.05)
    opening.cancel()
    await asyncio.sleep(0.01)
    assert not opening.done()
    writer = os.open(path, os.O_WRONLY)
    with pytest.raises(asyncio.CancelledError):
        await opening
    # Nobody reads it any more.
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"x")
    os.close(writer)


async def test_an_agent_whose_start_was_cancelled_leaves_no_thread() -> None:
    starting = asyncio.create_task(TransferAgent.create(AgentSettings(name="kvtc-given-up")))
    await until(lambda: any(thread.name == "kvtc-given-up-nixl" for thread in threading.enumerate()))
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await until(lambda: all(thread.name != "kvtc-given-up-nixl" for thread in threading.enumerate()))


@pytest.mark.parametrize("steps", range(5))
async def test_a_slot_that_comes_with_a_cancellation_is_not_lost(steps: int) -> None:
    async with await TransferAgent.create(AgentSettings(max_transfers=1)) as agent:
        pipe, memory = await Pipe.open(agent), await agent.allocate(4096)
        reading = asyncio.create_task(agent.read_file([(pipe.region.span(0, 10), memory.span(0, 10))], 20))
        await until(lambda: agent.stats().in_flight)
        waiting = asyncio.create_task(agent.copy([(memory.span(0, 1), memory.span(100, 1))], 20))
        await asyncio.sleep(0.01)
        pipe.fill(10)
        while agent.stats().in_flight:
            await asyncio.sleep(0)
        for _ in range(steps):
            await asyncio.sleep(0)
        waiting.cancel()
        (result,) = await asyncio.gather(waiting, return_exceptions=True)
        assert result is None or isinstance(result, asyncio.CancelledError)
        await reading
        await agent.copy([(memory.span(0, 1), memory.span(200, 1))], 10)


async def test_callers_beyond_the_bound_wait_within_their_deadlines() -> None:
    async with await TransferAgent.create(AgentSettings(max_transfers=1)) as agent:
        pipe, memory = await Pipe.open(agent), await agent.allocate(4096)
        reading = asyncio.create_task(agent.read_file([(pipe.region.span(0, 10), memory.span(0, 10))], 20))
        await until(lambda: agent.stats().in_flight)
        with pytest.raises(TransferTimeoutError, match="slot"):
            await agent.copy([(memory.span(0, 1), memory.span(100, 1))], 0.02)
        pipe.fill(10)
        await reading
        await agent.copy([(memory.span(0, 1), memory.span(100, 1))], 10)


async def test_closing_does_not_wait_for_a_stuck_transfer_for_ever(tmp_path: Path) -> None:
    agent = await TransferAgent.create(AgentSettings(close_timeout_s=0.05))
    pipe, memory = await Pipe.open(agent), await agent.allocate(4096)
    with pytest.raises(TransferTimeoutError):
        await agent.read_file([(pipe.region.span(0, 10), memory.span(0, 10))], 0.01)
    await asyncio.wait_for(agent.close(), 10)
    assert agent.stats().parked == 1
    pipe.fill(10)
    await until(lambda: not agent.stats().parked)


# --- finding NIXL --------------------------------------------------------------------------------------


def test_where_io_uring_is_refused_files_move_by_aio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for a kernel or container that forbids io_uring: its trial transfer fails."""
    trials: list[str] = []
    probe = backend._probe_files

    def refuse_first(agent: object) -> None:
        trials.append(str(agent.backend_options["POSIX"]))  # type: ignore[attr-defined]
        if len(trials) == 1:
            raise OSError("Function not implemented")
        probe(agent)

    monkeypatch.setattr(backend, "_probe_files", refuse_first)
    monkeypatch.setattr(backend, "_io_uring_survives_errors", lambda: True)  # whatever NIXL is installed
    _, file_mode = backend.create_nixl_agent("test", io_uring=True)
    assert file_mode == "aio"
    assert "use_uring" in trials[0]
    assert "use_aio" in trials[1]


def test_without_nixl_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for an environment without NIXL, which the tests themselves cannot be."""
    monkeypatch.setitem(sys.modules, "nixl_cu13", None)
    monkeypatch.setitem(sys.modules, "nixl_cu12", None)
    with pytest.raises(MissingDependencyError, match="pip install --no-deps nixl-cu13"):
        backend.load_nixl()


def test_an_environment_that_ucx_cannot_serve_is_named() -> None:
    """UCX reads its environment once, so this takes a process of its own."""
    code = (
        "import asyncio\n"
        "from dynamo_kvtc.errors import TransferError\n"
        "from dynamo_kvtc.transfer import TransferAgent\n"
        "try: asyncio.run(TransferAgent.create())\n"
        "except TransferError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "UCX_TLS": "self,sm"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "UCX_TLS='self,sm'" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "bad", [{"max_descriptors": 65_537}, {"max_post_bytes": 1}, {"max_transfers": 0}, {"drain_limit_s": 0}]
)
def test_senseless_settings_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        AgentSettings(**bad)
