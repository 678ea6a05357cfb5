"""The public conformance kit: what every tier must pass, and tiers that misbehave on purpose.

- `dynamo_kvtc.testing.conformance.TierConformance`: a pytest class to subclass for one's own tier (needs
  pytest and pytest-asyncio).
- `dynamo_kvtc.testing.stateful.check_tier_against_model`: random sequences of calls against a model (needs
  Hypothesis).
- `ThrottledTier` and `FaultyTier`: wrappers that slow a real tier down or make it fail.

The first two install with ``pip install 'dynamo-kvtc[test]'``.
"""

from dynamo_kvtc.testing.wrappers import FaultyTier, ThrottledTier, TierWrapper

__all__ = ["FaultyTier", "ThrottledTier", "TierWrapper"]
