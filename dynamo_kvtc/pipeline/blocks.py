"""The arithmetic between an engine's blocks and tier blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_kvtc.errors import LayoutError
from dynamo_kvtc.tiers.base import Namespace, TierKey

__all__ = ["SequenceBlocks", "TierBlockRef", "split_tier_blocks"]


@dataclass(frozen=True, slots=True)
class SequenceBlocks:
    """A run of whole engine blocks of one sequence.

    Attributes
    ----------
    hashes : Sequence[bytes]
        Sequence hash of each block of the run.
    block_ids : Sequence[int]
        Where each of these blocks lies in the paged cache; same length as `hashes`. For onboarding, -1
        leaves a block out (the engine has it already).
    salt : bytes
        Tenant or request salt; sequences with different salts never share a tier block.
    first_block : int
        Index in the sequence of the run's first block, where a tier block begins.
    priority : int
        The request's; lower comes sooner and is kept for longer (`dynamo_kvtc.policy.priorities`).
    """

    hashes: Sequence[bytes]
    block_ids: Sequence[int]
    salt: bytes = b""
    first_block: int = 0
    priority: int = 0

    def __post_init__(self) -> None:
        if len(self.hashes) != len(self.block_ids):
            raise LayoutError(f"{len(self.hashes)} block hashes for {len(self.block_ids)} block ids")
        if self.first_block < 0:
            raise LayoutError(f"a sequence has no block {self.first_block}")


@dataclass(frozen=True, slots=True)
class TierBlockRef:
    """One tier block of a sequence: its key, its place in the sequence, its blocks in the paged cache.

    ``priority`` is that of the request which offloads or onboards it.
    """

    key: TierKey
    first_position: int
    num_tokens: int
    block_ids: tuple[int, ...]
    priority: int = 0


def tier_keys(
    hashes: Sequence[bytes], namespace: Namespace, block_size: int, tier_block_tokens: int
) -> list[TierKey]:
    """Return the keys of a sequence's whole tier blocks; each is named by its last block's hash."""
    step = tier_block_tokens // block_size
    return [namespace.key(hashes[last]) for last in range(step - 1, len(hashes), step)]


def split_tier_blocks(
    blocks: SequenceBlocks, namespace: Namespace, block_size: int, tier_block_tokens: int
) -> list[TierBlockRef]:
    """Cut a sequence's blocks into its whole tier blocks; a rest at the end is left out.

    Raises
    ------
    LayoutError
        If the run does not begin where a tier block begins.
    """
    step = tier_block_tokens // block_size
    if blocks.first_block % step:
        raise LayoutError(f"block {blocks.first_block} is not the first of a tier block of {step} blocks")
    first_position = blocks.first_block * block_size
    keys = tier_keys(blocks.hashes, namespace, block_size, tier_block_tokens)
    return [
        TierBlockRef(
            key=key,
            first_position=first_position + index * tier_block_tokens,
            num_tokens=tier_block_tokens,
            block_ids=tuple(blocks.block_ids[index * step : (index + 1) * step]),
            priority=blocks.priority,
        )
        for index, key in enumerate(keys)
    ]
