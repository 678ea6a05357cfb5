"""What a host adapter holds of an onboard in progress."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import torch

from dynamo_kvtc.codec.paged_codec import REACHED, Completion
from dynamo_kvtc.errors import OnboardError
from dynamo_kvtc.pipeline.timeline import Timeline

__all__ = ["OnboardHandle"]


class OnboardHandle:
    """Handle of one onboard: an awaitable per layer, and one for the whole."""

    def __init__(self, num_layers: int, num_tokens: int) -> None:
        loop = asyncio.get_running_loop()
        self.num_tokens = num_tokens
        self.timeline = Timeline()
        self._layers: list[asyncio.Future[None]] = [loop.create_future() for _ in range(num_layers)]
        self._launched: list[asyncio.Future[Completion]] = [loop.create_future() for _ in range(num_layers)]
        self._whole: asyncio.Future[None] = loop.create_future()
        self._task: asyncio.Task[None] | None = None
        futures: list[asyncio.Future[Any]] = [*self._layers, *self._launched, self._whole]
        for future in futures:
            future.add_done_callback(_retrieve)

    async def layer(self, layer: int, stream: torch.cuda.Stream | None = None) -> None:
        """Wait until this layer's KV is in place for every token of the request.

        Parameters
        ----------
        stream : torch.cuda.Stream, optional
            Whoever reads the KV in what this stream does later waits there instead: it is enough that the
            layer's decoding has been launched.

        Raises
        ------
        OnboardError
            If it never will be; the error says which tokens to recompute.
        """
        if stream is None:
            await asyncio.shield(self._layers[layer])
        else:
            (await asyncio.shield(self._launched[layer])).order(stream)

    async def wait(self) -> None:
        """Wait until every layer is in place. Raises `OnboardError` as `layer` does."""
        await asyncio.shield(self._whole)

    def done(self) -> bool:
        """Tell whether the onboard has ended, well or not."""
        return self._whole.done()

    def error(self) -> OnboardError | None:
        """Return how an onboard that has ended failed, if it did. Callable from any thread."""
        error = self._whole.exception()
        assert error is None or isinstance(error, OnboardError)
        return error

    def on_done(self, callback: Callable[[OnboardHandle], None]) -> None:
        """Call `callback` with this handle on the event loop once the onboard has ended."""
        self._whole.add_done_callback(lambda _: callback(self))

    async def cancel(self) -> None:
        """Stop the onboard and wait until it touches neither cache nor staging memory any more."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])

    def _mark_layer(self, layer: int, launched: Completion | None) -> None:
        """Tell that a layer is in place, or that it will be when `launched` is reached."""
        if not self._launched[layer].done():
            self._launched[layer].set_result(launched or REACHED)
        if launched is None:
            self.timeline.mark_layer(layer)
            if not self._layers[layer].done():
                self._layers[layer].set_result(None)

    def _finish(self, error: OnboardError | None) -> None:
        # A task that failed unexpectedly holds its frames.
        self._task = None
        for future in (*self._layers, self._whole):
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)
        for launched in self._launched:
            if not launched.done():
                if error is None:
                    launched.set_result(REACHED)
                else:
                    launched.set_exception(error)


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Mark a failure as seen: a caller that only awaits `wait` must not be warned about every layer."""
    if not future.cancelled():
        future.exception()
