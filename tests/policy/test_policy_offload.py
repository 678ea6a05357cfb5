import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.policy import OffloadPolicy


def test_recent_window_and_short_sequences_are_left_to_the_engine() -> None:
    policy = OffloadPolicy(tier_block_tokens=256, recent_window=128, minimum_tokens=512)
    assert policy.tier_blocks_to_offload(511) == 0
    assert policy.tier_blocks_to_offload(512) == 1
    assert policy.tier_blocks_to_offload(639) == 1
    assert policy.tier_blocks_to_offload(640) == 2


@given(
    tokens=st.integers(0, 10_000),
    block=st.integers(1, 512),
    window=st.integers(0, 1000),
    minimum=st.integers(0, 2000),
)
def test_what_is_offloaded_never_reaches_into_the_window(
    tokens: int, block: int, window: int, minimum: int
) -> None:
    policy = OffloadPolicy(block, min(4, block), window, minimum)
    offloaded = policy.tier_blocks_to_offload(tokens) * block
    assert 0 <= offloaded <= max(0, tokens - window)
    if tokens >= max(minimum, window):
        assert tokens - window - offloaded < block


def test_sinks_lie_in_the_first_tier_block_only() -> None:
    policy = OffloadPolicy(tier_block_tokens=16, sink_tokens=4)
    assert [policy.sinks_in(position) for position in (0, 16, 32)] == [4, 0, 0]


def test_effective_ratio_gives_the_papers_figures() -> None:
    policy = OffloadPolicy(sink_tokens=4, recent_window=128)
    # KVTC, for 20x: 5.9x at 1K tokens, 15.4x at 8K, 18.6x at 32K.
    for tokens, expected in ((1024, 5.9), (8192, 15.4), (32768, 18.6)):
        assert policy.effective_ratio(tokens, 20) == pytest.approx(expected, abs=0.1)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="fit into one tier block"):
        OffloadPolicy(tier_block_tokens=2, sink_tokens=4)
    with pytest.raises(ConfigError, match="negative"):
        OffloadPolicy(recent_window=-1)
    with pytest.raises(ConfigError, match="multiple of the engine's block size"):
        OffloadPolicy(tier_block_tokens=100).check_block_size(16)
