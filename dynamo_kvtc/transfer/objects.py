"""Objects in an S3 bucket, moved by NIXL's OBJ backend.

An agent of its own, with this backend alone: a bucket that does not answer must not hold up, nor wear out,
the agent that moves memory and files. Its memory is its own too; who uses it copies.

NIXL writes whole objects, not on condition that there is none yet, and reports reads beyond an object's end
as done: its callers know sizes and checksums.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from dynamo_kvtc.transfer.agent import TransferAgent
from dynamo_kvtc.transfer.backend import OBJ
from dynamo_kvtc.transfer.files import FileRegion, FileSpan
from dynamo_kvtc.transfer.memory import MemorySpan
from dynamo_kvtc.transfer.settings import AgentSettings

__all__ = ["ObjectAgent", "ObjectRegion", "object_options"]

#: How NIXL names the memory kind of objects.
_KIND = "OBJ"


class ObjectRegion(FileRegion):
    """An object of which bytes ``[0, nbytes)`` may be transferred; `name` is its whole name in the bucket."""

    __slots__ = ()

    @property
    def kind(self) -> str:
        """What NIXL takes the region for."""
        return _KIND

    @property
    def backend(self) -> str:
        """The NIXL backend that moves its bytes."""
        return OBJ

    @property
    def registered_name(self) -> str:
        """The object's name."""
        return self.name


def object_options(
    *, bucket: str, endpoint: str | None, region: str, virtual_hosted: bool, credentials: Mapping[str, str]
) -> dict[str, str]:
    """Return the parameters of NIXL's OBJ backend.

    Parameters
    ----------
    endpoint : str, optional
        URL of the server; None for AWS.
    credentials : Mapping[str, str]
        ``access_key``, ``secret_key``, ``session_token``; empty leaves them to the AWS SDK's own search.
    """
    options = {
        "bucket": bucket,
        "region": region,
        "scheme": "http" if (endpoint or "").startswith("http://") else "https",
        "use_virtual_addressing": "true" if virtual_hosted else "false",
        **credentials,
    }
    if endpoint:
        options["endpoint_override"] = endpoint
    return options


class ObjectAgent(TransferAgent):
    """Moves bytes between its registered memory and objects. Make one with `connect`."""

    _serial = itertools.count(1)

    @classmethod
    async def connect(cls, options: Mapping[str, str], *, drain_limit_s: float = 60.0) -> ObjectAgent:
        """Start NIXL with its OBJ backend; whether the bucket answers shows with the first transfer.

        Raises
        ------
        MissingDependencyError, TransferError
            If NIXL is not installed or has no OBJ backend here.
        """
        agent = await cls.create(
            AgentSettings(
                name="kvtc-obj",
                object_store=options,
                drain_limit_s=drain_limit_s,
                # An object is written in one piece.
                max_post_bytes=1 << 40,
            )
        )
        assert isinstance(agent, ObjectAgent)
        agent._moved |= {"get": 0, "put": 0}
        return agent

    async def open_object(self, name: str, nbytes: int) -> ObjectRegion:
        """Register an object by its name; nothing is sent. Close it with `close_file`."""
        self._check_usable()
        # NIXL tells objects apart by a device number.
        region = ObjectRegion(next(self._serial), nbytes, name, owns_fd=False, registration=None)
        await self._register(region)
        self._files.add(region)
        return region

    async def read_objects(self, pairs: Sequence[tuple[FileSpan, MemorySpan]], timeout_s: float) -> None:
        """Read ``(source, destination)`` pairs as one transfer; raises as `copy` does."""
        await self._move("get", "READ", OBJ, _KIND, [(into, source) for source, into in pairs], timeout_s)

    async def write_object(self, source: MemorySpan, destination: FileSpan, timeout_s: float) -> None:
        """Write a whole object, over what may be there; raises as `copy` does."""
        await self._move("put", "WRITE", OBJ, _KIND, [(source, destination)], timeout_s)
