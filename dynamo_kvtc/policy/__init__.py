"""What to do with a block: offload, skip, leave to recomputation.

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
from dynamo_kvtc.policy.speeds import Speeds

__all__ = [
    "CostPolicy",
    "CostSettings",
    "Estimate",
    "OffloadPolicy",
    "Piece",
    "PrefixDecision",
    "Speeds",
    "estimate_onboard",
]
