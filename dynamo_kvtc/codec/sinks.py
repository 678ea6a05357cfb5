"""Attention sinks: a few leading tokens, kept apart at high precision.

The first tokens of a sequence draw attention from everywhere and have unusual keys and values;
compressing them collapses accuracy (KVTC, section 3.4). Their keys are stored as they lie in the cache,
with RoPE applied.

With 16 bits a payload is the cache's own bytes ``[side][layer][token][head][channel]``, keys before
values. With 8 bits it is float32 scales ``[side][layer][token][head]``, ``max|x| / 448`` each, then
E4M3FN numbers ``[side][layer][token][head][channel]``.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.packing import CHUNK_BYTES
from dynamo_kvtc.codec.quantiser import E4M3_MAX, e4m3_to_float, float_to_e4m3
from dynamo_kvtc.errors import ChunkTableError, EncodeRangeError, PayloadError

__all__ = ["SinkCodec"]


class SinkCodec:
    """Sinks of the layer groups of one cache to payloads and back.

    Parameters
    ----------
    geometry : KvGeometry
        Shape and dtype of the cache.
    bits : int
        8 or 16, bits of an element.
    """

    def __init__(self, geometry: KvGeometry, bits: int) -> None:
        self._geometry = geometry
        self._bits = bits

    def payload_size(self, layers: int, sink_tokens: int) -> int:
        """Return the bytes of the payload of some layers' sinks."""
        heads = 2 * layers * sink_tokens * self._geometry.num_kv_heads
        if self._bits == 8:
            return heads * (4 + self._geometry.head_size)
        return heads * self._geometry.head_size * self._geometry.torch_dtype.itemsize

    def chunk_sizes(self, layers: int, sink_tokens: int) -> tuple[int, ...]:
        """Return the plain sizes of the chunks that the encoder cuts the payload into."""
        full, rest = divmod(self.payload_size(layers, sink_tokens), CHUNK_BYTES)
        return (CHUNK_BYTES,) * full + ((rest,) if rest else ())

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> NDArray[np.uint8]:
        """Return the payload of sinks ``[tokens, layers, num_kv_heads, head_size]`` in the cache's dtype.

        Raises
        ------
        EncodeRangeError
            If they hold NaN or infinity.
        """
        sinks = torch.stack((keys, values)).transpose(1, 2).contiguous()
        if not torch.isfinite(sinks).all():
            raise EncodeRangeError("the KV of the sink tokens holds NaN or infinity; keep this block raw")
        if self._bits == 16:
            return _bytes(sinks)
        sinks = sinks.float()
        scales = sinks.abs().amax(-1) / E4M3_MAX
        scaled = sinks / scales.masked_fill(scales == 0, torch.inf).unsqueeze(-1)
        return np.concatenate([_bytes(scales), _bytes(float_to_e4m3(scaled))])

    def decode(
        self, payload: NDArray[np.uint8], layers: int, sink_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values, ``[layers, tokens, num_kv_heads, head_size]`` each, in the cache's dtype.

        Raises
        ------
        ChunkTableError
            If the payload has another size than these sinks take.
        PayloadError
            If it holds NaN or infinity, which no encoder writes.
        """
        size = self.payload_size(layers, sink_tokens)
        if payload.size != size:
            raise ChunkTableError(f"the sinks have {payload.size} payload bytes instead of {size}")
        dtype = self._geometry.torch_dtype
        shape = (2, layers, sink_tokens, self._geometry.num_kv_heads, self._geometry.head_size)
        data = torch.from_numpy(payload)
        if self._bits == 16:
            sinks = data.view(dtype).view(shape)
        else:
            border = 4 * (size // (4 + self._geometry.head_size))
            scales = data[:border].view(torch.float32).view(shape[:-1])
            patterns = data[border:].view(shape)
            if (patterns & 0x7F == 0x7F).any():
                raise PayloadError("the sinks hold NaN; drop the stream")
            sinks = (e4m3_to_float(patterns) * scales.unsqueeze(-1)).to(dtype)
        if not torch.isfinite(sinks).all():
            raise PayloadError("the sinks hold NaN or infinity; drop the stream")
        return sinks[0], sinks[1]


def _bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    data: NDArray[np.uint8] = tensor.flatten().view(torch.uint8).numpy()
    return data
