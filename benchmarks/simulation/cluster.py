"""The simulated cluster: a real frontend with the KV router, mocker workers with or without a host tier."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from benchmarks.local_dynamo.frontend import Frontend, loopback_environment
from benchmarks.local_dynamo.processes import Managed, free_port

__all__ = ["BLOCK_SIZE", "MODEL_NAME", "Cluster", "ClusterSettings", "HostTier"]

MODEL_NAME = "simulated"
BLOCK_SIZE = 64


@dataclass(frozen=True)
class ClusterSettings:
    """What all runs have in common.

    Attributes
    ----------
    gpu_blocks : int
        Blocks of `BLOCK_SIZE` tokens that fit on one worker's GPU.
    bytes_per_token : int
        Plain KV bytes.
    speed : float
        Of the mocker's clock. Slow, so that what this machine itself needs for a request hardly counts.
    """

    model: Path
    workers: int = 2
    gpu_blocks: int = 512
    bytes_per_token: int = 23_040
    speed: float = 0.4


@dataclass(frozen=True)
class HostTier:
    """A host tier of one worker.

    Attributes
    ----------
    blocks : int
        How many blocks it holds.
    onboard_gb_per_s, offload_gb_per_s : float
        Plain KV bytes; 0 is no limit.
    """

    blocks: int
    onboard_gb_per_s: float = 0.0
    offload_gb_per_s: float = 0.0


class Cluster:
    """Frontend and workers of one run; a context manager.

    Parameters
    ----------
    folder : Path
        For logs and discovery.
    """

    def __init__(self, settings: ClusterSettings, host: HostTier | None, folder: Path) -> None:
        self._settings, self._host, self._folder = settings, host, folder
        self._processes: list[Managed] = []

    def __enter__(self) -> Cluster:
        settings = self._settings
        self._folder.mkdir(parents=True)
        environment = loopback_environment(self._folder)
        self.frontend = Frontend(self._folder, environment)
        self._processes.append(self.frontend.process)
        command = [sys.executable, "-m", "dynamo.mocker", "--model-path", str(settings.model)]
        command += ["--model-name", MODEL_NAME, "--num-workers", str(settings.workers)]
        command += ["--num-gpu-blocks-override", str(settings.gpu_blocks), "--block-size", str(BLOCK_SIZE)]
        command += ["--speedup-ratio", str(settings.speed)]
        command += ["--kv-bytes-per-token", str(settings.bytes_per_token)]
        if self._host is not None:
            command += ["--num-host-blocks", str(self._host.blocks)]
            command += ["--host-offload-h2d-bandwidth-gbps", f"{self._host.onboard_gb_per_s:.6f}"]
            command += ["--host-offload-d2h-bandwidth-gbps", f"{self._host.offload_gb_per_s:.6f}"]
        workers = Managed(
            "mocker",
            command,
            environment | {"DYN_SYSTEM_PORT": str(free_port())},
            self._folder / "mocker.log",
        )
        self._processes.append(workers)
        try:
            self.frontend.wait_for_workers(settings.workers, timeout_s=120)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        for process in reversed(self._processes):
            process.stop(grace_s=5)
