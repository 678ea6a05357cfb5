"""Rows of symbols of one class, a row per component, to bytes and back, for `rd_packing`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dynamo_kvtc.codec.rd_plan import SymbolClass
from dynamo_kvtc.errors import PayloadError, ReservedBitsError

__all__ = ["pack_rows", "row_bytes", "unpack_rows"]

#: Symbols of consecutive tokens in one byte, by class; WIDE takes two bytes a symbol.
_PER_BYTE = {SymbolClass.BYTE: 1, SymbolClass.NIBBLE: 2, SymbolClass.TRIT: 5}

#: Number system of a byte's symbols: the first is the lowest digit, those below 0 count down from the base.
_BASE = {SymbolClass.NIBBLE: 16, SymbolClass.TRIT: 3}

_MAX_TRIT_BYTE = 3**5 - 1


def _symbols_of_bytes(symbol_class: SymbolClass) -> NDArray[np.int8]:
    """Return the symbols of all 256 bytes: ``[256, symbols of a byte]``."""
    base = _BASE[symbol_class]
    digits = np.arange(256)[:, None] // base ** np.arange(_PER_BYTE[symbol_class]) % base
    return np.where(2 * digits < base, digits, digits - base).astype(np.int8)


_SYMBOLS = {symbol_class: _symbols_of_bytes(symbol_class) for symbol_class in _BASE}


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
    if symbol_class is SymbolClass.BYTE:
        data: NDArray[np.uint8] = symbols.astype(np.int8).reshape(-1).view(np.uint8)
        return data
    (components, tokens), per_byte = symbols.shape, _PER_BYTE[symbol_class]
    digits = np.empty((components, row_bytes(symbol_class, tokens) * per_byte), dtype=np.int8)
    digits[:, :tokens] = symbols
    digits[:, tokens:] = 0
    # The shifted sign of a negative symbol has all bits set.
    digits += digits >> 7 & _BASE[symbol_class]
    if symbol_class is SymbolClass.NIBBLE:
        pairs = digits.view("<u2")
        halves: NDArray[np.uint8] = (pairs | pairs >> 4).astype(np.uint8)
        return halves.reshape(-1)
    packed = digits[:, per_byte - 1 :: per_byte].view(np.uint8)
    for place in range(per_byte - 2, -1, -1):
        packed = packed * np.uint8(_BASE[symbol_class])
        packed += digits[:, place::per_byte].view(np.uint8)
    return packed.reshape(-1)


def unpack_rows(data: NDArray[np.uint8], symbol_class: SymbolClass, symbols: NDArray[np.int16]) -> None:
    """Undo `pack_rows`: write `symbols`, ``[components, tokens]``.

    Raises
    ------
    PayloadError
        If a byte is none that an encoder writes.
    ReservedBitsError
        If a symbol behind the last token is not 0.
    """
    components, tokens = symbols.shape
    if symbol_class is SymbolClass.WIDE:
        high, low = data.view(np.int8).reshape(2, components, tokens)
        np.left_shift(high, 8, out=symbols, dtype=np.int16)
        symbols += low
    elif symbol_class is SymbolClass.BYTE:
        symbols[...] = data.view(np.int8).reshape(components, tokens)
    else:
        if symbol_class is SymbolClass.TRIT and data.max(initial=0) > _MAX_TRIT_BYTE:
            raise PayloadError(f"five symbols in a byte give at most {_MAX_TRIT_BYTE}; drop the stream")
        width = row_bytes(symbol_class, tokens) * _PER_BYTE[symbol_class]
        rows = _SYMBOLS[symbol_class].take(data, axis=0).reshape(components, width)
        if rows[:, tokens:].any():
            raise ReservedBitsError("symbols behind the last token are not 0; drop the stream")
        symbols[...] = rows[:, :tokens]
    # The one pattern of two's complement that has no positive counterpart.
    if symbols.min(initial=0) < -symbol_class.limit:
        raise PayloadError(f"a symbol is below -{symbol_class.limit}; drop the stream")
