"""Which tokens of a sequence are offloaded."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_kvtc.errors import ConfigError

__all__ = ["OffloadPolicy"]


@dataclass(frozen=True, slots=True)
class OffloadPolicy:
    """Offload whole tier blocks, oldest first, and leave the recent window to the engine.

    Attributes
    ----------
    tier_block_tokens : int
        Tokens per tier block; a multiple of the engine's block size.
    sink_tokens : int
        Tokens at the start of a sequence that every profile keeps at high precision. KVTC keeps 4:
        compressing them collapses accuracy.
    recent_window : int
        Tokens at the end of a sequence that are not offloaded; the engine recomputes them. Once the
        sequence has grown past them they are offloaded like all others.
    minimum_tokens : int
        Sequences shorter than this are not offloaded at all: recomputing them is cheap, and the
        window would dominate the ratio.
    """

    tier_block_tokens: int = 256
    sink_tokens: int = 4
    recent_window: int = 128
    minimum_tokens: int = 512

    def __post_init__(self) -> None:
        if self.tier_block_tokens < 1 or min(self.sink_tokens, self.recent_window, self.minimum_tokens) < 0:
            raise ConfigError(f"token counts of the policy must not be negative: {self}")
        if self.sink_tokens > self.tier_block_tokens:
            raise ConfigError(
                f"sink_tokens ({self.sink_tokens}) must fit into one tier block "
                f"({self.tier_block_tokens} tokens)"
            )

    def check_block_size(self, block_size: int) -> None:
        """Raise `ConfigError` unless tier blocks are runs of whole blocks of the engine."""
        if block_size < 1 or self.tier_block_tokens % block_size:
            raise ConfigError(
                f"policy.tier_block_tokens ({self.tier_block_tokens}) must be a multiple of the engine's "
                f"block size ({block_size}); use for example {max(1, 256 // max(block_size, 1)) * block_size}"
            )

    def tier_blocks_to_offload(self, num_tokens: int) -> int:
        """Return how many leading tier blocks of a sequence of `num_tokens` tokens are offloaded."""
        if num_tokens < self.minimum_tokens:
            return 0
        return max(0, num_tokens - self.recent_window) // self.tier_block_tokens

    def sinks_in(self, first_position: int) -> int:
        """Return how many tokens of the tier block at `first_position` are sinks."""
        return min(self.tier_block_tokens, max(0, self.sink_tokens - first_position))

    def effective_ratio(self, num_tokens: int, ratio: float) -> float:
        """Ratio over a whole sequence when the recent window stays at 16 bits.

        The form of KVTC's ``n / ((n - w - s) / ratio + w + s / 2)``: sinks `s` at 8 bits, window `w` at 16.
        """
        sinks = min(self.sink_tokens, num_tokens)
        window = min(self.recent_window, num_tokens - sinks)
        coded = num_tokens - sinks - window
        return num_tokens / (coded / ratio + window + sinks / 2)
