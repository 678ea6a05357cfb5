"""The contract that every profile's codec fulfils: KV tensors to streams and back.

A stream holds one tier block: a run of tokens, all layers, keys and values. Onboarding needs it in
steps (header, one layer group's chunks, one layer's KV), so decoding is a sequence of small calls;
`KvCodec.decode` strings them together for everybody else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dynamo_kvtc.codec.bitstream import StreamHeader
from dynamo_kvtc.codec.entropy import Buffer
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.header import ID_BYTES, MAX_POSITION, MAX_TOKENS
from dynamo_kvtc.errors import LayoutError

__all__ = ["BINDING_BYTES", "Buffer", "KvCodec", "TierBlock"]

#: Bytes of the binding: what ties a stream to the tier key it was stored under.
BINDING_BYTES = ID_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class TierBlock:
    """One tier block's KV, as an encoder takes it and a decoder returns it.

    Attributes
    ----------
    keys, values : torch.Tensor
        ``[tokens, num_layers, num_kv_heads, head_size]`` in the cache's dtype; keys with RoPE applied.
    first_position : int
        Position of the first token in its sequence; positions are consecutive.
    sink_tokens : int
        How many tokens at the block's start are attention sinks, kept at high precision.
    binding : bytes
        `BINDING_BYTES` bytes stored in the header; the reader compares them with what it asked for.
    """

    keys: torch.Tensor
    values: torch.Tensor
    first_position: int
    sink_tokens: int = 0
    binding: bytes = bytes(BINDING_BYTES)

    @property
    def num_tokens(self) -> int:
        """Tokens in the block."""
        return int(self.keys.shape[0])

    def check(self, geometry: KvGeometry) -> None:
        """Check that the block has a cache's shape and dtype and numbers that a header can carry.

        Raises
        ------
        LayoutError
            If it has not.
        """
        shape = (self.num_tokens, geometry.num_layers, geometry.num_kv_heads, geometry.head_size)
        for name, tensor in (("keys", self.keys), ("values", self.values)):
            if tuple(tensor.shape) != shape or tensor.dtype != geometry.torch_dtype:
                raise LayoutError(
                    f"the block's {name} are {tensor.dtype} {list(tensor.shape)}, the codec takes "
                    f"{geometry.torch_dtype} {list(shape)}"
                )
        if not 1 <= self.num_tokens <= MAX_TOKENS:
            raise LayoutError(f"a block of {self.num_tokens} tokens; streams hold 1 to {MAX_TOKENS}")
        if not 0 <= self.sink_tokens <= self.num_tokens:
            raise LayoutError(f"{self.sink_tokens} sink tokens in a block of {self.num_tokens} tokens")
        if not 0 <= self.first_position <= MAX_POSITION - self.num_tokens:
            raise LayoutError(f"a block at position {self.first_position}; positions end at {MAX_POSITION}")
        if len(self.binding) != BINDING_BYTES:
            raise LayoutError(f"a binding has {BINDING_BYTES} bytes, not {len(self.binding)}")


class KvCodec(ABC):
    """Encodes and decodes tier blocks under one profile. Thread-safe; holds no per-call state.

    Deterministic: on one machine, the same input and parameters give the same bytes, whatever the
    batch they come in.
    """

    geometry: KvGeometry
    layer_groups: tuple[LayerRange, ...]

    @abstractmethod
    def header_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return the exact size of a stream's header with its chunk table, known before encoding."""

    def max_header_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return an upper bound of the header of any stream that this codec can decode.

        Streams written with another plan or other settings may have other headers than its own.
        """
        return self.header_bytes(num_tokens, sink_tokens)

    @abstractmethod
    def max_stream_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return an upper bound, in bytes, of the stream of a tier block of `num_tokens` tokens."""

    def warm_up(self) -> None:  # noqa: B027  # most profiles have nothing to prepare
        """Make ready what the first encode and decode would otherwise wait for."""

    @abstractmethod
    def encode(self, blocks: Sequence[TierBlock]) -> list[bytes]:
        """Encode tier blocks, one stream each.

        Raises
        ------
        LayoutError
            If a block's shape or dtype is not the codec's.
        EncodeRangeError
            If a block holds NaN, infinity or values that the side data cannot carry.
        """

    @abstractmethod
    def read_header(self, data: Buffer, *, binding: bytes | None = None) -> StreamHeader:
        """Parse and verify a header (`data` may go on behind it).

        Raises
        ------
        BitstreamError
            The subclass that names the defect; `StreamMismatchError` for a sound stream of another
            artifact, geometry or binding.
        """

    @abstractmethod
    def open_group(self, header: StreamHeader, group: int, payload: Buffer) -> Any:
        """Verify, inflate and dequantise one layer group of one stream.

        Parameters
        ----------
        group : int
            Index into `layer_groups`.
        payload : Buffer
            The stream's bytes ``header.group_span(group)``, contiguous.

        Returns
        -------
        Any
            The profile's own intermediate (coefficients); hand it to `decode_layer`.

        Raises
        ------
        BitstreamError
            The subclass that names what is wrong with the group's chunks.
        """

    def join(self, parts: Sequence[Any]) -> list[Any]:
        """Join opened groups of consecutive tier blocks where that makes decoding their layers faster.

        Parameters
        ----------
        parts : Sequence
            What `open_group` returned for one layer group, in the order of the tokens.

        Returns
        -------
        list
            The same tokens for `decode_layer`, in fewer parts or as they were.
        """
        return list(parts)

    @abstractmethod
    def decode_layer(self, parts: Sequence[Any], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn the opened group of consecutive tier blocks into one layer's KV.

        Parameters
        ----------
        parts : Sequence
            What `open_group` or `join` returned, for the group that `layer` lies in.

        Returns
        -------
        tuple[torch.Tensor, torch.Tensor]
            Keys (RoPE applied) and values, ``[tokens of all parts, num_kv_heads, head_size]``, in the
            cache's dtype.
        """

    def group_of(self, layer: int) -> int:
        """Return the index of the layer group that holds `layer`.

        Raises
        ------
        IndexError
            If the model has no such layer.
        """
        for index, layers in enumerate(self.layer_groups):
            if layer in layers:
                return index
        raise IndexError(f"layer {layer} of {self.geometry.num_layers}")

    def decode(
        self, stream: Buffer, *, binding: bytes | None = None, device: torch.device | str = "cpu"
    ) -> TierBlock:
        """Decode a whole stream, onto `device`; the inverse of `encode` up to the profile's loss.

        Raises
        ------
        BitstreamError
            As `read_header` and `open_group` do.
        """
        header = self.read_header(stream, binding=binding)
        geometry = self.geometry
        shape = (header.num_tokens, geometry.num_layers, geometry.num_kv_heads, geometry.head_size)
        keys = torch.empty(shape, dtype=geometry.torch_dtype, device=device)
        values = torch.empty_like(keys)
        view = memoryview(stream)
        for index, layers in enumerate(self.layer_groups):
            first, stop = header.group_span(index)
            part = self.open_group(header, index, view[first:stop])
            for layer in range(layers.first, layers.stop):
                keys[:, layer], values[:, layer] = self.decode_layer([part], layer)
        return TierBlock(keys, values, header.first_position, header.sink_tokens, header.binding)
