"""The faults of the public fault suite as a bucket shows them: by a proxy in front of a real S3 server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any
from urllib.parse import unquote, urlsplit

from s3_server import Answer, FaultyProxy, read_message

from dynamo_kvtc.testing.transfer_faults import Fault, FaultyTransfer, Operation
from dynamo_kvtc.tiers import BucketPlace
from dynamo_kvtc.tiers.object_client import BucketClient
from dynamo_kvtc.transfer import TransferAgent

_STATUS = {
    "enospc": "507 Insufficient Storage",
    "eio": "500 Internal Server Error",
    "no_permission": "403 Forbidden",
}
_OPERATIONS: dict[str, Operation] = {"PUT": "write", "GET": "read"}
_STORED = b'HTTP/1.1 200 OK\r\netag: "0"\r\ncontent-length: 0\r\n\r\n'
_SLOW_S = 0.05
_DEATH_S = 0.125


class FaultyBucket(FaultyTransfer):
    """An agent whose orders a proxy carries out: ``write`` is the next PUT, ``read`` the next GET.

    A bucket that lies stores half of an object, or a changed one, and says that it stored it. The proxy has
    an event loop and a thread of its own, so that its tasks are not taken for the tier's.
    """

    def __init__(self, inner: TransferAgent, upstream: str) -> None:
        super().__init__(inner)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-bucket")
        self._thread.start()
        self.proxy = _OrderedProxy(upstream)
        self.proxy.faults = self
        self._run_there(self.proxy.start())
        self.endpoint = self.proxy.endpoint

    def due(self, operation: Operation) -> Fault | None:
        """Take what was ordered for this request."""
        fault = self._due(operation)
        if fault is not None:
            self.met.append(fault)
        return fault

    def stop(self) -> None:
        """End the proxy and its thread."""
        self._run_there(self.proxy.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run_there(self, work: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)


class _OrderedProxy(FaultyProxy):
    faults: FaultyBucket

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head, body = await read_message(reader)
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        self.requests.append(f"{method} {target}")
        fault = self.faults.due(_OPERATIONS[method]) if method in _OPERATIONS else None
        if fault is None and self.faults.is_lost:
            fault = "agent_lost"
        if fault in ("agent_lost", "peer_killed"):
            await asyncio.sleep(_DEATH_S * (fault == "peer_killed"))
            writer.transport.abort()
            return False
        if fault in ("stuck", "peer_frozen"):
            await self._stopped.wait()
            return False
        if fault in _STATUS:
            status = _STATUS[fault]
            writer.write(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
            await writer.drain()
            return False
        if fault == "slow":
            await asyncio.sleep(_SLOW_S)
        if method == "PUT" and fault in ("short", "torn"):
            # The connection breaks while the object is sent: the server must not keep the half it has got.
            await self._begin(head + body[: len(body) // 2])
            writer.transport.abort()
            return False
        if method == "PUT" and fault in ("silently_short", "silently_torn", "bit_rot"):
            kept = _flipped(body) if fault == "bit_rot" else body[: len(body) // 2]
            await self._store(target, kept)
            writer.write(_STORED)
            await writer.drain()
            return True
        answer = await self._ask(method, target, head + body)
        if fault is not None and method == "GET":
            _damage(answer, fault)
        if fault == "out_of_order":
            passed = len(self.requests)
            for _ in range(10):
                if len(self.requests) > passed:
                    break
                await asyncio.sleep(_SLOW_S / 10)
        writer.write(answer.head + answer.body)
        await writer.drain()
        return not answer.close_early

    async def _begin(self, part: bytes) -> None:
        host, port = self.upstream.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(part)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def _store(self, target: str, data: bytes) -> None:
        bucket, name = unquote(urlsplit(target).path).lstrip("/").split("/", 1)
        client = BucketClient(BucketPlace(bucket, endpoint=self.upstream), 10.0)
        await client.put(name, data, 10.0, only_new=False)


def _damage(answer: Answer, fault: Fault) -> None:
    body = answer.body
    if fault in ("short", "torn"):
        answer.body, answer.close_early = body[: len(body) // 2], True
    elif fault == "silently_short":
        answer.head = answer.head.replace(b"%d\r\n" % len(body), b"%d\r\n" % (len(body) // 2))
        answer.body = body[: len(body) // 2]
    elif fault == "silently_torn":
        answer.body = body[: len(body) // 2] + bytes(len(body) - len(body) // 2)
    elif fault == "bit_rot":
        answer.body = _flipped(body)


def _flipped(data: bytes) -> bytes:
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
