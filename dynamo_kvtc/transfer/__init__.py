"""NIXL, and nothing but NIXL.

Owns: the agent and its single poller, registered memory and files, awaitable transfers with deadlines,
the staging pool. Does not own: what the bytes mean, where objects lie in an arena or a file.
"""

from dynamo_kvtc.transfer.agent import AgentStats, TransferAgent
from dynamo_kvtc.transfer.files import FileRegion, FileSpan
from dynamo_kvtc.transfer.memory import MemoryRegion, MemorySpan
from dynamo_kvtc.transfer.objects import ObjectAgent
from dynamo_kvtc.transfer.settings import AgentSettings
from dynamo_kvtc.transfer.staging import StagingPool

__all__ = [
    "AgentSettings",
    "AgentStats",
    "FileRegion",
    "FileSpan",
    "MemoryRegion",
    "MemorySpan",
    "ObjectAgent",
    "StagingPool",
    "TransferAgent",
]
