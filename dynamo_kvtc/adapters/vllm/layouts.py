"""vLLM's cache tensors as a `PagedKvCache`, whatever order their elements have.

vLLM gives one tensor per layer, ``[blocks, heads, tokens, 2 * head_size]`` with strides of its own. On GPUs
a token's keys precede its values. On CPUs all keys of a page and head precede its values, and both are
rearranged for the instruction set; how is found by writing numbers through vLLM's own operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig

from dynamo_kvtc.adapters.vllm.settings import attention_spec
from dynamo_kvtc.errors import LayoutError
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.pipeline.permuted import PermutedKvCache

__all__ = ["SPLIT_BACKENDS", "cpu_writer", "discover_places", "ordered_layers", "paged_cache"]

#: GPU backends that lay out a page's content as a token's keys, then its values.
SPLIT_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")

#: Integers up to this are exact in every cache dtype; one digit of an element's number.
_DIGIT = 255

#: Writes keys and values ``[block_size, heads, head_size]`` into block 1 of a two-block cache.
Writer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def ordered_layers(kv_caches: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Return layer names and vLLM's tensors in the model's order, without those that share another's."""
    seen: set[int] = set()
    layers = []
    for name in sorted(kv_caches, key=extract_layer_index):
        place = kv_caches[name].data_ptr()
        if place not in seen:
            seen.add(place)
            layers.append((name, kv_caches[name]))
    return layers


def paged_cache(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, layers: Sequence[tuple[str, torch.Tensor]]
) -> PagedKvCache:
    """Build the view of vLLM's cache.

    Parameters
    ----------
    layers : Sequence[tuple[str, torch.Tensor]]
        What `ordered_layers` returned: ``[blocks, heads, tokens, 2 * head_size]`` each.

    Raises
    ------
    LayoutError
        If the tensors are not laid out in a way that is known.
    """
    spec = attention_spec(kv_cache_config)
    tensors = [tensor for _, tensor in layers]
    expected = (kv_cache_config.num_blocks, spec.num_kv_heads, spec.block_size, 2 * spec.head_size)
    for name, tensor in layers:
        if tuple(tensor.shape) != expected:
            raise LayoutError(
                f"the cache of layer {name} has the shape {tuple(tensor.shape)}, not {expected} (blocks, "
                "heads, tokens, keys and values); if the attention kernel has smaller blocks than "
                "--block-size, set --block-size to the kernel's"
            )
    backend = _backend(vllm_config, layers[0][0])
    if backend == "CPU_ATTN":
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise LayoutError("vLLM's CPU cache is expected to be contiguous; this layout is not supported")
        keys, values = discover_places(
            spec.block_size, spec.num_kv_heads, spec.head_size, spec.dtype, cpu_writer(spec)
        )
        return PermutedKvCache([tensor.view(tensor.shape[0], -1) for tensor in tensors], keys, values)
    if backend not in SPLIT_BACKENDS:
        raise LayoutError(
            f"the cache layout of attention backend {backend} is not known; use one of "
            f"{', '.join(SPLIT_BACKENDS)} (--attention-backend)"
        )
    halves = [torch.split(tensor.transpose(1, 2), spec.head_size, dim=-1) for tensor in tensors]
    return PagedKvCache([keys for keys, _ in halves], [values for _, values in halves])


def cpu_writer(spec: FullAttentionSpec) -> Writer:
    """Return what writes into a CPU cache as vLLM's own attention does."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(spec.dtype, spec.block_size, spec.head_size)

    def write(cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        blocks, heads, block_size, _ = cache.shape
        halves = cache.view(blocks, heads, 2 * block_size, -1).chunk(2, dim=2)
        slots = torch.arange(block_size, 2 * block_size, dtype=torch.int64)
        ops.cpu_attn_reshape_and_cache(keys, values, *halves, slots, isa)

    return write


def discover_places(
    block_size: int, heads: int, head_size: int, dtype: torch.dtype, write: Writer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find where in a page each element of keys and values lies.

    The elements are numbered and the numbers written digit by digit, so that each is exact in the cache's
    dtype; elements that a write did not reach stay zero.

    Returns
    -------
    tuple[torch.Tensor, torch.Tensor]
        For keys and values, ``[block_size, heads, head_size]``, int64.

    Raises
    ------
    LayoutError
        If some element is not found in exactly one place of its own page.
    """
    shape = (block_size, heads, head_size)
    count = block_size * heads * head_size
    numbers = torch.arange(count)
    places = []
    for side in range(2):
        found = torch.zeros(2 * count, dtype=torch.int64)
        written: torch.Tensor | None = None
        weight = 1
        while weight == 1 or weight <= count:
            digits = ((numbers // weight) % _DIGIT + 1).to(dtype).reshape(shape)
            blank = torch.zeros_like(digits)
            cache = torch.zeros((2, heads, block_size, 2 * head_size), dtype=dtype)
            write(cache, *((digits, blank) if side == 0 else (blank, digits)))
            if cache[0].any():
                raise LayoutError("vLLM's cache operator writes outside of a block's page; not supported")
            page = cache[1].flatten().to(torch.int64)
            if written is None:
                written = page > 0
            found += torch.where(written, (page - 1) * weight, 0)
            weight *= _DIGIT
        assert written is not None
        where = written.nonzero().flatten()
        order = found[where]
        if not torch.equal(order.sort().values, numbers):
            raise LayoutError(
                "vLLM's cache operator does not put every element into one place; not supported"
            )
        side_places = torch.empty(count, dtype=torch.int64)
        side_places[order] = where
        places.append(side_places.reshape(shape))
    return places[0], places[1]


def _backend(vllm_config: VllmConfig, layer_name: str) -> str:
    layer: Any = vllm_config.compilation_config.static_forward_context[layer_name]
    return str(layer.attn_backend.get_name())
