"""Where tier blocks live.

Owns: the tier contract, host arena (G2), disk (G3), their indexes, eviction and recovery, the stack of
tiers. Speaks bytes and keys. Does not own: what is inside an object, transfers themselves, policy.
"""

from dynamo_kvtc.tiers.base import Namespace, ReadRequest, Tier, TierKey, TierStats
from dynamo_kvtc.tiers.disk import DiskSettings, DiskTier
from dynamo_kvtc.tiers.host import HostTier
from dynamo_kvtc.tiers.shared import SharedDiskTier
from dynamo_kvtc.tiers.stack import TierStack

__all__ = [
    "DiskSettings",
    "DiskTier",
    "HostTier",
    "Namespace",
    "ReadRequest",
    "SharedDiskTier",
    "Tier",
    "TierKey",
    "TierStack",
    "TierStats",
]
