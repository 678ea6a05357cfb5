"""Layers that a device still decodes: who waits for them, and who is told when they are in place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from dynamo_kvtc.blocking import run_to_end
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.codec.paged_codec import Completion
from dynamo_kvtc.deadline import wait_out

__all__ = ["Landing"]


class Landing:
    """What one onboard has launched and not seen done. Lives on the event loop; threads wait.

    A device does its work in the order of launching, so one task that follows it misses nothing.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._coming: asyncio.Queue[tuple[int, Completion, Callable[[int], None]] | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def add(self, layers: LayerRange, completions: Sequence[Completion], mark: Callable[[int], None]) -> None:
        """Call `mark` with each layer once it is in place; with all of them now if nothing was launched."""
        if not completions:
            self._coming_now(layers, mark)
            return
        for layer, completion in zip(range(layers.first, layers.stop), completions, strict=True):
            self._coming.put_nowait((layer, completion, mark))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._follow(), name="kvtc-landing")

    @staticmethod
    def _coming_now(layers: LayerRange, mark: Callable[[int], None]) -> None:
        for layer in range(layers.first, layers.stop):
            mark(layer)

    async def end(self) -> None:
        """Wait until everything is in place.

        Raises
        ------
        GpuUnavailableError
            If the device does not answer.
        """
        await self.settle()
        if self._task is not None:
            self._task.result()

    async def settle(self) -> None:
        """Wait until nothing is written to the cache any more, even if cancelled meanwhile."""
        if self._task is None:
            return
        self._coming.put_nowait(None)
        cancelled = await wait_out(self._task)
        if not self._task.cancelled():
            self._task.exception()  # seen, also where the request has failed for another reason already
        if cancelled is not None:
            try:
                raise cancelled
            finally:
                del cancelled  # its traceback holds this frame

    async def _follow(self) -> None:
        while (item := await self._coming.get()) is not None:
            layer, completion, mark = item
            if not completion.reached():
                await run_to_end(self._executor, completion.wait)
            mark(layer)
