"""Where tier blocks live.

Owns: the tier contract, host arena (G2), disk (G3), object store (G4), their indexes, eviction and recovery,
the stack of tiers. Speaks bytes and keys. Does not own: what is inside an object, transfers, policy.
"""

from dynamo_kvtc.tiers.base import Namespace, ReadRequest, Tier, TierKey, TierStats
from dynamo_kvtc.tiers.disk import DiskSettings, DiskTier
from dynamo_kvtc.tiers.host import HostTier
from dynamo_kvtc.tiers.object import ObjectSettings, ObjectTier
from dynamo_kvtc.tiers.object_client import BucketPlace
from dynamo_kvtc.tiers.shared import SharedDiskTier
from dynamo_kvtc.tiers.stack import TierStack

__all__ = [
    "BucketPlace",
    "DiskSettings",
    "DiskTier",
    "HostTier",
    "Namespace",
    "ObjectSettings",
    "ObjectTier",
    "ReadRequest",
    "SharedDiskTier",
    "Tier",
    "TierKey",
    "TierStack",
    "TierStats",
]
