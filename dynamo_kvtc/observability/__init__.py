"""What an operator can see: counters, their snapshot, logs.

Owns: the counters of one process and how logs look. Does not own: when something is counted (the
pipeline does that) or how it is shown (`status`, the command line).
"""

from dynamo_kvtc.observability.counters import Counters, DropReason, MissReason, Snapshot, Stage, miss_reason
from dynamo_kvtc.observability.logs import LOG_LEVELS, configure_logging

__all__ = [
    "LOG_LEVELS",
    "Counters",
    "DropReason",
    "MissReason",
    "Snapshot",
    "Stage",
    "configure_logging",
    "miss_reason",
]
