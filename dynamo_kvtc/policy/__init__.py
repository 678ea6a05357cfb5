"""What to do with a block: store it with which plan or raw, skip it, onboard it, leave it to recomputation.

Owns: sinks, recent window, minimum lengths, the tokens of a tier block; decisions by measured costs. Does not
own: how a decision is carried out, or when something is measured (`pipeline`).
"""

from dynamo_kvtc.policy.decide import (
    CostPolicy,
    CostSettings,
    Estimate,
    Piece,
    PrefixDecision,
    estimate_onboard,
)
from dynamo_kvtc.policy.offload import OffloadPolicy
from dynamo_kvtc.policy.speeds import RAW, Speeds
from dynamo_kvtc.policy.store import Candidate, StoreCost, StoreDecision, StorePolicy

__all__ = [
    "RAW",
    "Candidate",
    "CostPolicy",
    "CostSettings",
    "Estimate",
    "OffloadPolicy",
    "Piece",
    "PrefixDecision",
    "Speeds",
    "StoreCost",
    "StoreDecision",
    "StorePolicy",
    "estimate_onboard",
]
