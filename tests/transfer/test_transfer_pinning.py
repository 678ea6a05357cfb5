"""Staging memory is pinned where CUDA is in use, and only there. CUDA's runtime is made up: none is here."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from dynamo_kvtc.transfer import pinning
from dynamo_kvtc.transfer.agent import TransferAgent
from dynamo_kvtc.transfer.staging import StagingPool


class Runtime:
    def __init__(self, code: int = 0) -> None:
        self.code, self.calls = code, list[tuple[object, ...]]()

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802  # CUDA's name
        self.calls.append(("pin", address, nbytes, flags))
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802  # CUDA's name
        self.calls.append(("unpin", address))
        return 0


@pytest.mark.parametrize("code", [0, 2])
async def test_memory_is_pinned_when_it_is_registered_and_unpinned_when_it_goes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    runtime = Runtime(code)
    monkeypatch.setattr(pinning, "_cudart", lambda: runtime)
    with caplog.at_level(logging.WARNING, "dynamo_kvtc"):
        async with await TransferAgent.create() as agent:
            plain = await StagingPool.create(agent, 8192)
            pool = await StagingPool.create(agent, 4096, pinned=True)
            address = pool._region.address
            assert runtime.calls == [("pin", address, 4096, 0)]
            async with pool.lease(100, timeout_s=1) as span:
                span.view[:] = bytes(100)
            await pool.close()
            await plain.close()
    assert runtime.calls[1:] == ([("unpin", address)] if code == 0 else [])
    assert ("cannot pin 4096 bytes" in caplog.text) == (code != 0)


async def test_memory_whose_pinning_is_cancelled_goes_once_it_is_pinned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime, begun, go_on = Runtime(), asyncio.Event(), threading.Event()
    monkeypatch.setattr(pinning, "_cudart", lambda: runtime)
    async with await TransferAgent.create() as agent:
        loop, register = asyncio.get_running_loop(), runtime.cudaHostRegister

        def slowly(*args: int) -> int:
            loop.call_soon_threadsafe(begun.set)
            assert go_on.wait(60)
            return register(*args)

        monkeypatch.setattr(runtime, "cudaHostRegister", slowly)
        allocating = asyncio.create_task(agent.allocate(4096, pinned=True))
        await begun.wait()
        allocating.cancel()
        await asyncio.sleep(0.01)
        # CUDA is still at it: the memory must stay.
        assert not allocating.done() and len(agent._memory) == 1
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await allocating
        assert not agent._memory
    address = runtime.calls[0][1]
    assert runtime.calls == [("pin", address, 4096, 0), ("unpin", address)]
