"""The kvtc profile: the method of the KVTC paper (arXiv 2511.01815).

`dynamo_kvtc.codec.reference` does the same slowly and obviously.
"""

from __future__ import annotations

from dynamo_kvtc.codec.bitstream import Profile, SectionKind
from dynamo_kvtc.codec.entropy import DEFLATE, EntropyCoder, find_coder
from dynamo_kvtc.codec.kvtc_side import KvtcSideCodec
from dynamo_kvtc.codec.parameters import KvtcParameters
from dynamo_kvtc.codec.side import SideCodec
from dynamo_kvtc.codec.transform_codec import TransformCodec

__all__ = ["KvtcCodec"]


class KvtcCodec(TransformCodec):
    """Codec of the kvtc profile.

    Parameters
    ----------
    parameters : KvtcParameters
        Transforms and plans, from an artifact.
    ratio : float, optional
        Nominal ratio of the plan to encode with; None makes a codec for decoding only.
    sink_bits, compute_dtype, threads
        As `TransformCodec` takes them.
    coder : EntropyCoder, optional
        Entropy coder to encode with; DEFLATE by default.

    Raises
    ------
    ArtifactMismatchError
        If the artifact has no plan for `ratio`, or is of another profile.
    RopeError, ValueError
        As `TransformCodec` does.
    """

    profile = Profile.KVTC
    parameters: KvtcParameters

    def __init__(
        self,
        parameters: KvtcParameters,
        *,
        ratio: float | None = None,
        sink_bits: int = 8,
        compute_dtype: str = "auto",
        threads: int = 2,
        coder: EntropyCoder | None = None,
    ) -> None:
        super().__init__(
            parameters,
            plan_id=None if ratio is None else parameters.plan_id(ratio),
            sink_bits=sink_bits,
            compute_dtype=compute_dtype,
            threads=threads,
            coder=coder or find_coder(DEFLATE),
        )

    def _make_side(self, group: int, kind: SectionKind, plan_id: int) -> SideCodec:
        parameters = self.parameters.groups[group]
        side = parameters.keys if kind is SectionKind.KEYS else parameters.values
        return KvtcSideCodec(side, plan_id, self.geometry.layer_size, self._dtype)
