"""Where tier blocks live.

Owns: the tier contract, host arena (G2), disk (G3), their indexes, eviction and recovery, the stack of
tiers. Speaks bytes and keys. Does not own: what is inside an object, transfers themselves, policy.
"""
