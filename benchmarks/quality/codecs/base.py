"""What a codec is to the evaluation: a document's KV in, what it decodes to and the bytes it stores out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.quality import SINK_TOKENS
from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.errors import EvaluationError

__all__ = ["BaselineCodec", "CodecFamily", "CodecInputs", "DocumentCodec", "StoredKv"]


@dataclass(frozen=True, slots=True, eq=False)
class StoredKv:
    """A document's KV after it was stored and read back.

    Attributes
    ----------
    keys, values : torch.Tensor
        What was decoded, in shape and dtype of what was handed over.
    stored_bytes : int
        Everything that was stored for it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    stored_bytes: int


class DocumentCodec(ABC):
    """One codec with one setting.

    Attributes
    ----------
    family : str
        Name in the registry.
    setting : str
        What distinguishes it within its family, such as ``16x nominal``.
    """

    family: str
    setting: str

    @abstractmethod
    def store(self, keys: torch.Tensor, values: torch.Tensor) -> StoredKv:
        """Encode a document's KV and decode it again.

        Parameters
        ----------
        keys, values : torch.Tensor
            ``[tokens, layers, heads, head_size]``, keys with RoPE applied, positions from 0; not modified.
        """


class BaselineCodec(DocumentCodec):
    """A codec without a container: the sinks are kept in bfloat16, all other tokens are the subclass's.

    The recipes of the baselines know no sinks; keeping them apart at 16 bits is a favour to them, since
    sinks have unusual keys and values that would widen the scales of their groups. Where a recipe needs
    headers in practice, none are counted, a favour too.
    """

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> StoredKv:
        """Encode a document's KV and decode it again; see `DocumentCodec.store`."""
        sinks = min(SINK_TOKENS, keys.shape[0])
        rest = self.store_tokens(keys[sinks:], values[sinks:], sinks)
        sink_bytes = 2 * (keys[:sinks].numel() + values[:sinks].numel())
        return StoredKv(
            keys=torch.cat((round_to_bfloat16(keys[:sinks]), rest.keys)),
            values=torch.cat((round_to_bfloat16(values[:sinks]), rest.values)),
            stored_bytes=sink_bytes + rest.stored_bytes,
        )

    @abstractmethod
    def store_tokens(self, keys: torch.Tensor, values: torch.Tensor, first_position: int) -> StoredKv:
        """Do as `store` for the tokens behind the sinks, the first of which is at `first_position`."""


@dataclass(frozen=True)
class CodecInputs:
    """What codecs are built from.

    Attributes
    ----------
    geometry : KvGeometry
        Shape and dtype of the caches.
    artifacts : Mapping[str, Artifact]
        The model's artifacts, by profile.
    tier_block_tokens : int
        Tokens of one stream, for codecs that write streams.
    """

    geometry: KvGeometry
    artifacts: Mapping[str, Artifact]
    tier_block_tokens: int = 256

    def artifact(self, profile: str) -> Artifact:
        """Return the artifact of a profile.

        Raises
        ------
        EvaluationError
            If there is none.
        """
        if profile not in self.artifacts:
            raise EvaluationError(f"there is no artifact of profile {profile!r}; calibrate one")
        return self.artifacts[profile]


@dataclass(frozen=True)
class CodecFamily:
    """One entry of the registry.

    Attributes
    ----------
    name : str
        Name in the registry, in reports and on the command line.
    build : Callable[[CodecInputs], list[DocumentCodec]]
        Makes the codec with each of its settings.
    profile : str or None
        Profile of the artifact that it needs.
    """

    name: str
    build: Callable[[CodecInputs], list[DocumentCodec]]
    profile: str | None = None


def round_to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """Return what 16 bits keep of numbers, in their own dtype."""
    return x.bfloat16().to(x.dtype)
