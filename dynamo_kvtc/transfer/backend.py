"""NIXL itself: finding the package, creating an agent with exactly the backends that are wanted.

Backends are always named: NIXL's own probing of GDS hangs where its driver is missing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import itertools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamo_kvtc.errors import MissingDependencyError, TransferError
from dynamo_kvtc.transfer.gds import GDS, gds_problem

__all__ = [
    "DRAM",
    "FILE",
    "MEMORY_BACKENDS",
    "OBJ",
    "POSIX",
    "UCX",
    "VRAM",
    "NixlHandle",
    "add_gds",
    "create_nixl_agent",
    "create_object_agent",
    "load_nixl",
]

DRAM, VRAM, FILE = "DRAM", "VRAM", "FILE"
UCX, POSIX, OBJ = "UCX", "POSIX", "OBJ"

#: Backends that memory is registered with, in an agent that has them.
MEMORY_BACKENDS = [UCX, POSIX]

#: A NIXL agent or handle; the bindings carry no types.
NixlHandle = Any

_log = logging.getLogger(__name__)

_UCX_DEVICES = "UCX_NET_DEVICES"
_PROBE_BYTES = 4096
_PROBE_TIMEOUT_S = 5.0
_serial = itertools.count()

# A handle in flight must never be released, nor its memory freed: a failed probe's are kept for good.
_abandoned: list[tuple[NixlHandle, NixlHandle, NDArray[np.uint8]]] = []


def load_nixl() -> ModuleType:
    """Import NIXL's Python package for the CUDA major version that is installed.

    Never the package `nixl`, which imports torch. Only one of the two may live in a process, so one that
    is already imported (by the engine) is used.

    Raises
    ------
    MissingDependencyError
        If neither package is installed or importable.
    """
    names = ("nixl_cu13", "nixl_cu12")
    loaded = [name for name in names if name in sys.modules]
    reasons = []
    for name in loaded or names:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            reasons.append(f"{name}: {error}")
            continue
        if not os.environ.get("NIXL_LOG_LEVEL"):
            # NIXL logs routine messages to standard output, which belongs to the commands' own output.
            logging.getLogger(f"nixl.{name}").setLevel(logging.WARNING)
        return module
    raise MissingDependencyError(
        "NIXL is not installed: pip install --no-deps nixl-cu13 (or nixl-cu12 on CUDA 12); "
        f"it works without a GPU too ({'; '.join(reasons)})"
    )


def create_nixl_agent(name: str, *, io_uring: bool, interface: str = "lo") -> tuple[NixlHandle, str]:
    """Create a NIXL agent with UCX for memory and POSIX for files.

    To be called in the thread that makes every later call.

    Returns
    -------
    tuple
        The agent, and how it moves files: ``"io_uring"`` or ``"aio"``.

    Raises
    ------
    TransferError
        If UCX or POSIX cannot be set up, or a small transfer through them fails.
    """
    if io_uring and not _io_uring_survives_errors():
        _log.info("NIXL before 1.5 cannot use io_uring again after a failed transfer, using AIO")
        io_uring = False
    try:
        agent = _create(name, {"use_uring": "true"} if io_uring else {"use_aio": "true"})
        file_mode = "io_uring" if io_uring else "aio"
    except TransferError as error:
        if not io_uring:
            raise
        _log.info("io_uring does not work here, using AIO: %s", error)
        agent, file_mode = _create(name, {"use_aio": "true"}), "aio"
    try:
        with _ucx_bound_to(interface):
            agent.create_backend(UCX, {})
    except Exception as error:
        raise TransferError(
            f"NIXL's UCX backend cannot start: {error!r}; if UCX_TLS or UCX_NET_DEVICES is set "
            f"(UCX_TLS={os.environ.get('UCX_TLS', '')!r}), it must allow tcp or a fabric besides self and sm"
        ) from error
    return agent, file_mode


@contextlib.contextmanager
def _ucx_bound_to(interface: str) -> Iterator[None]:
    """Keep UCX from listening on every interface while it starts.

    Only its environment says where; NIXL's own parameter means InfiniBand devices. Whoever has set that
    environment (the engine, for its own connector) has decided.
    """
    if not interface or os.environ.get(_UCX_DEVICES) or os.environ.get("UCX_TLS"):
        yield
        return
    os.environ[_UCX_DEVICES] = interface
    try:
        yield
    finally:
        del os.environ[_UCX_DEVICES]


def _io_uring_survives_errors() -> bool:
    """Tell by the version: kvbm 1.6.1 brings NIXL 1.3.2, whose ring keeps a failed submission for ever."""
    try:
        version = importlib.metadata.version(load_nixl().__name__.replace("_", "-"))
        return tuple(int(part) for part in version.split(".")[:2]) >= (1, 5)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return True  # a build of one's own: the trial at start decides


def create_object_agent(name: str, options: Mapping[str, str]) -> NixlHandle:
    """Create a NIXL agent with the OBJ backend alone; it sends nothing yet.

    Raises
    ------
    TransferError
        If NIXL has no such plugin here, or it does not start.
    """
    try:
        agent = _empty_agent(name)
        if OBJ not in agent.get_plugin_list():
            raise TransferError(
                "this NIXL has no OBJ plugin: install nixl-cu12, or point NIXL_PLUGIN_DIR to its plugins"
            )
        agent.create_backend(OBJ, dict(options))
    except TransferError:
        raise
    except Exception as error:
        # Not the error itself: it may quote the options, and these hold credentials.
        raise TransferError(f"NIXL's OBJ backend does not start: {type(error).__name__}") from None
    return agent


def add_gds(agent: NixlHandle, options: Mapping[str, str]) -> None:
    """Give an agent the GDS backend; in the thread that makes every later call.

    Raises
    ------
    TransferError
        If GPUDirect Storage cannot be used here; nothing has been tried then that could hang.
    """
    problem = gds_problem()
    if problem is None and GDS not in agent.get_plugin_list():
        problem = "this NIXL has no GDS plugin (NIXL_PLUGIN_DIR may point to it)"
    if problem is not None:
        raise TransferError(
            f"transfer.gds is true, but {problem}; set it to false, or see `dynamo-kvtc doctor`"
        )
    try:
        agent.create_backend(GDS, dict(options))
    except Exception as error:
        raise TransferError(f"NIXL's GDS backend does not start: {error!r}; see cufile.log") from error


def _empty_agent(name: str) -> NixlHandle:
    nixl = load_nixl()
    config = nixl.nixl_agent_config(
        enable_prog_thread=False,
        backends=[],
        sync_mode=nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
    )
    return nixl.nixl_agent(f"{name}-{os.getpid()}-{next(_serial)}", config)


def _create(name: str, posix_options: dict[str, str]) -> NixlHandle:
    """Create an agent whose POSIX backend has moved a few bytes; NIXL's errors have no common base."""
    load_nixl()
    try:
        agent = _empty_agent(name)
        agent.create_backend(POSIX, posix_options)
        _probe_files(agent)
    except Exception as error:
        raise TransferError(f"NIXL's POSIX backend does not work with {posix_options}: {error!r}") from error
    return agent


