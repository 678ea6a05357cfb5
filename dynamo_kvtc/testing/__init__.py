"""The public conformance kit: what every tier must pass, and tiers that misbehave on purpose.

Owns: suites and wrappers that serve any tier, also a third party's. Does not own: the tests of this package.

- `dynamo_kvtc.testing.conformance.TierConformance`: a pytest class to subclass for one's own tier (needs
  pytest and pytest-asyncio).
- `dynamo_kvtc.testing.stateful.check_tier_against_model`: random sequences of calls against a model (needs
  Hypothesis).
- `dynamo_kvtc.testing.fault_suite.TierFaultSuite`: a pytest class too, for what a tier does when transfers
  and callers fail.
- `ThrottledTier` and `FaultyTier`: wrappers that slow a real tier down or make it fail.
- `FaultyTransfer`: a wrapper of the transfer agent that makes transfers fail, below any tier;
  `cancel_at_every_await`: a caller that gives up at every moment at which it can.

What the first three need comes with ``pip install 'dynamo-kvtc[test]'``.
"""

from dynamo_kvtc.testing.transfer_faults import FAULTS, FaultyTransfer, cancel_at_every_await
from dynamo_kvtc.testing.wrappers import FaultyTier, ThrottledTier, TierWrapper

__all__ = ["FAULTS", "FaultyTier", "FaultyTransfer", "ThrottledTier", "TierWrapper", "cancel_at_every_await"]
