"""The two ways by which an object's bytes come and go: NIXL's OBJ backend, and the asynchronous client.

NIXL's is taken where its plugin loads. It reads ranges and writes whole objects, but cannot write on
condition that there is no object yet; where the bucket can do that, the client writes. NIXL does not
say why a transfer failed either: the client finds out whether the object is there.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from dynamo_kvtc.errors import ObjectMissingError, TransferError, TransferTimeoutError
from dynamo_kvtc.tiers.object_client import BucketClient, static_credentials
from dynamo_kvtc.transfer import ObjectAgent, StagingPool
from dynamo_kvtc.transfer.objects import object_options

__all__ = ["ClientTransport", "NixlTransport", "ObjectTransport"]


class ObjectTransport(ABC):
    """Moves ranges of stored objects. Each call ends by its deadline."""

    name: str

    @abstractmethod
    def fetch(
        self, name: str, offset: int, nbytes: int, timeout_s: float
    ) -> AbstractAsyncContextManager[memoryview]:
        """Read a range; the bytes are valid inside the ``async with`` block.

        Raises
        ------
        ObjectMissingError, ObjectCorruptError, TransferError
            If the object is gone, ends before the range does, or cannot be read.
        """

    @abstractmethod
    async def write(self, name: str, data: bytes, timeout_s: float, *, conditional: bool) -> bool:
        """Store an object unless there is one; returns whether it was stored.

        Parameters
        ----------
        conditional : bool
            Whether the bucket itself refuses a second object. Otherwise it is asked before, and of two
            writers at the same moment the later one wins.
        """

    @abstractmethod
    async def close(self) -> None:
        """Release everything. Idempotent."""


class ClientTransport(ObjectTransport):
    """Everything over the client."""

    name = "client"

    def __init__(self, client: BucketClient) -> None:
        self._client = client

    @asynccontextmanager
    async def _fetch(
        self, name: str, offset: int, nbytes: int, timeout_s: float
    ) -> AsyncIterator[memoryview]:
        yield await self._client.get_range(name, offset, nbytes, timeout_s)

    def fetch(
        self, name: str, offset: int, nbytes: int, timeout_s: float
    ) -> AbstractAsyncContextManager[memoryview]:
        """Read a range; see `ObjectTransport.fetch`."""
        return self._fetch(name, offset, nbytes, timeout_s)

    async def write(self, name: str, data: bytes, timeout_s: float, *, conditional: bool) -> bool:
        """Store an object unless there is one; see `ObjectTransport.write`."""
        deadline = time.monotonic() + timeout_s
        if not conditional and await self._client.head(name, timeout_s) is not None:
            return False
        return await self._client.put(name, data, deadline - time.monotonic(), only_new=conditional)

    async def close(self) -> None:
        """Nothing is held."""


class NixlTransport(ObjectTransport):
    """Reads over NIXL's OBJ backend, into memory of its own. Make one with `open`."""

    name = "nixl"

    def __init__(self, client: BucketClient, agent: ObjectAgent, pool: StagingPool) -> None:
        self._client, self._agent, self._pool = client, agent, pool
        prefix = client.place.prefix.strip("/")
        self._prefix = f"{prefix}/" if prefix else ""

    @classmethod
    async def open(cls, client: BucketClient, memory_bytes: int) -> NixlTransport:
        """Start NIXL's OBJ backend with `memory_bytes` of registered memory.

        Raises
        ------
        TransferError
            If the backend does not load here.
        """
        place = client.place
        agent = await ObjectAgent.connect(
            object_options(
                bucket=place.bucket,
                endpoint=place.endpoint,
                region=place.region,
                virtual_hosted=place.virtual_hosted,
                credentials=static_credentials(),
            ),
        )
        try:
            pool = await StagingPool.create(agent, memory_bytes)
        except BaseException:
            await agent.close()
            raise
        return cls(client, agent, pool)

    @asynccontextmanager
    async def _fetch(
        self, name: str, offset: int, nbytes: int, timeout_s: float
    ) -> AsyncIterator[memoryview]:
        if nbytes > self._pool.nbytes:
            yield await self._client.get_range(name, offset, nbytes, timeout_s)
            return
        deadline = time.monotonic() + min(timeout_s, self._client.timeout_s)
        async with self._pool.lease(nbytes, timeout_s) as span:
            region = await self._agent.open_object(self._prefix + name, offset + nbytes)
            try:
                pair = (region.span(offset, nbytes), span)
                await self._agent.read_objects([pair], deadline - time.monotonic())
            except TransferTimeoutError:
                raise
            except TransferError as error:
                if await self._client.head(name, deadline - time.monotonic()) is None:
                    raise ObjectMissingError(f"{name} is not in the bucket") from error
                raise
            finally:
                await self._agent.close_file(region)
            yield span.view

    def fetch(
        self, name: str, offset: int, nbytes: int, timeout_s: float
    ) -> AbstractAsyncContextManager[memoryview]:
        """Read a range; see `ObjectTransport.fetch`."""
        return self._fetch(name, offset, nbytes, timeout_s)

    async def write(self, name: str, data: bytes, timeout_s: float, *, conditional: bool) -> bool:
        """Store an object unless there is one; see `ObjectTransport.write`."""
        deadline = time.monotonic() + min(timeout_s, self._client.timeout_s)
        if conditional:
            return await self._client.put(name, data, timeout_s, only_new=True)
        if await self._client.head(name, timeout_s) is not None:
            return False
        if len(data) > self._pool.nbytes:
            return await self._client.put(name, data, deadline - time.monotonic(), only_new=False)
        async with self._pool.lease(len(data), deadline - time.monotonic()) as span:
            span.view[:] = data
            region = await self._agent.open_object(self._prefix + name, len(data))
            try:
                await self._agent.write_object(span, region.span(0, len(data)), deadline - time.monotonic())
            finally:
                await self._agent.close_file(region)
        return True

    async def close(self) -> None:
        """Stop NIXL's OBJ backend. Idempotent."""
        await self._pool.close()
        await self._agent.close()
