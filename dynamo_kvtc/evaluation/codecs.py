"""Which codecs an evaluation compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.codec.base import KvCodec
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.errors import EvaluationError

__all__ = ["PROFILES", "CodecUnderTest", "codecs_under_test"]

#: Profiles that can be evaluated.
PROFILES: tuple[str, ...] = ("kvtc", "raw")


@dataclass(frozen=True, slots=True)
class CodecUnderTest:
    """A codec and what its row in the report is called.

    Attributes
    ----------
    profile : str
        Name of the profile.
    nominal_ratio : float
        What the codec was made for, before entropy coding.
    codec : KvCodec
        The codec itself.
    """

    profile: str
    nominal_ratio: float
    codec: KvCodec


def codecs_under_test(
    artifact: Artifact, profile: str, ratios: Sequence[float] | None = None
) -> list[CodecUnderTest]:
    """Build the codecs of one profile.

    Parameters
    ----------
    artifact : Artifact
        Calibrated parameters; of the raw profile only its id and geometry are used.
    profile : str
        One of `PROFILES`.
    ratios : Sequence[float], optional
        Nominal ratios; by default all that the artifact has. The raw profile has none.

    Raises
    ------
    EvaluationError
        If the profile is unknown, or ratios are given where it has none.
    ArtifactMismatchError
        If the artifact has no plan for a ratio.
    """
    parameters = artifact.parameters
    if profile == "raw":
        if ratios:
            raise EvaluationError("the raw profile has one ratio only; leave out the ratios")
        nominal = parameters.geometry.token_bytes_16bit / parameters.geometry.token_bytes
        return [CodecUnderTest("raw", nominal, RawCodec(parameters.geometry, parameters.artifact_id))]
    if profile == "kvtc":
        chosen = list(ratios) if ratios else sorted(parameters.ratios.values())
        return [CodecUnderTest("kvtc", ratio, KvtcCodec(parameters, ratio=ratio)) for ratio in chosen]
    raise EvaluationError(f"there is no profile {profile!r}; known: {', '.join(PROFILES)}")
