"""KVBM's own settings, and what they may not be beside ours."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dynamo_kvtc.config import Config, DiskTierConfig, HostTierConfig
from dynamo_kvtc.errors import ConfigError

__all__ = ["KvbmSettings", "memory_limit", "reconcile"]

CPU_CACHE_GB = "DYN_KVBM_CPU_CACHE_GB"
CPU_CACHE_BLOCKS = "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS"
DISK_CACHE_GB = "DYN_KVBM_DISK_CACHE_GB"
DISK_CACHE_BLOCKS = "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS"
DISK_CACHE_DIR = "DYN_KVBM_DISK_CACHE_DIR"

#: Bytes that KVBM means by GB.
_GB = 1_000_000_000

#: Where KVBM puts its disk pool if nothing is said.
_DEFAULT_DISK_DIR = "/tmp"

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, slots=True)
class KvbmSettings:
    """KVBM's pools, from its environment variables.

    Attributes
    ----------
    host_bytes : int
        Size of the raw host pool, 0 if it is given in blocks or not at all.
    has_host, has_disk : bool
        Whether KVBM keeps a raw pool in host memory, on disk.
    disk_folder : Path
        Where its disk pool lies.
    """

    host_bytes: int
    has_host: bool
    has_disk: bool
    disk_folder: Path

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> KvbmSettings:
        """Read the variables.

        Raises
        ------
        ConfigError
            If one of them is no number, or negative.
        """
        values = os.environ if environment is None else environment
        host_gb, host_blocks = _number(values, CPU_CACHE_GB), _number(values, CPU_CACHE_BLOCKS)
        disk_gb, disk_blocks = _number(values, DISK_CACHE_GB), _number(values, DISK_CACHE_BLOCKS)
        return cls(
            host_bytes=0 if host_blocks else int(host_gb * _GB),
            has_host=bool(host_gb or host_blocks),
            has_disk=bool(disk_gb or disk_blocks),
            disk_folder=Path(values.get(DISK_CACHE_DIR, "").strip() or _DEFAULT_DISK_DIR),
        )


def reconcile(kvbm: KvbmSettings, config: Config, memory_bytes: int | None) -> None:
    """Refuse settings of KVBM that contradict ours.

    Parameters
    ----------
    memory_bytes : int, optional
        Memory that this process may use; None if unknown.

    Raises
    ------
    ConfigError
        It says which variable or key to change.
    """
    if not kvbm.has_host:
        raise ConfigError(
            f"KVBM has no host pool: set {CPU_CACHE_GB} to the size of its raw, hot tier; or serve without "
            "KVBM, with kv_connector_module_path dynamo_kvtc.adapters.vllm"
        )
    disks = [tier for tier in config.tiers if isinstance(tier, DiskTierConfig)]
    if kvbm.has_disk and disks:
        raise ConfigError(
            f"KVBM's disk pool would hold raw what the disk tier {disks[0].path} holds compressed: unset "
            f"{DISK_CACHE_GB} and {DISK_CACHE_BLOCKS} and give the disk tier that space"
        )
    if kvbm.has_disk:
        raise ConfigError(
            f"KVBM's raw disk pool in {kvbm.disk_folder} would be read before the compressed tiers: unset "
            f"{DISK_CACHE_GB} and {DISK_CACHE_BLOCKS} and add a disk tier to the configuration"
        )
    ours = sum(tier.capacity for tier in config.tiers if isinstance(tier, HostTierConfig))
    needed = kvbm.host_bytes + ours + config.transfer.staging
    if memory_bytes is not None and needed > memory_bytes:
        raise ConfigError(
            f"KVBM's host pool ({CPU_CACHE_GB}: {kvbm.host_bytes} bytes), our host tier ({ours}) and staging "
            f"({config.transfer.staging}) need {needed} bytes together, and this process may use "
            f"{memory_bytes}: make {CPU_CACHE_GB} or the host tier's capacity smaller"
        )


def memory_limit() -> int | None:
    """Return how many bytes of memory this process may use: its cgroup's limit or the machine's memory."""
    limits = []
    with contextlib.suppress(OSError, ValueError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in _CGROUP_LIMITS:
        try:
            limits.append(int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # "max" is no limit
            continue
    return min(limits, default=None)


def _number(values: Mapping[str, str], name: str) -> float:
    text = values.get(name, "").strip()
    try:
        number = float(text or 0)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e12:
        raise ConfigError(f"{name}={text!r} is no size: KVBM takes a number, 0 or more")
    return number
