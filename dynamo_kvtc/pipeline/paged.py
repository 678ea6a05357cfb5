"""A view of an engine's paged KV cache (tier G1): gather tier blocks, scatter layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynamo_kvtc.codec.geometry import CACHE_DTYPES, KvGeometry
from dynamo_kvtc.errors import LayoutError

__all__ = ["LAYOUTS", "PagedKvCache"]

#: How one layer's tensor orders its axes: 2 = keys then values, B = blocks, N = tokens of a block,
#: H = KV heads, D = channels of a head.
LAYOUTS: tuple[str, ...] = ("2BNHD", "2BHND", "B2NHD", "B2HND")


class PagedKvCache:
    """Per-layer views ``[blocks, block_size, heads, head_size]`` of an engine's own tensors.

    Copies nothing and owns nothing: the engine guarantees that blocks handed to `gather` are not
    written, and blocks handed to `scatter_layer` are not read, until the call is over.

    Parameters
    ----------
    keys, values : Sequence[torch.Tensor]
        One view per layer, all of the same shape and dtype.

    Raises
    ------
    LayoutError
        If the views differ in shape or dtype, or their dtype cannot be encoded.
    """

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        tensors = [*keys, *values]
        if not keys or len(keys) != len(values):
            raise LayoutError("a paged cache needs one key view and one value view per layer")
        shape = tensors[0].shape
        if len(shape) != 4 or any(t.shape != shape for t in tensors):
            raise LayoutError(
                "all layers must be [blocks, block_size, heads, head_size] views of one shape and dtype; "
                "hybrid and MLA caches are not supported"
            )
        self.keys = tuple(keys)
        self.values = tuple(values)
        self._describe(tensors, len(keys), shape)

    def _describe(self, tensors: Sequence[torch.Tensor], num_layers: int, shape: Sequence[int]) -> None:
        """Set what a cache with these tensors, ``[blocks, block_size, heads, head_size]``, is like."""
        self._device, dtype = tensors[0].device, tensors[0].dtype
        if any(tensor.dtype != dtype or tensor.device != self._device for tensor in tensors):
            raise LayoutError("all layers must have one dtype and lie on one device")
        names = [name for name, known in CACHE_DTYPES.items() if known == dtype]
        if not names:
            raise LayoutError(f"cannot encode a cache of {dtype}; supported: {', '.join(CACHE_DTYPES)}")
        self.num_blocks, self.block_size = int(shape[0]), int(shape[1])
        self.geometry = KvGeometry(num_layers, int(shape[2]), int(shape[3]), names[0])
        self._fence: torch.cuda.Event | None = None

    @property
    def device(self) -> torch.device:
        """Where the cache lies."""
        return self._device

    @property
    def has_views(self) -> bool:
        """Whether `views` exist: not where a page's elements lie in an order that strides do not express."""
        return True

    @property
    def views(self) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Keys and values ``[blocks, block_size, heads, head_size]``, one view per layer.

        Raises
        ------
        LayoutError
            If there are none.
        """
        return self.keys, self.values

    @property
    def fenced(self) -> torch.cuda.Event | None:
        """What the latest `fence` stands for; None where there was none, or nothing to wait for."""
        return self._fence

    @classmethod
    def from_layers(cls, layers: Sequence[torch.Tensor], layout: str) -> PagedKvCache:
        """Build the views from per-layer tensors that hold keys and values together.

        Parameters
        ----------
        layers : Sequence[torch.Tensor]
            One 5-dimensional tensor per layer.
        layout : str
            One of `LAYOUTS`.

        Raises
        ------
        LayoutError
            If the layout is not known, or the layers do not have its axes.
        """
        if layout not in LAYOUTS:
            raise LayoutError(f"unknown cache layout {layout!r}; supported: {', '.join(LAYOUTS)}")
        if any(layer.ndim != 5 or layer.shape[layout.index("2")] != 2 for layer in layers):
            raise LayoutError(f"layers do not have the axes of layout {layout}")
        order = [layout.index(axis) for axis in "2BNHD"]
        views = [layer.permute(order) for layer in layers]
        return cls([view[0] for view in views], [view[1] for view in views])

    def stream(self) -> torch.cuda.Stream | None:
        """Return the calling thread's stream on the cache's device; None on a CPU."""
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

    def fence(self) -> None:
        """Make gathers and scatters of later calls wait for what this thread has asked its device to do.

        To be called by the engine's thread before it hands over blocks, when its work on them (writes before
        an offload, reads before an onboard) is queued and not yet done. Waits for nothing. On a CPU there is
        nothing to be done.
        """
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._fence = event

    def _after_fence(self) -> None:
        fence = self._fence
        if fence is not None:
            torch.cuda.current_stream(self._device).wait_event(fence)

    def _settle(self) -> None:
        """Wait until the device has done what this thread asked it to do."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def check_blocks(self, block_ids: Sequence[int]) -> None:
        """Raise `LayoutError` if a block id lies outside the cache."""
        if block_ids and not (min(block_ids) >= -1 and max(block_ids) < self.num_blocks):
            raise LayoutError(f"block ids must lie in 0..{self.num_blocks - 1} (or be -1 to skip a block)")

    def gather(self, block_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy blocks out.

        Returns
        -------
        tuple[torch.Tensor, torch.Tensor]
            Keys and values ``[len(block_ids) * block_size, num_layers, num_kv_heads, head_size]``.
        """
        index = torch.as_tensor(block_ids, dtype=torch.int64, device=self._device)
        geometry = self.geometry
        tokens = len(block_ids) * self.block_size
        shape = (tokens, geometry.num_layers, geometry.num_kv_heads, geometry.head_size)
        keys = torch.empty(shape, dtype=geometry.torch_dtype, device=self._device)
        values = torch.empty_like(keys)
        self._after_fence()
        for layer in range(geometry.num_layers):
            self._read(layer, index, keys[:, layer], values[:, layer])
        self._settle()
        return keys, values

    def _read(self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy blocks of a layer into ``[blocks * block_size, heads, head_size]`` views."""
        keys.copy_(self.keys[layer][index].flatten(0, 1))
        values.copy_(self.values[layer][index].flatten(0, 1))

    def scatter_layer(
        self, layer: int, block_ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Write one layer's KV into blocks.

        Parameters
        ----------
        block_ids : Sequence[int]
            Destination of each run of `block_size` tokens; -1 leaves a run out.
        keys, values : torch.Tensor
            ``[len(block_ids) * block_size, num_kv_heads, head_size]``.
        """
        geometry = self.geometry
        shape = (len(block_ids), self.block_size, geometry.num_kv_heads, geometry.head_size)
        wanted = [run for run, block in enumerate(block_ids) if block >= 0]
        index = torch.as_tensor([block_ids[run] for run in wanted], dtype=torch.int64, device=self._device)
        keys, values = keys.reshape(shape), values.reshape(shape)
        if len(wanted) < len(block_ids):
            keys, values = keys[wanted], values[wanted]
        self._after_fence()
        self._write(layer, index, keys, values)
        self._settle()

    def _write(self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy ``[blocks, block_size, heads, head_size]`` into blocks of a layer."""
        self.keys[layer][index] = keys.to(self._device)
        self.values[layer][index] = values.to(self._device)
