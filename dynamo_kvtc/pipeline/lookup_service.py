"""The lookup service: the process that owns the tiers answers the one that schedules requests.

A Unix-domain socket (mode 0600) in a folder of the user's own (mode 0700), open to processes of the same
user only. Used the same way whether or not both sides share a process.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import logging
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dynamo_kvtc.deadline import in_time
from dynamo_kvtc.errors import ConfigError, KvtcError, LookupServiceError
from dynamo_kvtc.pipeline import frames
from dynamo_kvtc.pipeline.adapter import TierAdapter

__all__ = ["LookupService", "socket_path"]

_log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 16
_FRAME_TIMEOUT_S = 5.0


def socket_path(name: str) -> Path:
    """Return the socket of the service of this name; its folder is made and checked.

    Parameters
    ----------
    name : str
        What both sides know of each other, such as an engine's id; any length.

    Raises
    ------
    ConfigError
        If the folder belongs to somebody else or is open to others.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    user = os.geteuid()
    parent = Path(runtime) if runtime and Path(runtime).is_dir() else Path(tempfile.gettempdir())
    folder = parent / f"dynamo-kvtc-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise ConfigError(
            f"{folder} must be a folder of user {user} with mode 0700; remove it, or set XDG_RUNTIME_DIR to "
            "a folder of your own"
        )
    return folder / f"{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}.sock"


class LookupService:
    """Serves lookups of a `TierAdapter` on the adapter's event loop.

    Parameters
    ----------
    adapter : TierAdapter
        Whose tiers are asked; not owned.
    path : Path
        Of the socket; see `socket_path`.
    """

    def __init__(self, adapter: TierAdapter, path: Path) -> None:
        self._adapter, self._path = adapter, path
        self._server: asyncio.AbstractServer | None = None
        self._connections: set[asyncio.Task[Any]] = set()
        self._operations: dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]] = {
            "lookup": self._lookup,
            "reset": self._reset,
        }

    async def start(self) -> None:
        """Begin to listen; a socket that a dead process left behind is replaced.

        Raises
        ------
        LookupServiceError
            If the socket cannot be made.
        """
        try:
            self._path.unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._serve, path=self._path)
            self._path.chmod(0o600)
        except OSError as error:
            raise LookupServiceError(f"cannot listen on {self._path}: {error}") from error

    async def close(self) -> None:
        """Stop listening and end every connection. Idempotent."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        connections = list(self._connections)
        for task in connections:
            task.cancel()
        if connections:
            await asyncio.wait(connections, timeout=_FRAME_TIMEOUT_S)
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            if len(self._connections) >= _MAX_CONNECTIONS or not _same_user(writer):
                return
            self._connections.add(task)
            while True:
                head = await reader.readexactly(frames.LENGTH_BYTES)
                body = await in_time(reader.readexactly(frames.frame_length(head)), _FRAME_TIMEOUT_S)
                writer.write(frames.encode(await self._answer(frames.decode(body))))
                await in_time(writer.drain(), _FRAME_TIMEOUT_S)
        except (asyncio.IncompleteReadError, asyncio.TimeoutError, TimeoutError, OSError):
            pass  # the peer has gone or stopped talking
        except asyncio.CancelledError:
            pass  # only `close` does this
        except LookupServiceError as error:
            _log.warning("a lookup connection was ended: %s", error)
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        operation = self._operations.get(str(message.get("op")))
        if operation is None:
            raise LookupServiceError(f"unknown lookup operation {message.get('op')!r}")
        try:
            return await operation(message)
        except LookupServiceError:
            raise
        except KvtcError as error:
            return {"error": str(error)}

    async def _lookup(self, message: dict[str, Any]) -> dict[str, Any]:
        hashes = frames.unpack_hashes(message)
        try:
            salt = base64.b64decode(str(message.get("salt", "")), validate=True)
        except (binascii.Error, ValueError) as error:
            raise LookupServiceError("a lookup message has no sound salt") from error
        have = message.get("have", 0)
        if type(have) is not int or have < 0:
            raise LookupServiceError(f"a lookup message has {have!r} instead of a number of tokens")
        return {"tokens": await self._adapter.lookup(hashes, salt=salt, have_tokens=have)}

    async def _reset(self, message: dict[str, Any]) -> dict[str, Any]:
        await self._adapter.reset()
        return {}


def _same_user(writer: asyncio.StreamWriter) -> bool:
    """Tell whether the peer runs as this user or as root, whatever became of the file modes."""
    connection: socket.socket = writer.get_extra_info("socket")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return user in (0, os.geteuid())
