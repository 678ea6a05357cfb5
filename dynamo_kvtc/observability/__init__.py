"""What an operator can see: counters, their snapshot, metrics, the endpoint, logs.

Owns: the counters of one process, every metric's name and unit, how they leave the process, how logs look.
Does not own: when something is counted (the pipeline does that) or how it is shown in a terminal (the
command line).
"""

from dynamo_kvtc.observability.counters import (
    Action,
    Counters,
    DropReason,
    MissReason,
    Outcome,
    Snapshot,
    Stage,
    Step,
    error_type,
    miss_reason,
)
from dynamo_kvtc.observability.endpoint import MetricsEndpoint
from dynamo_kvtc.observability.flat import SEPARATOR, Changes, Series, flat_series, flat_values
from dynamo_kvtc.observability.logs import LOG_LEVELS, configure_logging
from dynamo_kvtc.observability.metrics import METRICS, Family, Metric, metric_families
from dynamo_kvtc.observability.prometheus import StatusCollector, exposition

__all__ = [
    "LOG_LEVELS",
    "METRICS",
    "SEPARATOR",
    "Action",
    "Changes",
    "Counters",
    "DropReason",
    "Family",
    "Metric",
    "MetricsEndpoint",
    "MissReason",
    "Outcome",
    "Series",
    "Snapshot",
    "Stage",
    "StatusCollector",
    "Step",
    "configure_logging",
    "error_type",
    "exposition",
    "flat_series",
    "flat_values",
    "metric_families",
    "miss_reason",
]