def _probe_files(agent: NixlHandle) -> None:
    memory = np.zeros(2 * _PROBE_BYTES, dtype=np.uint8)
    memory[:_PROBE_BYTES] = np.arange(_PROBE_BYTES) % 251
    address = memory.ctypes.data
    with tempfile.TemporaryFile() as file:
        fd = file.fileno()
        held = agent.register_memory([(address, memory.nbytes, 0, "")], DRAM, backends=[POSIX])
        held_file = agent.register_memory([(0, _PROBE_BYTES, fd, "")], FILE, backends=[POSIX])
        for operation, start in (("WRITE", address), ("READ", address + _PROBE_BYTES)):
            local = agent.get_xfer_descs([(start, _PROBE_BYTES, 0)], DRAM)
            remote = agent.get_xfer_descs([(0, _PROBE_BYTES, fd)], FILE)
            handle = agent.initialize_xfer(operation, local, remote, agent.name, b"", backends=[POSIX])
            deadline = time.monotonic() + _PROBE_TIMEOUT_S
            state = agent.transfer(handle)
            while state == "PROC" and time.monotonic() < deadline:
                time.sleep(50e-6)
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                _abandoned.append((agent, handle, memory))
                raise TransferError(f"a {operation.lower()} of {_PROBE_BYTES} bytes ended as {state}")
            handle.release()
        agent.deregister_memory(held_file, backends=[POSIX])
        agent.deregister_memory(held, backends=[POSIX])
    if not np.array_equal(memory[:_PROBE_BYTES], memory[_PROBE_BYTES:]):
        raise TransferError("bytes read back differ from the bytes written")
