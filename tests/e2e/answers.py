"""What an answer has to be."""

from __future__ import annotations

from connectors import TIER_BLOCK
from deployment import Answer

#: Float32 sums differ in their last bits with the number of tokens that are computed at once.
_TOLERANCE = 2e-4


def whole_tier_blocks(tokens: int) -> int:
    """Return how many of so many tokens fill whole tier blocks."""
    return tokens // TIER_BLOCK * TIER_BLOCK


def assert_same(answer: Answer, expected: Answer) -> None:
    """Check text and log-probabilities of a float32 run whose KV is stored raw."""
    assert answer.text == expected.text
    assert [token for token, _ in answer.logprobs] == [token for token, _ in expected.logprobs]
    assert answer.logprobs
    for (token, found), (_, wanted) in zip(answer.logprobs, expected.logprobs, strict=True):
        assert abs(found - wanted) < _TOLERANCE, (token, found, wanted)
