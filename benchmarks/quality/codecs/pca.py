"""Plain truncation: the first components of the published method's basis, each kept in 16 bits.

What the transform alone gives, without quantiser, bit plan and entropy coder: keys before RoPE and values
are centred and projected on the basis of the artifact of profile ``kvtc``, and as many coefficients are
kept in float16 as the ratio leaves room for, ``row size / ratio`` on each side of each layer group.
"""

from __future__ import annotations

import torch

from benchmarks.quality.codecs.base import (
    BaselineCodec,
    CodecFamily,
    CodecInputs,
    DocumentCodec,
    StoredKv,
)
from dynamo_kvtc.codec.parameters import KvtcParameters, SideParameters
from dynamo_kvtc.errors import EvaluationError

__all__ = ["FAMILY", "PcaCodec"]

_RATIOS = (4.0, 8.0, 16.0, 32.0)


class PcaCodec(BaselineCodec):
    """A fixed number of principal components.

    Parameters
    ----------
    parameters : KvtcParameters
        Of an artifact of profile ``kvtc``.
    ratio : float
        Elements of a row per coefficient that is kept.

    Raises
    ------
    EvaluationError
        If the artifact holds fewer components than the ratio leaves room for.
    """

    def __init__(self, parameters: KvtcParameters, ratio: float) -> None:
        self.family = "pca"
        self.setting = f"{ratio:g}x"
        self._parameters = parameters
        self._ranks = [int(group.keys.mean.numel() / ratio) for group in parameters.groups]
        for group, rank in zip(parameters.groups, self._ranks, strict=True):
            stored = min(group.keys.basis.shape[0], group.values.basis.shape[0])
            if rank < 1 or rank > stored:
                raise EvaluationError(
                    f"truncation at {ratio:g}x needs {rank} components, the artifact has {stored}; use one "
                    "that was calibrated for a lower ratio as well"
                )

    def store_tokens(self, keys: torch.Tensor, values: torch.Tensor, first_position: int) -> StoredKv:
        """Encode tokens behind the sinks; see `BaselineCodec.store_tokens`."""
        rope = self._parameters.rope
        positions = torch.arange(first_position, first_position + keys.shape[0])
        rows = rope.remove_rope(keys, positions)
        decoded_keys, decoded_values = torch.empty_like(rows), torch.empty_like(values)
        for group, rank in zip(self._parameters.groups, self._ranks, strict=True):
            span = slice(group.layers.first, group.layers.stop)
            decoded_keys[:, span] = _truncate(rows[:, span], group.keys, rank)
            decoded_values[:, span] = _truncate(values[:, span], group.values, rank).to(values.dtype)
        rotated = rope.apply_rope(decoded_keys, positions).to(keys.dtype)
        return StoredKv(rotated, decoded_values, keys.shape[0] * sum(self._ranks) * 2 * 2)


def _truncate(kv: torch.Tensor, side: SideParameters, rank: int) -> torch.Tensor:
    basis = side.basis[:rank]
    coefficients = (kv.float().flatten(1) - side.mean) @ basis.T
    return (coefficients.half().float() @ basis + side.mean).view(kv.shape)


def _build(inputs: CodecInputs) -> list[DocumentCodec]:
    parameters = inputs.artifact("kvtc").parameters
    return [PcaCodec(parameters, ratio) for ratio in _RATIOS]


FAMILY = CodecFamily("pca", _build, profile="kvtc")
