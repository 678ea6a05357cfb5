"""Processes that a test starts: a log each, a deadline for everything, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

#: Where vLLM's host tiers keep their memory, and how it names the files that a killed engine leaves.
SHARED_MEMORY = Path("/dev/shm")
LEFTOVERS = "vllm_offload_*"

#: vLLM wants its ports in the registered range.
_FIRST_PORT, _LAST_PORT = 21000, 29999
_next_port = _FIRST_PORT + os.getpid() * 16 % (_LAST_PORT - _FIRST_PORT)


class StartError(AssertionError):
    """A process ended, or was not ready in time; the message ends with its log."""


def free_port() -> int:
    """Return a port that nobody listens on; no port is given twice in a row."""
    global _next_port
    for _ in range(_LAST_PORT - _FIRST_PORT):
        _next_port = _next_port + 1 if _next_port < _LAST_PORT else _FIRST_PORT
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", _next_port))
            return _next_port
    raise AssertionError("no free port")


def wait_until(
    condition: Callable[[], bool], what: str, *, timeout_s: float, check: Callable[[], None] = lambda: None
) -> None:
    """Poll until something holds; `check` may raise earlier."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        check()
        if time.monotonic() > deadline:
            raise StartError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.5)


class Managed:
    """A process in a group of its own, with everything that it starts.

    Parameters
    ----------
    log : Path
        Takes what it writes to both outputs.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name, self.log = name, log
        self._leftovers = set(SHARED_MEMORY.glob(LEFTOVERS))
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def check_running(self) -> None:
        if (code := self._process.poll()) is not None:
            raise StartError(f"{self.name} ended with {code}; the end of its log:\n{self.tail()}")

    def wait_for(self, condition: Callable[[], bool], what: str, *, timeout_s: float) -> None:
        try:
            wait_until(condition, what, timeout_s=timeout_s, check=self.check_running)
        except StartError as error:
            if self._process.poll() is not None:
                raise
            raise StartError(f"{self.name}: {error}; the end of its log:\n{self.tail()}") from None

    def stop(self, *, grace_s: float = 20.0) -> None:
        """Ask to end, then kill; then nothing of it runs, and its shared memory is gone. Idempotent."""
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        self.kill()

    def kill(self) -> None:
        """End it and all it started at once, as a crash would. Idempotent."""
        left = self._shared_memory()
        self._signal(signal.SIGKILL)
        self._process.wait(10)
        # A process in the group may outlive its leader by a moment.
        wait_until(lambda: not self._group_alive(), f"{self.name}'s processes are gone", timeout_s=10)
        for path in (set(SHARED_MEMORY.glob(LEFTOVERS)) - self._leftovers) | left:
            path.unlink(missing_ok=True)

    def tail(self, lines: int = 60) -> str:
        """Return the end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _shared_memory(self) -> set[Path]:
        """Return the shared memory of Python's that the group has mapped: nobody removes it after a kill."""
        found: set[Path] = set()
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(stat.read_text().rpartition(")")[2].split()[2]) == self.pid:
                    lines = (stat.parent / "maps").read_text().splitlines()
                    names = (line.rpartition(" ")[2] for line in lines)
                    found |= {Path(name) for name in names if name.startswith(f"{SHARED_MEMORY}/psm_")}
        return found

    def _group_alive(self) -> bool:
        """Tell whether a process of the group still runs; zombies that await their parent do not."""
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.pid and state != "Z":
                    return True
        return False
