"""A minimal engine over transformers: one sequence at a time, KV in paged blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynamo_kvtc.adapters.hf.hashing import sequence_hashes
from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.calibration.transformers_cache import cache_argument
from dynamo_kvtc.errors import LayoutError
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.pipeline.paged import PagedKvCache

__all__ = ["HfEngine", "HfSession"]


class HfEngine:
    """Owns a model and its paged cache (tier G1).

    Parameters
    ----------
    loaded : LoadedModel
        The model; its cache dtype is that of the weights.
    num_blocks, block_size : int
        Size of the paged cache. Layout per layer: ``[2, num_blocks, block_size, heads, head_size]``.
    """

    def __init__(self, loaded: LoadedModel, *, num_blocks: int, block_size: int = 16) -> None:
        geometry = loaded.geometry
        shape = (2, num_blocks, block_size, geometry.num_kv_heads, geometry.head_size)
        layers = [torch.zeros(shape, dtype=geometry.torch_dtype) for _ in range(geometry.num_layers)]
        self.loaded = loaded
        self.cache = PagedKvCache.from_layers(layers, "2BNHD")
        self.block_size = block_size
        self._free = list(range(num_blocks))

    @property
    def free_blocks(self) -> int:
        """Blocks that no session holds."""
        return len(self._free)

    def session(self, token_ids: Sequence[int]) -> HfSession:
        """Begin a sequence; nothing is computed yet."""
        return HfSession(self, list(token_ids))

    def allocate(self, count: int) -> list[int]:
        """Take blocks from the free list.

        Raises
        ------
        LayoutError
            If there are not enough.
        """
        if count > len(self._free):
            raise LayoutError(
                f"the paged cache has {len(self._free)} free blocks, {count} are needed; release a session"
            )
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back. Their content is overwritten, so that reading them by mistake shows."""
        index = torch.tensor(blocks, dtype=torch.int64)
        for view in (*self.cache.keys, *self.cache.values):
            view[index] = float("nan")
        self._free.extend(blocks)


class HfSession:
    """One sequence: its tokens, its block table, how much of its KV is in the paged cache.

    Attributes
    ----------
    token_ids : list[int]
        The whole sequence.
    block_ids : list[int]
        Blocks that hold the KV of tokens ``0 .. num_cached - 1``.
    num_cached : int
        Leading tokens whose KV is in place.
    """

    def __init__(self, engine: HfEngine, token_ids: list[int]) -> None:
        self.engine = engine
        self.token_ids = token_ids
        self.block_ids: list[int] = []
        self.num_cached = 0

    def hashes(self) -> list[bytes]:
        """Return the sequence hash of every whole block of the sequence."""
        return sequence_hashes(self.token_ids, self.engine.block_size)

    def cached_blocks(self) -> SequenceBlocks:
        """Return the whole blocks whose KV is in place, for offloading."""
        whole = self.num_cached // self.engine.block_size
        return SequenceBlocks(self.hashes()[:whole], self.block_ids[:whole])

    def reserve(self, num_tokens: int) -> SequenceBlocks:
        """Allocate blocks for the first `num_tokens` tokens, to onboard into; call `commit` afterwards."""
        self._grow(num_tokens)
        whole = num_tokens // self.engine.block_size
        return SequenceBlocks(self.hashes()[:whole], self.block_ids[:whole])

    def commit(self, num_tokens: int) -> None:
        """Declare the KV of the first `num_tokens` tokens in place."""
        self.num_cached = num_tokens

    @torch.inference_mode()
    def prefill(self, last: int = 1) -> torch.Tensor:
        """Compute the KV of all tokens that are not in place yet.

        Parameters
        ----------
        last : int
            At how many of the newly computed tokens, from the end, logits are wanted.

        Returns
        -------
        torch.Tensor
            float32 ``[min(last, new tokens), vocabulary]``.
        """
        cached = min(self.num_cached, len(self.token_ids) - 1)
        new = torch.tensor([self.token_ids[cached:]])
        past = self._past(cached)
        model = self.engine.loaded.model
        given = cache_argument(model, past)
        output = model(input_ids=new, use_cache=True, logits_to_keep=last, **given)
        self._write_back(past, cached)
        return output.logits[0].float()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def generate(self, max_tokens: int) -> list[int]:
        """Go on greedily for up to `max_tokens` tokens, or to the end-of-sequence token.

        Returns
        -------
        list[int]
            The new tokens; they are appended to the sequence.
        """
        model = self.engine.loaded.model
        stop = self.engine.loaded.tokenizer.eos_token_id
        start = min(self.num_cached, len(self.token_ids) - 1)
        past = self._past(start)
        pending, generated = self.token_ids[start:], list[int]()
        given = cache_argument(model, past)
        while len(generated) < max_tokens:
            ids = torch.tensor([pending])
            output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)
            token = int(output.logits[0, -1].argmax())
            generated.append(token)
            pending = [token]
            if token == stop:
                break
        self.token_ids.extend(generated)
        self._write_back(past, start)
        return generated

    def evict(self) -> None:
        """Give all blocks back; the sequence's KV is gone from G1."""
        self.engine.release(self.block_ids)
        self.block_ids, self.num_cached = [], 0

    def _grow(self, num_tokens: int) -> None:
        missing = -(-num_tokens // self.engine.block_size) - len(self.block_ids)
        if missing > 0:
            self.block_ids.extend(self.engine.allocate(missing))

    def _past(self, num_tokens: int) -> object:
        """Build transformers' own cache from the blocks of the first `num_tokens` tokens."""
        from transformers import DynamicCache

        index = torch.tensor(self.block_ids[: -(-num_tokens // self.engine.block_size)], dtype=torch.int64)
        past = DynamicCache()
        if num_tokens:
            for layer, (keys, values) in enumerate(
                zip(self.engine.cache.keys, self.engine.cache.values, strict=True)
            ):
                past.update(
                    keys[index].flatten(0, 1)[:num_tokens].transpose(0, 1)[None],
                    values[index].flatten(0, 1)[:num_tokens].transpose(0, 1)[None],
                    layer,
                )
        return past

    def _write_back(self, past: object, first: int) -> None:
        """Scatter the KV of tokens from `first` on into the paged cache."""
        layers = past.layers  # type: ignore[attr-defined]
        total = int(layers[0].keys.shape[2])
        self._grow(total)
        size = self.engine.block_size
        positions = torch.arange(first, total)
        blocks = torch.tensor(self.block_ids, dtype=torch.int64)[positions // size]
        slots = positions % size
        for layer, cached in enumerate(layers):
            self.engine.cache.keys[layer][blocks, slots] = cached.keys[0, :, first:].transpose(0, 1)
            self.engine.cache.values[layer][blocks, slots] = cached.values[0, :, first:].transpose(0, 1)
        self.num_cached = total
