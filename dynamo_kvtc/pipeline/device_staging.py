"""Device memory that stored bytes are read into, past the host, where the codec works on that device.

Only files can be read there (GPUDirect Storage), and only as they are: what is encrypted, in a bucket or in
host memory passes through the staging memory on the host, and so do headers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import torch

from dynamo_kvtc.codec.bitstream import StreamHeader
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.codec.paged_codec import PagedCodec
from dynamo_kvtc.config import Config, DiskTierConfig
from dynamo_kvtc.errors import TransferError
from dynamo_kvtc.tiers.base import TierKey
from dynamo_kvtc.tiers.stack import TierStack
from dynamo_kvtc.transfer.agent import TransferAgent
from dynamo_kvtc.transfer.device_memory import DeviceRegion
from dynamo_kvtc.transfer.memory import MemorySpan
from dynamo_kvtc.transfer.staging import StagingPool

__all__ = ["DeviceStaging", "landing_bytes", "open_device_staging"]

_log = logging.getLogger(__name__)

#: Share of `codec.gpu.memory` that stored bytes are read into. They are a few per cent of the KV that they
#: become, and of what decoding them takes.
_SHARE = 4

#: Of leases: cuFile moves whole pages of files fastest into memory that is aligned like them.
_ALIGNMENT = 4096


class DeviceStaging:
    """Leases of a device's memory for units of an onboard.

    Parameters
    ----------
    pool : StagingPool
        Over a `DeviceRegion`.
    tiers : TierStack
        What is read from.
    profile : Profile
        Of the streams that the device's codec reads.

    Attributes
    ----------
    landed_bytes : int
        Bytes that were read into it.
    """

    def __init__(self, pool: StagingPool, tiers: TierStack, profile: Profile) -> None:
        self._pool, self._tiers, self._profile = pool, tiers, profile
        self.landed_bytes = 0

    @property
    def leased_bytes(self) -> int:
        """Bytes leased out, or parked because an abandoned transfer may still touch them."""
        return self._pool.leased_bytes

    def try_lease(
        self, keys: Sequence[TierKey], headers: Sequence[StreamHeader], nbytes: int
    ) -> MemorySpan | None:
        """Lease `nbytes` bytes, to be ended with `release`.

        Returns
        -------
        MemorySpan or None
            None, so that the unit goes over the host, if there is no room now (which host memory has, and
            waiting is no use), the fastest tier of any object does not read into a device, or a stream is not
            of the device's profile.
        """
        if all(map(self._can_land, keys)) and all(header.profile is self._profile for header in headers):
            return self._pool.try_lease(nbytes)
        return None

    def release(self, span: MemorySpan) -> None:
        """End a lease; nothing may read it any more."""
        self._pool.release(span)

    def _can_land(self, key: TierKey) -> bool:
        fastest = next((tier for tier in self._tiers.tiers if tier.size_of(key) is not None), None)
        return fastest is not None and fastest.reads_into_device


def landing_bytes(config: Config) -> int:
    """Return how much of `codec.gpu.memory` stored bytes are read into; 0 where they land on the host."""
    from_files = any(isinstance(tier, DiskTierConfig) and tier.encryption is None for tier in config.tiers)
    return config.codec.gpu.memory // _SHARE if config.transfer.gds and from_files else 0


async def open_device_staging(
    config: Config, agent: TransferAgent, codec: PagedCodec | None, tiers: TierStack
) -> DeviceStaging | None:
    """Take and register device memory for stored bytes; None where they land on the host.

    A device whose memory cannot be registered is no error: bytes land on the host then, which the log says.
    The memory is the agent's, which frees it when it closes.
    """
    nbytes = landing_bytes(config)
    if not nbytes or codec is None:
        return None
    device = codec.device
    if (problem := await asyncio.to_thread(codec.landing_problem)) is not None:
        _log.warning("stored bytes land in host memory, not in %s: %s", device, problem)
        return None
    try:
        memory = await asyncio.to_thread(lambda: torch.empty(nbytes, dtype=torch.uint8, device=device))
        region = DeviceRegion(memory)
        await agent.register_memory(region)
    except (TransferError, torch.cuda.OutOfMemoryError) as error:
        _log.warning("stored bytes land in host memory, not in %s: %s", device, error)
        return None
    pool = StagingPool(agent, region, alignment=_ALIGNMENT, max_waiters=0)
    return DeviceStaging(pool, tiers, codec.profile)
