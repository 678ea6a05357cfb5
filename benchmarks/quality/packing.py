"""What the streams of ``rd`` take beyond the order-0 entropy of their symbols, on held-out text.

The yardstick is the ideal static code: for each component, and for the tokens' levels, the entropy of one
histogram over all documents that are measured, so no code whose statistics are the artifact's is shorter. It
is held against everything that the sections of keys and values take in a stream: chunks, their padding and
their rows in the chunk table. Sinks and the rest of the header are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.quality import RECENT_WINDOW, SINK_TOKENS
from benchmarks.quality.tasks.base import Document
from dynamo_kvtc.calibration.model_cache import prefill
from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.cli.output import make_table
from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.bitstream import read_section
from dynamo_kvtc.codec.header import CHUNK_ENTRY_BYTES, SectionKind, StreamHeader, align
from dynamo_kvtc.codec.rd import RdCodec
from dynamo_kvtc.codec.rd_packing import RdLayout, unpack
from dynamo_kvtc.errors import EncodeRangeError, EvaluationError

__all__ = ["Packed", "measure_packing", "packing_table"]

_KINDS = (SectionKind.KEYS, SectionKind.VALUES)


@dataclass(frozen=True, slots=True)
class Packed:
    """One plan with one size of tier blocks.

    Attributes
    ----------
    nominal_ratio, ratio : float
        What the plan is for, and what whole streams reached here.
    tier_block_tokens, tokens : int
        Tokens of a stream, and of all that were measured.
    entropy_bytes : float
        The yardstick.
    stored_bytes, side_bytes : int
        What sections take in all, and how much of it is padding and rows of the chunk table.
    refused : int
        Tokens of blocks that the codec refused, because they are too unlike what it was calibrated on; they
        count nowhere else.
    """

    nominal_ratio: float
    ratio: float
    tier_block_tokens: int
    tokens: int
    entropy_bytes: float
    stored_bytes: int
    side_bytes: int
    refused: int

    @property
    def excess(self) -> float:
        """What is stored over the yardstick, less one."""
        return self.stored_bytes / self.entropy_bytes - 1


def measure_packing(
    loaded: LoadedModel,
    codecs: Sequence[tuple[float, RdCodec]],
    documents: Sequence[Document],
    block_sizes: Sequence[int],
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[Packed]:
    """Measure some plans.

    Parameters
    ----------
    codecs : Sequence[tuple[float, RdCodec]]
        Nominal ratio and codec of each plan.
    documents : Sequence[Document]
        Their contexts, without the recent window, are encoded.
    block_sizes : Sequence[int]
        Tokens of one stream.
    on_step : Callable[[int, int], None]
        Called with the documents done and all documents.

    Raises
    ------
    EvaluationError
        If a codec refuses all blocks.
    """
    counts = {(size, nominal): _Counts() for size in block_sizes for nominal, _ in codecs}
    for done, document in enumerate(documents):
        on_step(done, len(documents))
        with torch.inference_mode():
            keys, values = prefill(loaded, document.context)
        stop = keys.shape[0] - RECENT_WINDOW
        for size in block_sizes:
            blocks = list(_blocks(keys[:stop], values[:stop], size))
            for nominal, codec in codecs:
                for block in blocks:
                    counts[size, nominal].add(codec, block)
    on_step(len(documents), len(documents))
    if any(one.is_empty for one in counts.values()):
        raise EvaluationError("the codec refuses all of this text; recalibrate on text more like it")
    return [one.result(nominal, size, loaded) for (size, nominal), one in counts.items()]


def packing_table(found: Sequence[Packed], entropy: str) -> Table:
    """Return a line for each plan and size of blocks; `entropy` names the coder."""
    lines = [
        (
            f"{one.nominal_ratio:g}x",
            f"{one.ratio:.1f}x",
            str(one.tier_block_tokens),
            f"{one.excess:.1%}",
            f"{one.side_bytes / one.entropy_bytes:.1%}",
        )
        for one in found
    ]
    columns = ("plan", "ratio", "tokens a stream", "above entropy", "of it table and padding")
    return make_table(f"{entropy} against order-0 entropy", columns, lines)


def _blocks(keys: torch.Tensor, values: torch.Tensor, size: int) -> Iterator[TierBlock]:
    for first in range(0, keys.shape[0], size):
        part = slice(first, first + size)
        yield TierBlock(keys[part], values[part], first, SINK_TOKENS if first == 0 else 0)


class _Counts:
    """Histograms and bytes of one plan's streams so far."""

    def __init__(self) -> None:
        self._symbols: dict[tuple[int, SectionKind], list[NDArray[np.int16]]] = {}
        self._levels: dict[tuple[int, SectionKind], list[NDArray[np.int8]]] = {}
        self._tokens = self._stream_bytes = self._stored_bytes = self._side_bytes = self._refused = 0

    def add(self, codec: RdCodec, block: TierBlock) -> None:
        try:
            [stream] = codec.encode([block])
        except EncodeRangeError:
            self._refused += block.num_tokens
            return
        header = codec.read_header(stream)
        self._tokens += header.num_tokens
        self._stream_bytes += len(stream)
        for group in range(len(codec.layer_groups)):
            for kind in _KINDS:
                self._add_section(codec, header, stream, group, kind)

    def _add_section(
        self, codec: RdCodec, header: StreamHeader, stream: bytes, group: int, kind: SectionKind
    ) -> None:
        first, stop = header.group_span(group)
        payload = read_section(header, group, kind, memoryview(stream)[first:stop])
        sides = codec.parameters.groups[group]
        side = sides.keys if kind is SectionKind.KEYS else sides.values
        layout = RdLayout(side.plans[header.plan_id].counts)
        tokens = header.num_tokens - header.sink_tokens
        section = unpack(np.frombuffer(payload, dtype=np.uint8), layout, tokens)
        self._symbols.setdefault((group, kind), []).append(section.symbols)
        self._levels.setdefault((group, kind), []).append(section.levels)
        for chunk in header.chunks_of(group, kind):
            size = align(chunk.stored_size) + CHUNK_ENTRY_BYTES
            self._stored_bytes += size
            self._side_bytes += size - chunk.stored_size

    @property
    def is_empty(self) -> bool:
        return not self._tokens

    def result(self, nominal: float, size: int, loaded: LoadedModel) -> Packed:
        bits = 0.0
        for parts in self._symbols.values():
            bits += sum(_code_length(row) for row in np.concatenate(parts, axis=1))
        for levels in self._levels.values():
            bits += _code_length(np.concatenate(levels))
        return Packed(
            nominal_ratio=nominal,
            ratio=self._tokens * loaded.geometry.token_bytes_16bit / self._stream_bytes,
            tier_block_tokens=size,
            tokens=self._tokens,
            entropy_bytes=bits / 8,
            stored_bytes=self._stored_bytes,
            side_bytes=self._side_bytes,
            refused=self._refused,
        )


def _code_length(symbols: NDArray[np.int16] | NDArray[np.int8]) -> float:
    """Return the bits of an ideal static code with the symbols' own histogram."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / symbols.size)).sum())
