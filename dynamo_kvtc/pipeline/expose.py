"""The status of an adapter for threads that are not its event loop's, and its endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from dynamo_kvtc.errors import TierClosedError, TransferTimeoutError
from dynamo_kvtc.observability import MetricsEndpoint
from dynamo_kvtc.pipeline.adapter import TierAdapter

__all__ = ["expose", "status_reader"]


def status_reader(adapter: TierAdapter, *, timeout_s: float = 2.0) -> Callable[[], Mapping[str, Any]]:
    """Return a function that any other thread may call for the adapter's status as a plain mapping.

    Call it on the adapter's event loop. The function raises `TierClosedError` once the loop is closed, and
    `TransferTimeoutError` when it does not answer within `timeout_s` seconds.
    """
    loop = asyncio.get_running_loop()

    async def status() -> Mapping[str, Any]:
        return adapter.status().to_dict()

    def read() -> Mapping[str, Any]:
        coroutine = status()
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        except RuntimeError as error:
            coroutine.close()
            raise TierClosedError("the tier adapter is closed") from error
        try:
            return future.result(timeout_s)
        except (TimeoutError, FutureTimeoutError) as error:
            future.cancel()
            raise TransferTimeoutError(
                f"the tier adapter's event loop did not answer within {timeout_s:g} s"
            ) from error

    return read


def expose(adapter: TierAdapter, address: str, port: int) -> MetricsEndpoint:
    """Open an adapter's endpoint, which closes with the adapter. Call it on the adapter's event loop.

    Raises
    ------
    ConfigError
        If it cannot listen there.
    MissingDependencyError
        If prometheus_client is not installed.
    """
    endpoint = MetricsEndpoint(status_reader(adapter), address, port)
    adapter.endpoint = endpoint
    adapter.on_close(lambda: asyncio.to_thread(endpoint.close))
    return endpoint
