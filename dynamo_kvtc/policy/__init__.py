"""What to do with a block: offload, skip, leave to recomputation.

Owns: sinks, recent window, minimum lengths, the tokens of a tier block. Does not own: how a decision is
carried out (`pipeline`).
"""

from dynamo_kvtc.policy.offload import OffloadPolicy

__all__ = ["OffloadPolicy"]
