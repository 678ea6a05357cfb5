"""XXH3-64 of stored chunks where they lie on the device, and whether the padding behind them is zero.

One warp a chunk. Eight sums of 64 bits run over its stripes of 64 bytes; the 16 stripes of a block of 1,024
bytes add up in any order, so a block is one load and one sum over the warp. Only what stirs the sums behind
each block is a chain; the next block is under way meanwhile. Arithmetic of 64 bits wraps.

Chunks of up to `SHORTEST` - 1 bytes have other formulas, three of them. They are few and small: whoever has
some brings them to the host.

CPU reference: the package xxhash (seed 0).
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice

__all__ = ["CHECKSUM", "PADDING", "SHORTEST", "check_chunks", "make_keys"]

#: Bytes of the shortest chunk that the kernel takes.
SHORTEST = 241

#: Bits of what is wrong with a chunk.
CHECKSUM, PADDING = 1, 2

# The algorithm's own secret.
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)

_PRIME32_1, _PRIME32_2, _PRIME32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_PRIME64_1, _PRIME64_2, _PRIME64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_PRIME64_4, _PRIME64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5

#: What the eight sums begin with.
_FIRST = (
    _PRIME32_3, _PRIME64_1, _PRIME64_2, _PRIME64_3, _PRIME64_4, _PRIME32_2, _PRIME64_5, _PRIME32_1,
)  # fmt: skip

# Words of 64 bits in a stripe, stripes in a block; the stirring's factor, the end's.
_WORDS = tl.constexpr(8)
_STRIPES = tl.constexpr(16)
_STIR = tl.constexpr(_PRIME32_1)
_LENGTH = tl.constexpr(_PRIME64_1)
_AVALANCHE = tl.constexpr(0x165667919E3779F9)

# Where keys are in the table: of the stripes (stripe s has words s to s + 7) and of the stirring (words 16 to
# 23 of the same), of the last stripe, of the end; then the sums' first values.
_STIR_KEYS = tl.constexpr(16)
_LAST_KEYS = tl.constexpr(24)
_END_KEYS = tl.constexpr(32)
_FIRST_SUMS = tl.constexpr(40)

_CHECKSUM = tl.constexpr(CHECKSUM)
_PADDING = tl.constexpr(PADDING)


@triton.jit
def _in_pairs(words, ROWS: tl.constexpr):
    """Part words ``[ROWS, 8]`` into those at even and at odd places, ``[ROWS, 4]`` each."""
    return tl.split(tl.reshape(words, (ROWS, _WORDS // 2, 2)))


@triton.jit
def _products(words, keys):
    mixed = words ^ keys
    return (mixed & 0xFFFFFFFF) * (mixed >> 32)


@triton.jit
def _add(even, odd, words, even_keys, odd_keys, used, ROWS: tl.constexpr):
    """Add stripes ``[ROWS, 8]``: a word goes to its neighbour's sum, its product to its own."""
    even_words, odd_words = _in_pairs(words, ROWS)
    even_terms = tl.where(used, _products(even_words, even_keys) + odd_words, 0)
    odd_terms = tl.where(used, _products(odd_words, odd_keys) + even_words, 0)
    return even + tl.sum(even_terms, 0), odd + tl.sum(odd_terms, 0)


@triton.jit
def _stirred(sums, keys):
    return (sums ^ (sums >> 47) ^ keys) * _STIR


