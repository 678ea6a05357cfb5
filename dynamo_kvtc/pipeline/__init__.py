"""Offload and onboard: the overlap of gather, encode, transfer, decode and scatter.

Owns: the view of an engine's paged cache, the offload queue, the onboard schedule, `TierAdapter` (the one
object that every host adapter drives) and its thread-safe face. Does not own: what is worth offloading
(`policy`), where bytes live (`tiers`), how they are coded (`codec`), any host's calls (`adapters`).
"""
