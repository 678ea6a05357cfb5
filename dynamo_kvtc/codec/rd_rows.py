"""Rows of symbols of one class, a row per component, to bytes and back, for `rd_packing`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dynamo_kvtc.codec.rd_plan import SymbolClass
from dynamo_kvtc.errors import PayloadError, ReservedBitsError

__all__ = ["pack_rows", "row_bytes", "unpack_rows"]

#: Symbols of consecutive tokens in one byte, by class; WIDE takes two bytes a symbol.
_PER_BYTE = {SymbolClass.BYTE: 1, SymbolClass.NIBBLE: 2, SymbolClass.TRIT: 5}

#: Five digits of each byte in base 3, the first the lowest, as symbols: 0, 1 and -1.
_TRITS = (np.arange(256)[:, None] // 3 ** np.arange(5) % 3).astype(np.int8)
_TRITS[_TRITS == 2] = -1
_MAX_TRIT_BYTE = 3**5 - 1


def row_bytes(symbol_class: SymbolClass, tokens: int) -> int:
    """Return the bytes of one component's symbols."""
    if symbol_class is SymbolClass.WIDE:
        return 2 * tokens
    return -(-tokens // _PER_BYTE[symbol_class])


def pack_rows(symbols: NDArray[np.int16], symbol_class: SymbolClass) -> NDArray[np.uint8]:
    """Return the bytes of symbols ``[components, tokens]`` within the class's limit: uint8, one dimension."""
    if symbol_class is SymbolClass.WIDE:
        low = symbols.astype(np.int8)
        high = ((symbols - low) >> 8).astype(np.int8)
        planes: NDArray[np.uint8] = np.concatenate([high.reshape(-1), low.reshape(-1)]).view(np.uint8)
        return planes
    narrow = symbols.astype(np.int8)
    if symbol_class is SymbolClass.BYTE:
        data: NDArray[np.uint8] = narrow.reshape(-1).view(np.uint8)
        return data
    per_byte = _PER_BYTE[symbol_class]
    digits = np.zeros((symbols.shape[0], row_bytes(symbol_class, symbols.shape[1]) * per_byte), np.uint8)
    base = 16 if symbol_class is SymbolClass.NIBBLE else 3
    # Negative symbols are counted from the base downwards; their shifted sign has all bits set.
    digits[:, : symbols.shape[1]] = narrow + ((narrow >> 7) & base)
    packed = digits[:, per_byte - 1 :: per_byte].copy()
    for place in range(per_byte - 2, -1, -1):
        packed = packed * np.uint8(base) + digits[:, place::per_byte]
    joined: NDArray[np.uint8] = packed.reshape(-1)
    return joined


def unpack_rows(
    data: NDArray[np.uint8], symbol_class: SymbolClass, components: int, tokens: int
) -> NDArray[np.int16]:
    """Undo `pack_rows`: int16 ``[components, tokens]``.

    Raises
    ------
    PayloadError
        If a byte is none that an encoder writes.
    ReservedBitsError
        If a symbol behind the last token is not 0.
    """
    if symbol_class is SymbolClass.WIDE:
        high, low = data.view(np.int8).reshape(2, components, tokens)
        return _within_limit((high.astype(np.int16) << 8) + low, symbol_class)
    if symbol_class is SymbolClass.BYTE:
        return _within_limit(data.view(np.int8).reshape(components, tokens), symbol_class)
    rows = data.reshape(components, row_bytes(symbol_class, tokens))
    symbols = np.empty((*rows.shape, _PER_BYTE[symbol_class]), dtype=np.int8)
    if symbol_class is SymbolClass.NIBBLE:
        symbols[..., 0] = (rows << 4).view(np.int8) >> 4
        symbols[..., 1] = rows.view(np.int8) >> 4
    else:
        if (rows > _MAX_TRIT_BYTE).any():
            raise PayloadError(f"five symbols in a byte give at most {_MAX_TRIT_BYTE}; drop the stream")
        symbols[...] = _TRITS[rows]
    flat = symbols.reshape(components, rows.shape[1] * symbols.shape[2])
    if flat[:, tokens:].any():
        raise ReservedBitsError("symbols behind the last token are not 0; drop the stream")
    return _within_limit(flat[:, :tokens], symbol_class)


def _within_limit(
    symbols: NDArray[np.int8] | NDArray[np.int16], symbol_class: SymbolClass
) -> NDArray[np.int16]:
    """Refuse the one pattern of two's complement that has no positive counterpart."""
    if symbol_class is not SymbolClass.TRIT and (symbols < -symbol_class.limit).any():
        raise PayloadError(f"a symbol is below -{symbol_class.limit}; drop the stream")
    return symbols.astype(np.int16, copy=False)