@triton.jit
def _load_pairs(keys):
    place = 2 * tl.arange(0, _WORDS // 2)
    return tl.load(keys + place), tl.load(keys + place + 1)


@triton.jit(do_not_specialize=["num_chunks"])
def _check_kernel(
    data,
    chunks,  # int64 [chunks, 3]: first byte, bytes, checksum
    keys,  # uint64 [48]
    faults,  # int32 [chunks]
    num_chunks,
):
    lane = tl.arange(0, _WORDS)
    stripe = tl.arange(0, _STRIPES)
    even_keys, odd_keys = _in_pairs(tl.load(keys + stripe[:, None] + lane[None, :]), _STRIPES)
    even_stir, odd_stir = _load_pairs(keys + _STIR_KEYS)
    even_end, odd_end = _load_pairs(keys + _END_KEYS)
    last_keys = tl.load(keys + _LAST_KEYS + lane)
    even_last, odd_last = _in_pairs(last_keys[None, :], 1)
    even_first, odd_first = _load_pairs(keys + _FIRST_SUMS)
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        entry = chunks + chunk * 3
        source = data + tl.multiple_of(tl.load(entry), 16)
        size = tl.load(entry + 1).to(tl.int32)
        # The last stripe ends with the chunk and overlaps those before it: it is added at the end.
        stripes = (size - 1) // 64
        blocks = (size - 1) // 1024
        words = source.to(tl.pointer_type(tl.uint64)) + stripe[:, None] * _WORDS + lane[None, :]
        ahead = tl.load(words, mask=(stripe < stripes)[:, None], other=0)
        even, odd = even_first, odd_first
        for block in range(blocks):
            found = ahead
            used = (block + 1) * _STRIPES + stripe < stripes
            ahead = tl.load(words + (block + 1) * _STRIPES * _WORDS, mask=used[:, None], other=0)
            even, odd = _add(even, odd, found, even_keys, odd_keys, True, _STRIPES)
            even, odd = _stirred(even, even_stir), _stirred(odd, odd_stir)
        used = blocks * _STRIPES + stripe < stripes
        even, odd = _add(even, odd, ahead, even_keys, odd_keys, used[:, None], _STRIPES)
        # It may begin anywhere.
        at = tl.arange(0, 8)
        single = tl.load(source + size - 64 + 8 * lane[:, None] + at[None, :]).to(tl.uint64)
        last = tl.sum(single << (8 * at[None, :]).to(tl.uint64), 1)
        even, odd = _add(even, odd, last[None, :], even_last, odd_last, True, 1)
        left, right = even ^ even_end, odd ^ odd_end
        folded = (left * right) ^ tl.umulhi(left, right)
        value = tl.sum(folded, 0) + size.to(tl.uint64) * _LENGTH
        value = (value ^ (value >> 37)) * _AVALANCHE
        value = value ^ (value >> 32)
        wrong = value != tl.load(entry + 2).to(tl.uint64, bitcast=True)
        behind = size + tl.arange(0, 16)
        padding = tl.load(source + behind, mask=behind < (size + 15) // 16 * 16, other=0)
        stray = tl.sum(padding.to(tl.int32), 0) != 0
        tl.store(faults + chunk, tl.where(wrong, _CHECKSUM, 0) + tl.where(stray, _PADDING, 0))


def make_keys(gpu: GpuDevice) -> torch.Tensor:
    """Return what `check_chunks` needs of the secret, on the device: uint64 ``[48]``."""
    table = [np.frombuffer(_SECRET, "<u8", count, start) for start, count in ((0, 24), (121, 8), (11, 8))]
    table.append(np.array(_FIRST, np.uint64))
    return gpu.upload(torch.from_numpy(np.concatenate(table)))


def check_chunks(
    gpu: GpuDevice, data: torch.Tensor, chunks: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Hold chunks against their checksums.

    Parameters
    ----------
    data : torch.Tensor
        uint8, which begins at a multiple of 16 bytes: the chunks, each with zeros up to the next multiple of
        16 bytes.
    chunks : torch.Tensor
        int64 ``[chunks, 3]``: first byte (a multiple of 16), bytes (`SHORTEST` or more, below 2 GiB), and
        the checksum's bits.
    keys : torch.Tensor
        What `make_keys` returned.

    Returns
    -------
    torch.Tensor
        int32 ``[chunks]``: 0, or `CHECKSUM` and `PADDING`, what is wrong.
    """
    count = chunks.shape[0]
    faults = torch.empty(count, dtype=torch.int32, device=data.device)
    if count:
        _check_kernel[gpu.grid(count, gpu.STREAMING)](
            data, chunks, keys, faults, count, num_warps=1, num_stages=1
        )
    return faults
